"""Locks that Redis says have expired: collected, and looked at in batches."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from relstream.errors import ReplyError, is_retriable
from relstream.lbs.names import lock_key
from relstream.lbs.stream import id_order
from relstream.notifications import LBSInfo

if TYPE_CHECKING:
    from relstream.recovery.steps import Steps

# Expired locks that may wait to be looked at; probes and scans find all others.
MAX_EXPIRED = 100_000
# Seconds between two batches.
COLLECT_FOR = 0.2


class ExpiredLocks:
    """Collects expired locks, and takes the steps of recovery for their entries."""

    def __init__(self, steps: Steps, batch_size: int) -> None:
        self._steps = steps
        self._batch_size = batch_size
        self._expired: dict[bytes, bytes] = {}  # locks, and the ids of their entries

    def add(self, payload: LBSInfo) -> None:
        """A lock expired: its entry will be looked at."""
        if len(self._expired) < MAX_EXPIRED:
            self._expired[lock_key(*payload)] = payload.id_in_lbs.encode()

    def clear(self) -> None:
        """Forgets all of them: another consumer leads."""
        self._expired.clear()

    async def run(self) -> None:
        """Recovers what was collected, until cancelled."""
        size = self._batch_size
        while True:
            expired, self._expired = self._expired, {}
            # Two locks may name one entry: another service's stream may have one of the same id.
            ids = sorted(set(expired.values()), key=id_order)
            for start in range(0, len(ids), size):
                try:
                    await self._steps.recover_ids(ids[start : start + size], expired)
                    self._steps.complained.discard("recovered")
                except ReplyError as error:  # looks and scans find them
                    if is_retriable(error):
                        raise
                    self._steps.complain(len(ids), "recovered", error)
            await asyncio.sleep(COLLECT_FOR)
