"""Pending entries that are gone from the load balancer stream: trimmed, or deleted by hand.

A living owner has all that is needed to finish its stream, to fail it, or to hand it over, so it is
left to it. What dead ones leave behind can't be delivered any more.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from relstream._core import ITEM, PENDING, Template
from relstream.lbs.stream import discard
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream.lbs.consumers import Group
    from relstream.lbs.names import Names
    from relstream.net.topology import KeyConnection
    from relstream.recorder import SafeRecorder

# A consumer that reads is heard of once a second; so many seconds later it need not live any more.
HEARD = 3.0
# Ids that a log line names.
TOLD = 10


class Vanished:
    """Sees to pending entries whose announcements are gone."""

    def __init__(
        self,
        link: KeyConnection,
        names: Names,
        group: Group,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = link
        self._names = names
        self._group = group
        self._recorder = recorder
        self._logger = logger

    async def acknowledge(
        self, ids: Sequence[bytes], *, own: bool, holding: Container[bytes] = ()
    ) -> int:
        """Acknowledges these unless their consumers live; returns how many were pending.

        `own`: they are pending for this consumer, which lives, and does not own them. `holding`:
        consumers that hold locks, and live.
        """
        if not ids:
            return 0
        if not own:
            ids = await self._left(ids, holding)
            if not ids:
                return 0
        count = await discard(self._link, self._names, ids)
        if count:
            shown = b", ".join(ids[:TOLD]).decode() + (", …" if len(ids) > TOLD else "")
            self._logger.warning(
                "%d pending entries were gone from %r, trimmed or deleted, and nobody owned them: "
                "what they announced is not known any more, and was acknowledged: %s",
                count, self._names.lbs.decode(), shown,
            )  # fmt: skip
            if self._recorder is not None:
                self._recorder.entries_vanished(count=count)
        return count

    async def _left(self, ids: Sequence[bytes], holding: Container[bytes]) -> list[bytes]:
        """Those pending for consumers that are not known to live."""
        ask = Template(b"XPENDING", self._names.lbs, self._names.group, ITEM, ITEM, 1)
        pages = raise_first(
            await self._link.pipeline(ask.pack(list(ids)), len(ids), decode=PENDING)
        )
        owners = {page[0][0]: page[0][1] for page in pages if len(page)}
        owners = {entry_id: name for entry_id, name in owners.items() if name not in holding}
        living = await self._living(sorted(set(owners.values())))
        return [entry_id for entry_id, owner in owners.items() if owner not in living]

    async def _living(self, consumers: list[bytes]) -> set[bytes]:
        """Those that wrote their instance lately, or read, as consumers of the reference do."""
        if not consumers:
            return set()
        living = await self._group.living(consumers)
        if len(living) < len(consumers):
            for row in await self._group.rows():
                if row[b"idle"] < HEARD * 1000:
                    living.add(row[b"name"])
        return living
