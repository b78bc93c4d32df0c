"""Who of all consumers recovers for the service: whoever holds the leader key."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from typing import TYPE_CHECKING

from relstream._core import pack
from relstream.errors import RelstreamError, ReplyError
from relstream.lbs.entries import Fence
from relstream.lbs.permissions import Denied

if TYPE_CHECKING:
    from relstream.lbs.names import Names
    from relstream.net.topology import Topology

# Seconds for which leadership lasts at most when it is not renewed; where locks expire sooner half
# as long at least.
LEADERSHIP = 1.0
# In front of the name of a leader that leaves looking for deaths to others.
SCANS_ONLY = b"scans only: "
# What the key holds when who led has closed, for long enough to be seen by all who would lead.
RESIGNED = b"nobody"
# Seconds between two looks, while another leads, whether that is so.
CHECK_KEY_EVERY = 10.0


class Leadership:
    """Of one consumer, who has it for `lasts` seconds from when it was taken, or kept, last.

    What the key holds is another one each time it is taken: the consumer's name, `#`, and a token.
    """

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
        self.link = topology.link(names.leader)
        self._key = names.leader
        self._scans_only = scans_only
        self._name = SCANS_ONLY + consumer if scans_only else consumer
        self._value = b""
        self.lasts = max(min(heartbeat, LEADERSHIP), LEADERSHIP / 2)
        self._lasts_ms = round(self.lasts * 1000)
        self._logger = logger
        self._checked = -math.inf
        self._out_of_memory = False
        self.confirmed_at = -math.inf
        """When that was sent by which leadership was confirmed last (loop time)."""
        self.renewed = False
        """Whether leadership was kept since it was taken."""
        # Until when (loop time) the key lives, by its time to live when it was seen last.
        self._lives_until = -math.inf
        self._no_pttl = Denied(self.link)
        self.vanished = False
        """Whether the key was gone, when it was looked at last, before its time had passed."""

    @property
    def confirmed(self) -> bool:
        """Whether nobody else can lead, as far as this clock tells."""
        return asyncio.get_running_loop().time() - self.confirmed_at < self.lasts

    @property
    def fence(self) -> Fence | None:
        """By which a script can see that this consumer leads, and has not ceased to since.

        None out of memory, where nobody can be chosen.
        """
        return None if self._out_of_memory else Fence(self._key, self._value)

    async def acquire(self) -> bool:
        """Whether this consumer leads from now on."""
        clock = asyncio.get_running_loop().time
        sent_at, lived_until = clock(), self._lives_until
        former, value = self._value, self._new_value()
        take = (b"SET", self._key, value, b"PX", self._lasts_ms)
        packed = pack(*take, b"NX") + pack(b"GET", self._key)
        if self._no_pttl:
            taken, leader = await self.link.pipeline(packed, 2)
        else:
            taken, leader, left = await self.link.pipeline(packed + pack(b"PTTL", self._key), 3)
            if isinstance(left, ReplyError) and left.code == "NOPERM":
                self._no_pttl.remember()
            if isinstance(left, int):
                self._lives_until = sent_at + left / 1000
        self.vanished = taken == b"OK" and clock() < lived_until
        self._out_of_memory = False
        if isinstance(leader, ReplyError):
            if leader.code == "WRONGTYPE":  # something else is there
                return False
            raise leader
        if isinstance(taken, ReplyError):
            if taken.code != "OOM":
                raise taken
            # Out of memory nobody can be chosen. Several that recover do no harm, none would.
            if leader is not None:
                return False
            self._out_of_memory = True
        elif taken is None and former and leader == former:  # our connection broke, no more
            return await self.renew()
        elif taken is None:
            # Who only scans leads until somebody comes who looks for deaths, too.
            if self._scans_only or not (leader or b"").startswith(SCANS_ONLY):
                return False
            await self.link.execute(*take)
        self._taken(value, sent_at)
        return True

    async def reacquire(self) -> bool:
        """The same after an outage: what this consumer judged before it is void."""
        sent_at = asyncio.get_running_loop().time()
        if self._value and await self.link.execute(b"GET", self._key) == self._value:
            # Not deleted first: to others it would look as if keys were lost once more.
            value = self._new_value()
            await self.link.execute(b"SET", self._key, value, b"PX", self._lasts_ms)
            self._taken(value, sent_at)
            return True
        self._value, self._lives_until = b"", -math.inf
        return await self.acquire()

    def _new_value(self) -> bytes:
        return b"%b#%b" % (self._name, secrets.token_hex(4).encode())

    def _taken(self, value: bytes, sent_at: float) -> None:
        self._value = value
        self.renewed = False
        self.confirmed_at = sent_at
        if not self._out_of_memory:
            self._lives_until = sent_at + self.lasts

    async def renew(self) -> bool:
        """Whether this consumer leads still, and if so for its full time again."""
        sent_at = asyncio.get_running_loop().time()
        self.vanished = False
        leader = await self.link.execute(b"GET", self._key)
        if leader is None:
            return await self.acquire()
        if leader != self._value:
            return False
        renewed = bool(await self.link.execute(b"PEXPIRE", self._key, self._lasts_ms))
        if renewed:
            self.renewed = True
            self.confirmed_at = sent_at
            self._lives_until = sent_at + self.lasts
        return renewed

    async def resign(self) -> None:
        """Lets another lead soon, if the server can be told; else leadership just expires."""
        self.confirmed_at = -math.inf
        try:
            if await self.link.execute(b"GET", self._key) == self._value:
                # Deleted, it would look as if the server had lost keys, and locks.
                resigned = b"SET", self._key, RESIGNED, b"PX", self._lasts_ms // 2
                await self.link.execute(*resigned)
                self._logger.info("this consumer recovers for the service no more")
        except RelstreamError as error:
            self._logger.debug("leadership could not be given up, and expires: %s", error)

    async def check(self) -> None:
        """Says so, once, when something else is where leadership is kept: then nobody recovers.

        For one who does not lead; looks every now and then only, however often it is called.
        """
        now = asyncio.get_running_loop().time()
        if now < self._checked + CHECK_KEY_EVERY or self._no_pttl:
            return
        self._checked = now
        (ttl,) = await self.link.pipeline(pack(b"PTTL", self._key), 1)
        if ttl == -1:
            self._checked = math.inf
            self._logger.error(
                "nobody recovers for this service: the key %r is in use for something else, or was "
                "left without a time to live; delete it",
                self._key.decode(),
            )
