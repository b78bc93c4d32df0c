"""Who of all consumers recovers for the service: whoever holds the leader key."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from relstream._core import pack
from relstream.errors import RelstreamError, ReplyError

if TYPE_CHECKING:
    from relstream.lbs import Names
    from relstream.net.topology import Topology

# Seconds for which leadership lasts at most when it is not renewed; where locks expire sooner half
# as long at least.
LEADERSHIP = 1.0
# In front of the name of a leader that leaves looking for deaths to others.
SCANS_ONLY = b"scans only: "
# Seconds between two looks, while another leads, whether that is so.
CHECK_KEY_EVERY = 10.0


class Leadership:
    """Of one consumer, who has it for `lasts` seconds from when it was taken, or kept, last."""

    def __init__(
        self,
        topology: Topology,
        names: Names,
        consumer: bytes,
        heartbeat: float,
        *,
        scans_only: bool,
        logger: logging.Logger,
    ) -> None:
        self._link = topology.link(names.leader)
        self._server = topology.to(self._link.endpoint) if topology.single else None
        self._openings = 0
        self._key = names.leader
        self._scans_only = scans_only
        self._value = SCANS_ONLY + consumer if scans_only else consumer
        self.lasts = max(min(heartbeat, LEADERSHIP), LEADERSHIP / 2)
        self._lasts_ms = round(self.lasts * 1000)
        self._logger = logger
        self._checked = -math.inf

    async def take(self) -> bool:
        """Whether this consumer leads from now on."""
        take = (b"SET", self._key, self._value, b"PX", self._lasts_ms)
        packed = pack(*take, b"NX") + pack(b"GET", self._key)
        taken, leader = await self._link.pipeline(packed, 2)
        if isinstance(leader, ReplyError):
            if leader.code == "WRONGTYPE":  # something else is there
                return False
            raise leader
        if isinstance(taken, ReplyError):
            if taken.code != "OOM":
                raise taken
            # Out of memory nobody can be chosen. Several that recover do no harm, none would.
            return leader is None
        if taken is None and not self._scans_only and (leader or b"").startswith(SCANS_ONLY):
            # Who only scans leads until somebody comes who looks for deaths, too.
            taken = await self._link.execute(*take)
        return taken is not None

    async def keep(self) -> bool:
        """Whether this consumer leads still, and if so for its full time again."""
        leader = await self._link.execute(b"GET", self._key)
        if leader is None:
            return await self.take()
        if leader != self._value:
            return False
        return bool(await self._link.execute(b"PEXPIRE", self._key, self._lasts_ms))

    def interrupted(self) -> bool:
        """Whether the connection was opened anew since this was asked last.

        The server may be another one since, which heard of no renewal for a while: one that is
        replaced by hand goes on serving until it is told. A cluster's masters are looked after by
        `Outages`.
        """
        if self._server is None:
            return False
        before, self._openings = self._openings, self._server.openings
        return bool(before) and before != self._openings

    async def resign(self) -> None:
        """Lets another lead at once, if the server can be told; else leadership just expires."""
        try:
            if await self._link.execute(b"GET", self._key) == self._value:
                await self._link.execute(b"DEL", self._key)
                self._logger.info("this consumer recovers for the service no more")
        except RelstreamError as error:
            self._logger.debug("leadership could not be given up, and expires: %s", error)

    async def check(self) -> None:
        """Says so, once, when something else is where leadership is kept: then nobody recovers.

        For one who does not lead; looks every now and then only, however often it is called.
        """
        now = asyncio.get_running_loop().time()
        if now < self._checked + CHECK_KEY_EVERY:
            return
        self._checked = now
        (ttl,) = await self._link.pipeline(pack(b"PTTL", self._key), 1)
        if ttl == -1:
            self._checked = math.inf
            self._logger.error(
                "nobody recovers for this service: the key %r is in use for something else, or was "
                "left without a time to live; delete it",
                self._key.decode(),
            )
