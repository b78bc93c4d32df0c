"""Adds entries to the dead-letter stream, and deletes those that were not ours to add."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import pack
from relstream.errors import ConnectionFailed, ReplyError
from relstream.lbs.names import (
    DLQ_REASON_FIELD,
    RETRY_FIELD,
    SOURCE_FIELD,
    Names,
    replace_fields,
    retry_count,
)
from relstream.lbs.permissions import Denied
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

# The part of `dlq_max_len` from which on the log warns that the cap is near.
CAP_NEAR = 0.9


class DeadLetterQueue:
    """The dead-letter stream of one load balancer stream: adds entries, and takes them back."""

    def __init__(
        self,
        topology: Topology,
        names: Names,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._names = names
        self._recorder = recorder
        self._logger = logger
        self._no_xlen = Denied(topology.link(names.dlq))
        self._cap_told = False

    async def add(
        self, letters: Sequence[tuple[bytes, list[bytes], bytes]], max_len: int
    ) -> list[bytes | ReplyError]:
        """Adds entries, `(id, fields, reason)` each, to the dead-letter stream.

        Returns their ids there; of those that can't be added the error. In the load balancer stream
        they stay pending.
        """
        cap: tuple[bytes | int, ...] = (b"MAXLEN", b"~", max_len) if max_len else ()
        counting = bool(max_len) and not self._no_xlen
        xlen = pack(b"XLEN", self._names.dlq) if counting else b""
        adding = [
            pack(
                b"XADD", self._names.dlq, *cap, b"*",
                *replace_fields(
                    pairs,
                    {
                        RETRY_FIELD: b"%d" % retry_count(pairs),
                        DLQ_REASON_FIELD: reason,
                        SOURCE_FIELD: entry_id,
                    },
                ),
            )
            for entry_id, pairs, reason in letters
        ]  # fmt: skip
        replies = await self._at_dlq(b"".join([xlen, *adding, xlen]), len(adding) + 2 * counting)
        if counting:
            before, *replies, after = replies
            self._look_at_cap(before, replies, after, max_len)
        return replies

    def _look_at_cap(self, before: Any, added: list[Any], after: Any, max_len: int) -> None:
        """Tells of dead letters that were deleted for others, and of those that soon will be."""
        if isinstance(before, ReplyError) or isinstance(after, ReplyError):
            self._no_xlen.remember()
            return
        trimmed = before + sum(not isinstance(reply, ReplyError) for reply in added) - after
        if trimmed > 0 and self._recorder is not None:
            self._recorder.dead_letters_trimmed(count=trimmed)
        near = after >= CAP_NEAR * max_len
        if near and not self._cap_told:
            self._logger.warning(
                "the dead-letter stream %r holds %d of %d entries at most (dlq_max_len): the "
                "oldest are deleted as others come; replay or purge them, or raise dlq_max_len",
                self._names.dlq.decode(), after, max_len,
            )  # fmt: skip
        self._cap_told = near

    async def delete(self, ids: Sequence[bytes]) -> None:
        """Deletes what `add` added, as it was not ours to add."""
        if ids:
            raise_first(await self._at_dlq(pack(b"XDEL", self._names.dlq, *ids), 1))

    async def _at_dlq(self, packed: bytes, replies: int) -> list[Any]:
        """Commands on the dead-letter stream; that it can't be reached is but a refusal.

        Where it is on a master of its own, that may be gone while all else goes on.
        """
        try:
            return await self._topology.link(self._names.dlq).pipeline(packed, replies)
        except ConnectionFailed as error:
            if self._topology.single:
                raise
            raise ReplyError(f"MASTERDOWN {error}") from None
