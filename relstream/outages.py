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

# Seconds between two questions to each master.
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
        # Until when (loop time) locks on these masters may be missing.
        self._until: dict[Endpoint, float] = {}
        # When those were first asked that have not answered since.
        self._asked_at: dict[Endpoint, float] = {}

    async def watch(self) -> None:
        """Asks until cancelled."""
        self._until.clear()
        self._asked_at.clear()
        asking: dict[Endpoint, asyncio.Task[None]] = {}
        try:
            while True:
                self._compare()
                for master in self._until:
                    if master not in asking or asking[master].done():
                        asking[master] = asyncio.ensure_future(self._ask(master))
                for master in [master for master in asking if master not in self._until]:
                    asking.pop(master).cancel()
                await asyncio.sleep(ASK_EVERY)
        finally:
            for task in asking.values():
                task.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)

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
        now = asyncio.get_running_loop().time
        asked_at = self._asked_at.setdefault(master, now())
        try:
            (reply,) = await self._topology.to(master).pipeline(pack(b"PING"), 1)
        except RelstreamError:
            return
        if isinstance(reply, ReplyError) and reply.transient:
            return
        if self._asked_at.pop(master, None) is not None and now() - asked_at > self._bearable:
            self._until[master] = self._grace()

    def refused(self, locks: list[bytes]) -> None:
        """Masters of these did not say who holds them."""
        for master in self._topology.apart(locks):
            if master in self._until:
                self._until[master] = self._grace()

    def shadowed(self, locks: list[bytes]) -> set[bytes]:
        """Those of the locks that may be missing though their owners live."""
        now = asyncio.get_running_loop().time()
        dark = {master for master, until in self._until.items() if now < until}
        dark |= {m for m, asked_at in self._asked_at.items() if now - asked_at > self._bearable}
        if not dark:
            return set()
        apart = self._topology.apart(locks).items()
        return {key for master, keys in apart if master in dark for key in keys}
