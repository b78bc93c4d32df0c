"""One connection's bytes: commands out, replies in, in the order they were sent."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from relstream._core import OBJECT, Reader
from relstream.errors import ConnectionLost, DeadlineExceeded, ProtocolError, ReplyError
from relstream.net.secrets import scrubbed

try:
    import fcntl
    import termios
except ImportError:  # there are none for Windows
    _ioctl = None
else:
    _ioctl = fcntl.ioctl
    _UNSENT = termios.TIOCOUTQ

if TYPE_CHECKING:
    from collections.abc import Sequence

    Replies = asyncio.Future[list[Any]]

# Each time so many bytes have come, reading pauses for a turn of the event loop: uvloop would read
# on as long as there is anything, and those who wait for the replies would not get to run.
READ_AT_ONCE = 1 << 20
# Commands of this many bytes don't wait for more to join them: the transport must learn of them, to
# be able to say that it has enough.
JOIN_UP_TO = 64 * 1024
# When a deadline has passed, the reply may well lie in the socket: an application that blocked the
# loop made us late too. So many more looks are taken, so many seconds apart.
LOOKS = 3
CHECK_EVERY = 0.02


class _Request:
    """Replies that somebody waits for, those of one command or of a whole pipeline."""

    __slots__ = ("deadline", "decode", "future", "missing", "replies", "timeout")

    def __init__(
        self, future: Replies, missing: int, decode: int, timeout: float, deadline: float
    ) -> None:
        self.future = future
        self.missing = missing
        self.decode = decode
        self.timeout = timeout
        self.deadline = deadline
        self.replies: list[Any] = []


class RedisProtocol(asyncio.BufferedProtocol):
    """Pipelines commands over a transport and hands out their replies, first in, first out.

    On an idle connection a command is written at once; those that follow in the same turn of the
    event loop, and all while replies are awaited, leave in one write a turn.

    A caller that is cancelled just stops waiting: its replies are thrown away when they come. A
    reply that misses its deadline ends the connection, because every later reply would be taken for
    the one before it. Not thread-safe.
    """

    def __init__(self, on_push: Callable[[Any], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = Reader()
        self._on_push = on_push
        # On a subscribed connection: messages come as plain replies (RESP2) or push frames (RESP3).
        self.replies_are_pushes = False
        # The server's number for this connection (CLIENT ID); 0 where it would not tell.
        self.client_id = 0
        self.clustered = False
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Request] = deque()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._writable: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf
        self.received = 0
        """How many bytes have come."""
        self._received_at_pause = 0
        # When bytes came last while a reply was awaited, or were last seen to go out (loop time).
        self._progress_at = -math.inf
        self._written = 0
        # The place of the last byte of a large write that may be under way still, and how many
        # bytes were known to have arrived.
        self._large_write = 0
        self._arrived = 0
        # The last look after a missed deadline: which request was first, what had been received.
        self._looked: tuple[_Request | None, int] = (None, 0)
        self._looks = 0
        self._error: Exception | None = None
        # What no error may show, though the server repeats it.
        self.secrets: tuple[str, ...] = ()
        # Done when the transport is gone. To be waited for with `asyncio.wait`, or shielded.
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # --- towards the server ------------------------------------------------------------------

    def send(
        self, packed: bytes, replies: int = 1, *, decode: int = OBJECT, timeout: float
    ) -> Replies:
        """Sends packed commands; the future gives the list of their `replies` (at least 1) replies.

        Error replies are in the list, as `ReplyError`. `timeout` (seconds) is for the last reply.
        Replies come in order, so each byte of one before it, or of itself, is progress, and so is
        each byte of a large command that goes out: as long as there is some within `timeout`, the
        reply is waited for.
        The future fails with `ConnectionLost` when the connection ends before that, of which
        `DeadlineExceeded` is one kind, and with `ProtocolError` when the replies can't be read.
        """
        future: Replies = self._loop.create_future()
        if self._error is not None:
            self._fail(future)
            return future
        deadline = self._loop.time() + timeout
        idle = not self._waiting
        self._waiting.append(_Request(future, replies, decode, timeout, deadline))
        if deadline < self._timer_due:
            self._set_timer(deadline)
        if idle and not self._out and self._transport is not None:
            # Waiting for company would cost a lonely command a turn of the event loop.
            self._write(self._transport, packed)
        else:
            self.post(packed)
        return future

    def post(self, packed: bytes) -> None:
        """Sends a packed command whose answer comes as a message, if at all (PSUBSCRIBE).

        Does nothing when the connection has ended.
        """
        if self._error is not None:
            return
        self._out.append(packed)
        self._out_bytes += len(packed)
        if self._out_bytes >= JOIN_UP_TO:
            self._flush()
        elif len(self._out) == 1:
            self._loop.call_soon(self._flush)

    @property
    def last(self) -> Replies | None:
        """What the last reply that is outstanding will end; None where none is."""
        return self._waiting[-1].future if self._waiting else None

    @property
    def has_room(self) -> bool:
        """Whether `drain` has nothing to wait for."""
        return self._writable is None

    async def drain(self) -> None:
        """Waits while the server is slower in reading than we are in writing.

        Returns when the connection has ended, too: `send` will say so. It ends when the replies to
        what was sent before miss their deadlines.
        """
        while self._writable is not None:
            await asyncio.wait({self._writable})

    def _flush(self) -> None:
        out = self._out
        if not out or self._transport is None:
            return
        self._out = []
        self._out_bytes = 0
        self._write(self._transport, out[0] if len(out) == 1 else b"".join(out))

    def _write(self, transport: asyncio.Transport, data: bytes) -> None:
        if len(data) >= JOIN_UP_TO:
            if not self._large_write:
                self._arrived = self._written - self._unsent()
            self._large_write = self._written + len(data)
        self._written += len(data)
        transport.write(data)

    def _unsent(self) -> int:
        """Bytes that the other side has not acknowledged yet, as far as this system says."""
        if self._transport is None:
            return 0
        unsent = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        if _ioctl is not None and sock is not None:
            with contextlib.suppress(OSError, ValueError):  # no such question, or it is closed
                unsent += struct.unpack("i", _ioctl(sock.fileno(), _UNSENT, bytes(4)))[0]
        return unsent

    def _look_at_large_write(self, now: float) -> None:
        if self._large_write:
            arrived = self._written - self._unsent()
            if arrived > self._arrived:
                self._arrived, self._progress_at = arrived, now
            if arrived >= self._large_write:
                self._large_write = 0

    def _set_timer(self, due: float) -> None:
        # One timer for all: left alone while replies come in time, it looks anew when it fires.
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._check_deadlines)
        self._timer_due = due

    def _soonest(self) -> float:
        """When the first deadline is, or was. One late reply makes all behind it late."""
        progress = self._progress_at
        return min(max(request.deadline, progress + request.timeout) for request in self._waiting)

    def _check_deadlines(self) -> None:
        self._timer = None
        self._timer_due = math.inf
        if not self._waiting:
            return
        now = self._loop.time()
        soonest = self._soonest()
        if soonest <= now:
            self._look_at_large_write(now)
            soonest = self._soonest()
        if soonest > now:
            self._set_timer(soonest)
            return
        looking_at = (self._waiting[0], self.received)
        if looking_at != self._looked:
            self._looked = looking_at
            self._looks = 0
        elif self._looks == LOOKS:
            self.abort(DeadlineExceeded("no reply from the server in time"))
            return
        self._looks += 1
        self._set_timer(now + CHECK_EVERY)

    # --- from the server (asyncio.BufferedProtocol) --------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio.Transport, but are no subclasses.
        self._transport = cast(asyncio.Transport, transport)
        if self._error is not None:  # given up before it was there
            self._transport.abort()
        else:
            _connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        if self._error is not None:  # TLS hands over what it had already decrypted
            return bytearray(max(sizehint, 4096))
        return self._reader.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        if self._error is not None:
            return
        reader = self._reader
        reader.advance(nbytes)
        waiting = self._waiting
        try:
            while waiting:
                request = waiting[0]
                request.missing -= reader.fill(request.replies, request.missing, request.decode)
                if request.missing:
                    break
                waiting.popleft()
                if not request.future.done():
                    request.future.set_result(request.replies)
            else:
                if reader.buffered:
                    self._unasked()
            if waiting:
                self._progress_at = self._loop.time()
            else:
                self._large_write = 0
        except ProtocolError as error:
            self.abort(error)
            return
        if reader.pushes:
            self._push(reader.take_pushes())
        self.received += nbytes
        if self.received - self._received_at_pause > READ_AT_ONCE:
            self._pause_reading()

    def _unasked(self) -> None:
        """Takes what arrived while nothing is awaited: messages, or a server out of step."""
        unasked: list[Any] = []
        if self.replies_are_pushes:
            self._reader.fill(unasked, 1 << 30)
            self._push(unasked)
        elif self._reader.fill(unasked, 1):
            reply = unasked[0]
            if isinstance(reply, ReplyError):  # such as: max number of clients reached
                self.abort(ConnectionLost(f"the server ended the connection: {reply}"))
            else:
                self.abort(ProtocolError(f"a reply that nobody asked for: {reply!r:.80}"))

    def _push(self, messages: Sequence[Any]) -> None:
        if self._on_push is not None:
            for message in messages:
                self._on_push(message)

    def _pause_reading(self) -> None:
        self._received_at_pause = self.received
        if self._transport is not None and self._error is None:
            self._transport.pause_reading()
            self._loop.call_soon(self._resume_reading)

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        # Unsent commands would keep a half-closed connection open, and its callers waiting.
        self.abort(ConnectionLost("the server closed the connection"))
        return False

    def pause_writing(self) -> None:
        if self._error is None and self._writable is None:
            self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set_result(None)
        self._writable = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(ConnectionLost(str(exc) if exc else "the server closed the connection"))
        self._transport = None
        _connections.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)

    def disown(self, instead: int) -> None:
        """In a forked process: the connection is the parent's; this copy leads to `instead`."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        with contextlib.suppress(OSError):  # it is closed
            # Not closed, or the event loop, which is a copy too, would take it out of what the
            # parent waits for.
            os.dup2(instead, sock.fileno() if sock is not None else -1, inheritable=False)
        self._transport = None
        # Who waits for replies is not told, as it would go on in its parent's name.
        self._error = ConnectionLost("the connection is of the process that forked this one")
        if not self.closed.done():
            self.closed.set_result(None)

    # --- the end -------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether commands can still be sent, as far as anybody knows."""
        return self._error is None

    def close(self) -> None:
        """Ends the connection in an orderly way; what was sent still goes out.

        Who waits for a reply gets `ConnectionLost`. `closed` is done some turns later, or never
        when the server stopped reading: then `abort` helps.
        """
        self._flush()
        self._end(ConnectionLost("the connection was closed"))
        if self._transport is not None:
            self._transport.close()

    def abort(self, error: Exception | None = None) -> None:
        """Ends the connection at once; whoever waits for a reply gets `error`."""
        self._end(error or ConnectionLost("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, future: Replies) -> None:
        # A new exception for each who waits: one shared by many would collect their tracebacks.
        assert self._error is not None
        future.set_exception(type(self._error)(*self._error.args))
        # One of several futures may never be looked at, as another one's error ended the caller:
        # asyncio shall not complain of that.
        future.exception()

    def _end(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = type(error)(scrubbed(str(error), self.secrets))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._looked = (None, 0)
        self._out.clear()
        self.resume_writing()
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            if not request.future.done():
                self._fail(request.future)


# Those that are open in this process.
_connections: weakref.WeakSet[RedisProtocol] = weakref.WeakSet()


def _disown_all() -> None:
    """In a forked process: no byte goes over the parent's connections, nor is one taken from it."""
    connections = list(_connections)
    if not connections:
        return
    _connections.clear()
    ended, other = socket.socketpair()
    other.close()
    with ended:
        for connection in connections:
            connection.disown(ended.fileno())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
