"""Which masters of a cluster were silent of late: locks there may be gone, though owners live."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from relstream._core import pack
from relstream.errors import RelstreamError, ReplyError

if TYPE_CHECKING:
    from relstream.net.connection import Endpoint
    from relstream.net.topology import ClusterTopology

# Seconds between two questions to each master, at most.
ASK_EVERY = 0.2


class Outages:
    """Asks every master several times a second, over the connections that ask for locks.

    So whoever asks for locks of one that hung hears of that first. After an outage, and after a
    failover, owners have the time of a `lease` (seconds) to renew theirs before they count as free.
    """

    def __init__(self, topology: ClusterTopology, lease: float) -> None:
        self._topology = topology
        self._lease = lease
        # Seconds of silence by which no lock is lost: it is renewed every half lease.
        self._bearable = lease / 4
        self._every = min(ASK_EVERY, lease / 8)
        self._woke_at = 0.0
        # Until when (loop time) locks on these masters may be missing.
        self._until: dict[Endpoint, float] = {}
        # When those were first asked that have not answered since; long ago if they hung up on us.
        self._asked_at: dict[Endpoint, float] = {}

    async def watch(self) -> None:
        """Asks until cancelled."""
        now = asyncio.get_running_loop().time
        self._forget()
        self._compare()
        self._woke_at = now()
        # One that answers late now may have been silent for long.
        known = [master for master in self._until if self._topology.to(master).alive]
        self._asked_at.update(dict.fromkeys(known, now() - self._bearable / 2))
        asking: dict[Endpoint, asyncio.Task[None]] = {}
        try:
            while True:
                self._compare()
                for master in self._until:
                    if master not in asking or asking[master].done():
                        asking[master] = asyncio.ensure_future(self._ask(master))
                for master in [master for master in asking if master not in self._until]:
                    asking.pop(master).cancel()
                await asyncio.sleep(self._every)
                late = self._late()
                for master in self._asked_at:
                    self._asked_at[master] += late
                self._woke_at = now()
        finally:
            for task in asking.values():
                task.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)
            self._forget()

    def _forget(self) -> None:
        self._until.clear()
        self._asked_at.clear()

    def _late(self) -> float:
        """Seconds for which this event loop was kept from hearing any answer."""
        awake = asyncio.get_running_loop().time() - self._woke_at
        return max(awake - self._every, 0.0)

    def _silent(self, master: Endpoint) -> bool:
        """Whether this one has left a question unanswered for too long."""
        asked_at = self._asked_at.get(master, math.inf)
        silence = asyncio.get_running_loop().time() - asked_at - self._late()
        return silence > self._bearable

    def _compare(self) -> None:
        """One that came as another went replaces it; else slots have moved, with their locks."""
        masters = self._topology.slots.masters
        gone = self._until.keys() - set(masters)
        for master in gone:
            del self._until[master]
            self._asked_at.pop(master, None)
        for master in masters:
            self._until.setdefault(master, self._grace() if gone else -math.inf)

    def _grace(self) -> float:
        return asyncio.get_running_loop().time() + self._lease

    async def _ask(self, master: Endpoint) -> None:
        self._asked_at.setdefault(master, asyncio.get_running_loop().time())
        try:
            (reply,) = await self._topology.to(master).pipeline(pack(b"PING"), 1)
        except RelstreamError:
            self._asked_at[master] = -math.inf  # it may come back without any locks
            return
        if isinstance(reply, ReplyError) and reply.transient:
            return
        if self._silent(master):
            self._until[master] = self._grace()
        self._asked_at.pop(master, None)

    def refused(self, locks: list[bytes]) -> None:
        """Masters of these could not be asked who holds them."""
        self._compare()
        for master in self._topology.apart(locks):
            if master in self._until:
                self._until[master] = self._grace()

    def shadowed(self, locks: list[bytes]) -> set[bytes]:
        """Those of the locks that may be missing though their owners live."""
        self._compare()
        now = asyncio.get_running_loop().time()
        dark = {m for m, until in self._until.items() if now < until or self._silent(m)}
        if not dark:
            return set()
        apart = self._topology.apart(locks).items()
        return {key for master, keys in apart if master in dark for key in keys}
