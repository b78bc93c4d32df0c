"""Locks that outlast their owners: of one that died the streams would be nobody's for as long."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from relstream._core import ITEM, Template
from relstream.errors import ReplyError
from relstream.lbs.permissions import Denied

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection, Topology

TTL_CHECK_EVERY = 60.0
# A lock that lives for longer than so many of our heartbeats was not set by a consumer's renewal.
# Another consumer's heartbeat may be longer than ours.
HEARTBEATS = 10


class LastingLocks:
    """Finds held locks that expire far too late, or never, once a minute.

    The server's clock was set back, say, or somebody else has written them. They are left alone, as
    an owner that lives renews its own to the right time.
    """

    def __init__(
        self, topology: Topology, link: KeyConnection, heartbeat: float, logger: logging.Logger
    ) -> None:
        self._topology = topology
        self._heartbeat = heartbeat
        self._logger = logger
        self._next_look = -math.inf
        self._no_pttl = Denied(link)
        self.found: str | None = None
        """What is wrong with one of them, as far as is known; None: nothing."""

    async def look(self, locks: list[bytes]) -> None:
        """Asks how long these live, all of which are held."""
        now = asyncio.get_running_loop().time()
        if now < self._next_look or self._no_pttl:
            return
        self._next_look = now + TTL_CHECK_EVERY
        times = await self._topology.each(Template(b"PTTL", ITEM).pack, locks)
        if any(isinstance(left, ReplyError) and left.code == "NOPERM" for left in times):
            self._no_pttl.remember()
        before, self.found = self.found, None
        for lock, left in zip(locks, times, strict=True):
            if isinstance(left, int) and (left == -1 or left > HEARTBEATS * self._heartbeat * 1000):
                expires = "never expires" if left == -1 else f"expires in {left / 1000:.0f} s only"
                self.found = (
                    f"the lock {lock.decode(errors='replace')!r} {expires}, so if its owner is "
                    "dead its stream is owned by nobody until then"
                )
                break
        if self.found is not None and before is None:
            self._logger.warning(
                "%s: the server's clock may have been set back, or something else than a consumer "
                "has set it; if the owner is gone, delete this key", self.found,
            )  # fmt: skip
