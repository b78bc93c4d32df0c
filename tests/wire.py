"""Servers that misbehave: a proxy in front of a good one, and such as are made of a function."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# What a server that is new enough answers to HELLO 3.
GREETING = b"%2\r\n$7\r\nversion\r\n$5\r\n7.2.0\r\n$2\r\nid\r\n:7\r\n"


async def command(reader: asyncio.StreamReader) -> list[bytes]:
    """The next command that a client sends."""
    count = int((await reader.readuntil(b"\r\n"))[1:])
    arguments = []
    for _ in range(count):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        arguments.append((await reader.readexactly(size + 2))[:-2])
    return arguments


@contextlib.asynccontextmanager
async def listening(serve: Serve, *, narrow: bool = False) -> AsyncIterator[int]:
    """Runs `serve(reader, writer)` for each connection, on a port of 127.0.0.1 that is given."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            # The client may go at any time. Cancelled is what still runs when the test is over.
            with contextlib.suppress(
                ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
            ):
                await serve(reader, writer)
        finally:
            writer.transport.abort()
            tasks.discard(task)

    sock = socket.create_server(("127.0.0.1", 0))
    if narrow:  # so that the client's own system has to keep what did not get through
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    server = await asyncio.start_server(run, sock=sock)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        while tasks:
            await asyncio.wait(tasks)


async def until_eof(reader: asyncio.StreamReader) -> None:
    while await reader.read(65536):
        pass


class Proxy:
    """Stands between clients and a server's TCP port, and does to their bytes what it is told.

    `async with Proxy(port) as proxy` listens on `proxy.port`. The settings hold for bytes that come
    from then on, in both directions and on all connections.
    """

    def __init__(
        self, server_port: int, host: str = "127.0.0.1", *, rate: float = math.inf
    ) -> None:
        self._host = host
        self.server_port = server_port
        """Where new connections lead."""
        self._open = asyncio.Event()
        self._open.set()
        self._heard = asyncio.Event()
        self._heard.set()
        self._there = asyncio.Event()
        self._there.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._stack = contextlib.AsyncExitStack()
        self.port = 0
        self.connections = 0
        """How many there were so far."""
        self.refusing = False
        """New connections are cut at once."""
        self.delay = 0.0
        """Seconds that every piece is under way."""
        self.piece = 65536
        """Bytes that are passed on at a time: 1 makes them trickle."""
        self.rate = rate
        """Bytes a second that each connection passes on in each direction."""
        self.cut_at = b""
        """The connection over which a client sends this is cut; once."""
        self.garble = b""
        """A piece in which the server says this arrives as something else; once."""
        self.swap: tuple[bytes, bytes] | None = None
        """The first of these arrives as the second, in either direction."""

    def stall(self) -> None:
        """Passes nothing on, and reads nothing, until `resume`: all buffers fill up."""
        self._open.clear()

    def mute(self) -> None:
        """Passes nothing on that the server says, until `resume`."""
        self._heard.clear()

    def lose(self) -> None:
        """The way is gone, and nobody is told: as if there were no server any more.

        Nothing comes through until `resume`, and then over new connections only.
        """
        self._there.clear()

    def resume(self) -> None:
        self._open.set()
        self._heard.set()
        if not self._there.is_set():
            self._there = asyncio.Event()
            self._there.set()

    def cut(self) -> None:
        """Ends all connections, with what is under way."""
        for writer in self._writers:
            writer.transport.abort()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Proxy:
        self.port = await self._stack.enter_async_context(
            listening(self._serve, narrow=self.rate < math.inf)
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cut()
        await self._stack.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            return
        there, beyond = await asyncio.open_connection(self._host, self.server_port)
        self._writers |= {writer, beyond}
        pumps = [
            asyncio.ensure_future(self._pump(reader, beyond, self._open, self._there)),
            asyncio.ensure_future(self._pump(there, writer, self._heard, self._there)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beyond.transport.abort()  # first: this may be cancelled while it waits
            self._writers -= {writer, beyond}
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *gates: asyncio.Event
    ) -> None:
        loop = asyncio.get_running_loop()
        due = 0.0
        while True:
            await self._open.wait()
            data = await reader.read(self.piece)
            if not data:
                return
            if self.cut_at and self.cut_at in data:
                self.cut_at = b""
                return
            if self.swap is not None:
                data = data.replace(*self.swap)
            if self.garble and self.garble in data:
                self.garble, data = b"", b"garbage\r\n"
            if self.delay or due > loop.time():
                # A long way, not a narrow one: what follows need not wait until this has arrived.
                due = max(due, loop.time() + self.delay)
                loop.call_at(due, writer.write, data)
                continue
            await self._open.wait()
            for gate in gates:
                await gate.wait()
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(len(data) / self.rate)
