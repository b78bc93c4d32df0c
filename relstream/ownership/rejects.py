"""Entries that this consumer can't own: unreadable ones, and those of another partition."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from relstream._core import Batch, Entry
from relstream.errors import (
    ReplyError,
)
from relstream.lbs.entries import REQUEUED
from relstream.lbs.failures import with_detail
from relstream.lbs.names import (
    REASON_UNPARSEABLE,
    REASON_WRONG_PARTITION,
    Names,
    partition_of,
)

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig
    from relstream.lbs.requeue import Requeuer
    from relstream.recorder import SafeRecorder

# Bad entries of a batch that are logged one by one.
TOLD = 5


class Rejects:
    """Routes entries that were just read, and can't be owned, to the dead-letter stream."""

    def __init__(
        self,
        names: Names,
        requeuer: Requeuer,
        recovery: RecoveryConfig,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._names = names
        self._requeuer = requeuer
        self._recovery = recovery
        self._recorder = recorder
        self._logger = logger
        self._dlq_failed = False

    def misplaced(self, entries: list[Entry]) -> list[Entry]:
        """Those whose streams are announced elsewhere by all who know how many partitions we have.

        Under that name a stream is looked for there, by whoever finishes it too.
        """
        ours, of = self._names.partition, self._names.partitions
        return [entry for entry in entries if partition_of(entry.data_stream_name, of) != ours]

    async def route_misplaced(self, batch: Batch, entries: list[Entry]) -> None:
        places = {batch.id(index): index for index in range(len(batch))}
        names = {places[entry.id]: entry.data_stream_name for entry in entries}
        of = self._names.partitions
        bad = [
            (i, f"{name!r} is of partition {partition_of(name, of)}: give partitions={of}")
            for i, name in names.items()
        ]
        await self.route(batch, bad, REASON_WRONG_PARTITION, names)

    async def route(
        self,
        batch: Batch,
        bad: list[tuple[int, str]],
        reason: bytes = REASON_UNPARSEABLE,
        names: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Moves what can't be served to the dead-letter stream; tells of it once a batch.

        `names` of data streams, by the same places in the batch as in `bad`.
        """
        what = "announce no stream" if reason == REASON_UNPARSEABLE else "are not of this partition"
        letters = [
            (batch.id(index), with_detail(batch.pairs(index) or [], why), None)
            for index, why in bad
        ]
        told = [f"{batch.id(index).decode()} ({why})" for index, why in bad[:TOLD]]
        which = ", ".join(told) + (f" and {len(bad) - TOLD} more" if len(bad) > TOLD else "")
        dlq = self._names.dlq.decode()
        try:
            outcomes = await self._requeuer.route_to_dlq(
                letters, self._recovery.dlq_max_len, reason
            )
        except ReplyError as error:
            if not self._dlq_failed:  # it is tried again as long as they are pending
                self._dlq_failed = True
                self._logger.error(
                    "the dead-letter stream %r can't be written (%s), so LBS entries that %s stay "
                    "pending: %s",
                    dlq, error, what, which,
                )  # fmt: skip
            return
        self._dlq_failed = False
        self._logger.warning(
            "LBS entries that %s went to the dead-letter stream %r: %s", what, dlq, which
        )
        if self._recorder is not None:
            routed = [
                names.get(i) for (i, _), how in zip(bad, outcomes, strict=True) if how == REQUEUED
            ]
            if routed:
                self._recorder.dlq_routing(streams=routed, reason=reason.decode())
