"""A connection to one server that is opened again after it was lost."""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from relstream._core import OBJECT, commands, first_error, pack, scatter
from relstream.errors import (
    ConnectionFailed,
    ConnectionLost,
    RelstreamError,
    ReplyError,
    UsageError,
)
from relstream.net.endpoint import Endpoint
from relstream.net.handshake import CLOSE_TIMEOUT, _cancel, connect
from relstream.net.protocol import RedisProtocol
from relstream.net.replies import leads_elsewhere, raise_first, useless
from relstream.tasks import consume_exception

if TYPE_CHECKING:
    pass


def _run_id(info: object) -> bytes | None:
    found = re.search(rb"run_id:(\w+)", info) if isinstance(info, bytes) else None
    return found[1] if found else None


class _Attempt:
    """An opening of a connection, and how many callers wait for it."""

    __slots__ = ("callers", "task")

    def __init__(self, task: asyncio.Task[RedisProtocol]) -> None:
        self.task = task
        self.callers = 0


class MovingMaster(Protocol):
    """Knows where a master is that may be replaced."""

    def join(self, link: Connection) -> None: ...
    async def refresh_if_stale(self) -> None: ...
    async def locate(self) -> tuple[str, int]: ...
    def found(self, address: tuple[str, int], run_id: bytes | None) -> None: ...


class SharedAddress:
    """The links of one event loop to one address, behind which another server may come to be.

    What one of them learns of that holds for all: who only reads would never be told.
    """

    def __init__(self) -> None:
        self._links: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.replaced = asyncio.Event()
        """Set when the server was no master any more; whoever waits for that clears it."""

    def join(self, link: Connection) -> None:
        """This one is to leave a server that is no master any more."""
        self._links.add(link)

    def leave(self) -> None:
        """The server is no master any more."""
        self.replaced.set()
        for link in list(self._links):
            link.reopen(ConnectionLost(f"{link.endpoint} is no master any more"))


class Connection:
    """A connection to one server that is opened anew when it was lost.

    It is opened by whoever needs it; nothing runs in between. Callers who come while it is being
    opened share the attempt, and its error.

    A server that says READONLY is no master any more: the connection is closed, the name resolved
    anew, and what the server has refused is sent once more. With `master` each opening asks where
    the master is; links that share an `address` leave it together.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        on_push: Callable[[Any], None] | None = None,
        master: MovingMaster | None = None,
        address: SharedAddress | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._on_push = on_push
        self._master = master
        if master is not None:
            master.join(self)
        self._address = address
        if address is not None:
            address.join(self)
        self._protocol: RedisProtocol | None = None
        self._attempt: _Attempt | None = None
        self._process: int | None = None
        self._closed = False
        self.attempted = False
        """Whether it was opened before, or could not be."""
        self._generation = 0

    @property
    def alive(self) -> bool:
        """Whether the connection is open as far as anybody knows."""
        return self._protocol is not None and self._protocol.alive

    @property
    def generation(self) -> int:
        """How often it was opened: what was learnt before the last time may be true no more."""
        return self._generation

    @property
    def waiting(self) -> list[tuple[Endpoint, RedisProtocol]]:
        """The connection and its server, if replies are outstanding."""
        protocol = self._protocol
        if protocol is None or not protocol.alive or protocol.last is None:
            return []
        return [(self.endpoint, protocol)]

    async def get(self, patience: float | None = None) -> RedisProtocol:
        """The living connection; opens one if need be, and raises as `connect` does.

        Waits for that `patience` seconds at most, if given; the attempt goes on. Raises
        `ConnectionLost` after `close`.
        """
        while True:
            protocol = self._protocol
            if protocol is not None and protocol.alive:
                return protocol
            if self._closed:
                raise ConnectionLost("the connection was closed")
            attempt = self._attempt
            if attempt is None:
                attempt = self._attempt = _Attempt(asyncio.ensure_future(self._open()))
                attempt.task.add_done_callback(consume_exception)
            attempt.callers += 1
            try:
                if not (await asyncio.wait({attempt.task}, timeout=patience))[0]:
                    raise ConnectionFailed(f"{self.endpoint} does not answer")
            except asyncio.CancelledError:
                if attempt.callers == 1:  # nobody else waits
                    if attempt is self._attempt:
                        self._attempt = None
                    await _cancel(attempt.task)
                raise
            finally:
                attempt.callers -= 1
            if not attempt.task.cancelled():  # else by `close`, or by `disconnect_unless`
                return attempt.task.result()

    async def _open(self) -> RedisProtocol:
        try:
            if self._process not in (None, os.getpid()):
                raise UsageError(f"{self.endpoint} was opened by process {self._process}")
            self._process = os.getpid()
            master = self._master
            if master is not None:
                host, port = await master.locate()
                self.endpoint = replace(self.endpoint, host=host, port=port)
            protocol = await connect(self.endpoint, self._on_push)
            if master is not None:
                try:
                    run_id = await self._check_master(protocol)
                except BaseException:  # cancelled, say
                    protocol.abort()
                    raise
                master.found((host, port), run_id)
            self._protocol = protocol
            self._generation += 1
            return protocol
        finally:
            self.attempted = True
            if self._attempt is not None and self._attempt.task is asyncio.current_task():
                self._attempt = None

    def disconnect_unless(self, address: tuple[str, int]) -> None:
        """The master is there now: a connection to another server is of no use any more."""
        if (self.endpoint.host, self.endpoint.port) == address:
            return
        self.reopen(ConnectionLost(f"{self.endpoint} is no master any more"))

    def reopen(self, error: ConnectionLost) -> None:
        """Gives the connection up: callers that wait for replies get `error`, others a new one."""
        if self._protocol is not None:
            self._protocol.abort(error)
        if self._attempt is not None:
            self._attempt.task.cancel()
            self._attempt = None

    async def _check_master(self, protocol: RedisProtocol) -> bytes | None:
        """A Sentinel may name a master of yesterday: it has to say itself that it is one (ROLE).

        Returns its `run_id`.
        """
        role, info = await protocol.send(
            pack(b"ROLE") + pack(b"INFO", b"server"), 2, timeout=self.endpoint.timeout
        )
        if isinstance(role, list) and role[0] != b"master":
            raise ConnectionFailed(f"{self.endpoint} is no master yet, or no more")
        return _run_id(info)

    async def run_id(self) -> bytes | None:
        """What tells the server from any other, and from itself before a restart (INFO).

        None where it does not say.
        """
        return _run_id((await self.pipeline(pack(b"INFO", b"server"), 1))[0])

    async def pipeline(
        self,
        packed: bytes,
        replies: int,
        *,
        decode: int = OBJECT,
        timeout: float | None = None,
        patience: float | None = None,
    ) -> list[Any]:
        """Sends packed commands and returns their replies, errors among them as values.

        `timeout` (seconds) is for the last reply, from when the commands are sent: before that, a
        connection may have to be opened, for which `patience` is as in `get`, or what was sent
        earlier to be read by the server. Raises what `get` and `RedisProtocol.send` raise. Nothing
        is ever sent twice but what a server refused that is no master any more.
        """
        if not replies:
            return []
        if self._master is not None and self.alive:
            await self._master.refresh_if_stale()
        protocol = self._protocol
        if protocol is None or not protocol.alive:
            protocol = await self.get(patience)
        await protocol.drain()
        received = await protocol.send(
            packed, replies, decode=decode, timeout=timeout or self.endpoint.timeout
        )
        if first_error(received) is not None:
            await self._send_elsewhere(protocol, packed, received, decode, timeout, patience)
        return received

    async def _send_elsewhere(
        self,
        protocol: RedisProtocol,
        packed: bytes,
        received: list[Any],
        decode: int,
        timeout: float | None,
        patience: float | None,
    ) -> None:
        """Sends what this connection can't be used for over another one, once."""
        places = [place for place, reply in enumerate(received) if useless(reply)]
        if not places:
            return
        self._leave(protocol, received[places[0]])
        try:
            another = await self.get(patience)
        except RelstreamError:  # the replies say that nothing was done
            return
        parts = commands(packed)
        again = await another.send(
            b"".join([parts[place] for place in places]),
            len(places),
            decode=decode,
            timeout=timeout or self.endpoint.timeout,
        )
        scatter(received, places, again)
        if any(map(useless, again)):  # the name leads there still: others need not leave once more
            another.abort(ConnectionLost(f"{self.endpoint} is no master"))

    def _leave(self, protocol: RedisProtocol, why: ReplyError) -> None:
        """Nobody uses this connection any more; unless that is so already."""
        if protocol is not self._protocol or not protocol.alive:
            return
        if not leads_elsewhere(why):
            protocol.abort(ConnectionLost(f"{self.endpoint}: {why}"))
            return
        if self._address is not None:
            self._address.leave()
        protocol.abort(ConnectionLost(f"{self.endpoint} is no master any more"))

    def send(
        self, packed: bytes, replies: int, *, decode: int = OBJECT, timeout: float | None = None
    ) -> asyncio.Future[list[Any]] | None:
        """Sends at once, and returns the future of what `pipeline` would, which costs no task.

        None where something has to be waited for: a connection, or the server to read on.
        """
        protocol = self._protocol
        if protocol is None or not protocol.alive or not protocol.has_room or self._master:
            return None
        return protocol.send(
            packed, replies, decode=decode, timeout=timeout or self.endpoint.timeout
        )

    async def execute(
        self, *args: bytes | str | int, decode: int = OBJECT, timeout: float | None = None
    ) -> Any:
        """Sends one command and returns its reply; raises an error reply, else as `pipeline`."""
        replies = await self.pipeline(pack(*args), 1, decode=decode, timeout=timeout)
        return raise_first(replies)[0]

    async def close(self) -> None:
        """Closes the connection, waits until it is closed, and opens none any more.

        Whoever waits for it gets `ConnectionLost`.
        """
        self._closed = True
        if self._attempt is not None:
            await _cancel(self._attempt.task)
        protocol = self._protocol
        if protocol is None or protocol.closed.done():
            return
        protocol.close()
        try:
            await asyncio.wait({protocol.closed}, timeout=CLOSE_TIMEOUT)
        finally:
            if not protocol.closed.done():
                protocol.abort()
                await asyncio.wait({protocol.closed})
