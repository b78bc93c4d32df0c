"""Reading is paused and resumed, and a consumer is drained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.engine.partition import Partition
    from relstream.notifications import Notifications
    from relstream.ownership.capacity import Capacity

PAUSED = "paused"
"""The reason for which `Capacity` is closed meanwhile."""
# Seconds between two looks whether all is drained, besides those when a stream ends.
DRAIN_CHECK_EVERY = 0.05


class Pausing:
    """Closes `room`, so that nothing more is read."""

    def __init__(
        self, room: Capacity, notifications: Notifications, partitions: Sequence[Partition]
    ) -> None:
        self._capacity = room
        self._notifications = notifications
        self._partitions = partitions

    @property
    def paused(self) -> bool:
        """Whether the application has paused reading."""
        return self._capacity.closed_for(PAUSED)

    async def pause(self) -> None:
        """When it returns nothing more is read, until `resume`."""
        self._capacity.close(PAUSED)
        await asyncio.gather(*(part.fetcher.pause() for part in self._partitions))

    def resume(self) -> None:
        """Reads again."""
        self._capacity.reopen(PAUSED)

    async def drain(self, timeout: float | None, closed: Callable[[], bool]) -> bool:
        """Pauses, and waits until nothing is owned, or being read; False after `timeout` seconds.

        `closed` says whether nothing will change any more.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        pausing = asyncio.ensure_future(self.pause())
        try:
            while not self._drained() and not closed():
                left = DRAIN_CHECK_EVERY
                if deadline is not None:
                    left = min(left, deadline - loop.time())
                    if left <= 0:
                        return False
                ended = self._notifications.room_made.wait()
                try:
                    await asyncio.wait({ended}, timeout=left)
                finally:
                    ended.cancel()
            return self._drained()
        finally:
            await cancel_and_wait([pausing])

    def _drained(self) -> bool:
        return not self._capacity.in_hand and all(
            not part.leases.table and part.fetcher.settled for part in self._partitions
        )
