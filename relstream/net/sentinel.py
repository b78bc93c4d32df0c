"""The master that Sentinels name, which may be another one at any time.

https://redis.io/docs/latest/develop/reference/sentinel-clients/
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
import weakref
from collections import Counter

from relstream._core import jittered
from relstream.errors import ConnectionFailed, ProtocolError, RelstreamError, ReplyError
from relstream.net.connection import Connection
from relstream.net.discovery import ASK_NEXT, POLL_EVERY, all_failed, query
from relstream.net.endpoint import Endpoint, Remap
from relstream.tasks import cancel_and_wait

# Seconds for which another name of the same server is believed to be that: it may lead elsewhere.
ALIAS_FOR = 10.0


class SentinelMaster:
    """The master of today, as Sentinels name it. Belongs to one event loop."""

    def __init__(
        self,
        common: Endpoint,
        sentinels: tuple[Endpoint, ...],
        name: str,
        remap: Remap | None = None,
    ) -> None:
        self._common = common
        self._sentinels = sentinels
        self._name = name
        self._remap = remap
        self._links: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._address: tuple[str, int] | None = None
        self._run_id: bytes | None = None
        # Other names of the same server, as some Sentinels have it, and when that was seen.
        self._aliases: dict[tuple[str, int], float] = {}
        self._watched = False
        self._looked = 0.0
        self.replaced = asyncio.Event()
        """Set when another server became the master; whoever waits for that clears it."""

    @property
    def masters(self) -> list[tuple[str, int]]:
        """Where the master is, as far as is known."""
        return [self._address] if self._address is not None else []

    def join(self, link: Connection) -> None:
        """This one is to leave a master that was replaced."""
        self._links.add(link)

    async def locate(self) -> tuple[str, int]:
        """Where the master is, as most Sentinels have it that do not keep silent.

        If none can be reached it may be where it was: it is asked itself whether it is the master.
        """
        self._looked = time.monotonic()  # nobody else asks meanwhile
        sentinels = self._sentinels
        votes: Counter[tuple[str, int]] = Counter()
        problems: list[RelstreamError] = []
        asking = {asyncio.ensure_future(self._ask(sentinel)) for sentinel in sentinels}
        try:
            while asking and 2 * max(votes.values(), default=0) <= len(sentinels):
                done, asking = await asyncio.wait(
                    asking,
                    timeout=ASK_NEXT if votes else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    break
                for asked in done:
                    error = asked.exception()
                    if error is None:
                        votes[asked.result()] += 1
                    elif isinstance(error, RelstreamError):
                        problems.append(error)
                    else:
                        raise error
        finally:
            await cancel_and_wait(asking)
            self._looked = time.monotonic()  # it may have taken long
        if votes:
            # In a tie it is where it was: going to and fro would be worse than either.
            return max(votes, key=lambda address: (votes[address], address == self._address))
        if self._address is not None:
            return self._address
        raise all_failed("no Sentinel says where the master is", problems)

    async def _ask(self, sentinel: Endpoint) -> tuple[str, int]:
        name = self._name
        try:
            address = await query(sentinel, b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name)
        except ReplyError as error:
            raise ReplyError(f"{error} (Sentinel {sentinel})") from None
        if address is None:
            raise ConnectionFailed(f"Sentinel {sentinel} knows no master {name!r}")
        try:
            named = address[0].decode(), int(address[1])
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            what = f"Sentinel {sentinel} says of the master {name!r}: {address!r:.100}"
            raise ProtocolError(what) from error
        return self._remap(named) if self._remap else named

    def found(self, address: tuple[str, int], run_id: bytes | None) -> None:
        """The server there says that it is a master: links to another one leave it.

        That may be paused, or cut off from its replicas and Sentinels alone, and go on for long.
        `run_id` tells another server from another name of the same one.
        """
        if address != self._address:
            if run_id is not None and run_id == self._run_id:
                self._aliases[address] = time.monotonic()
                return
            if self._address is not None:
                self.replaced.set()
            self._address = address
            self._aliases.clear()
            for link in list(self._links):
                link.disconnect_unless(address)
        self._run_id = run_id

    async def run(self) -> None:
        """Asks for the master of today every now and then, until cancelled."""
        self._watched = True
        while True:
            await asyncio.sleep(jittered(POLL_EVERY, 0.2, random.random()))
            await self.look()

    async def refresh_if_stale(self) -> None:
        """Before something is sent: asks for the master of today, unless somebody else does."""
        if not self._watched and time.monotonic() - self._looked > POLL_EVERY:
            await self.look()

    async def look(self) -> None:
        """Asks for the master of today, and turns to it if it is another one."""
        with contextlib.suppress(RelstreamError):  # nobody says so, or it is none yet
            located = await self.locate()
            known_at = self._aliases.get(located, -math.inf)
            if located != self._address and time.monotonic() - known_at > ALIAS_FOR:
                probe = Connection(self._common.named("sentinel"), master=self)
                try:
                    await probe.get()
                finally:
                    await probe.close()
