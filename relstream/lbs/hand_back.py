"""Hands entries back that this consumer has read and does not own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from relstream._core import EntryIds
from relstream.errors import ReplyError, is_retriable
from relstream.lbs.entries import ALIVE, REFUSED
from relstream.lbs.names import Names
from relstream.lbs.requeue import Requeuer
from relstream.lbs.stream import Entries, id_order, plan_for
from relstream.lbs.vanished import Vanished

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection


class HandBack:
    """Requeues entries that are pending for this consumer, without counting a retry."""

    def __init__(
        self, link: KeyConnection, names: Names, requeuer: Requeuer, vanished: Vanished
    ) -> None:
        self._requeuer = requeuer
        self._vanished = vanished
        self._entries = Entries(link, names)

    async def hand_back(
        self, ids: list[bytes], *, never_owned: Mapping[bytes, list[bytes]] | None = None
    ) -> list[bytes]:
        """Puts entries back that nobody has locked, without counting a retry.

        Returns what stays pending, as its lock is held, or can't be looked at, or for a refusal.
        `never_owned`: they were read by us, and consist of these fields, should they be trimmed.
        Nobody can have locked them, and no lock has to be looked at that may be on a server which
        can't be asked.
        """
        stay: list[bytes] = []
        ids = sorted(ids, key=id_order)
        async for part, batches in self._entries.read(EntryIds(ids)):
            plan = plan_for(part, batches)
            try:
                if never_owned is None:
                    await self._vanished.acknowledge(plan.gone, own=True)
                else:
                    await self._requeuer.requeue([(i, never_owned[i], None) for i in plan.gone])
                outcomes, _ = await self._requeuer.requeue_planned(
                    plan,
                    counting=False,
                    looked=never_owned is not None,
                    locked=never_owned is None,
                )
            except ReplyError as error:  # about all of this part
                if not is_retriable(error):
                    raise
                stay += part
                continue
            returned = zip(plan.ids(), outcomes, strict=True)
            stay += [entry_id for entry_id, outcome in returned if outcome in (ALIVE, REFUSED)]
        return stay
