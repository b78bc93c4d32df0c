from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest

from relstream._core import ENTRIES, pack
from relstream.errors import ConnectionLost, DeadlineExceeded, ProtocolError, ReplyError
from relstream.net import protocol as module
from relstream.net.protocol import RedisProtocol

PING = pack("PING")
PONG = b"+PONG\r\n"
MESSAGE = b">2\r\n+message\r\n+hello\r\n"


class Wire:
    """A transport without a socket: it shows what was done to it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.reading = True
        self.aborted = False
        self.closed = False
        self.high_water: int | None = None
        self.unsent = 0
        self.protocol: RedisProtocol

    def write(self, data: bytes) -> None:
        assert not self.is_closing()
        self.writes.append(data)
        if self.high_water is not None and sum(map(len, self.writes)) > self.high_water:
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> None:
        return None

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def arrive(self, data: bytes) -> None:
        """The server's bytes, as a transport hands them over."""
        while data:
            buffer = self.protocol.get_buffer(-1)
            size = min(len(buffer), len(data))
            buffer[:size] = data[:size]
            self.protocol.buffer_updated(size)
            data = data[size:]


@pytest.fixture
async def make() -> Callable[..., tuple[RedisProtocol, Wire]]:
    def make(**options: Any) -> tuple[RedisProtocol, Wire]:
        protocol, wire = RedisProtocol(**options), Wire()
        wire.protocol = protocol
        protocol.connection_made(wire)
        return protocol, wire

    return make


@pytest.fixture
async def complaints() -> list[dict[str, Any]]:
    """What the event loop would have logged as nobody else cared for it."""
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    return said


async def a_turn() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


# --- towards the server ---------------------------------------------------------------------------


async def test_a_lonely_command_is_written_at_once(make):
    protocol, wire = make()
    protocol.send(PING, timeout=5)
    assert wire.writes == [PING]
    await a_turn()
    assert wire.writes == [PING]


async def test_commands_of_one_turn_share_a_write(make):
    protocol, wire = make()
    for n in range(100):
        protocol.send(pack("ECHO", n), timeout=5)
    protocol.post(pack("ECHO", "posted"))
    await a_turn()
    assert wire.writes[0] == pack("ECHO", 0)  # the connection was idle
    assert wire.writes[1:] == [
        b"".join(pack("ECHO", n) for n in range(1, 100)) + pack("ECHO", "posted")
    ]
    # Now replies are awaited: nothing is gained by writing early.
    protocol.send(PING, timeout=5)
    protocol.send(PING, timeout=5)
    assert len(wire.writes) == 2
    await a_turn()
    assert wire.writes[2:] == [PING + PING]


async def test_order_is_kept_when_a_command_is_sent_after_a_posted_one(make):
    protocol, wire = make()
    protocol.post(pack("PSUBSCRIBE", "*"))
    protocol.send(PING, timeout=5)
    await a_turn()
    assert b"".join(wire.writes) == pack("PSUBSCRIBE", "*") + PING


async def test_a_full_transport_stops_callers_in_the_same_turn(make):
    protocol, wire = make()
    wire.high_water = module.JOIN_UP_TO
    large = pack("SET", "k", bytes(20_000))

    async def caller() -> None:
        await protocol.drain()
        await protocol.send(large, timeout=5)

    callers = [asyncio.ensure_future(caller()) for _ in range(100)]
    await a_turn()
    sent = sum(map(len, wire.writes))
    assert sent < 3 * module.JOIN_UP_TO, "commands were piled up in front of a full transport"
    wire.high_water = None
    protocol.resume_writing()
    await a_turn()
    await a_turn()
    assert sum(map(len, wire.writes)) == 100 * len(large)
    wire.arrive(b"+OK\r\n" * 100)
    await asyncio.gather(*callers)


@pytest.mark.parametrize("how", ["resumed", "aborted", "lost"])
async def test_drain_ends(make, how):
    protocol, _ = make()
    await protocol.drain()  # nothing to wait for
    protocol.pause_writing()
    waiting = [asyncio.ensure_future(protocol.drain()) for _ in range(3)]
    await a_turn()
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()  # must not wake, or break, the others
    await a_turn()
    assert not waiting[1].done()
    if how == "resumed":
        protocol.resume_writing()
    elif how == "aborted":
        protocol.abort()
    else:
        protocol.connection_lost(None)
    await asyncio.gather(*waiting[1:])


# --- from the server ------------------------------------------------------------------------------


async def test_replies_go_to_those_who_asked_wherever_they_are_cut(make):
    stream = b"+a\r\n" + b":1\r\n-OOM no room\r\n$2\r\nhi\r\n" + MESSAGE + b"*2\r\n_\r\n#t\r\n"
    for cut in range(1, len(stream)):
        heard: list[Any] = []
        protocol, wire = make(on_push=heard.append)
        first = protocol.send(PING, timeout=5)
        second = protocol.send(PING * 3, 3, timeout=5)
        third = protocol.send(PING, timeout=5)
        wire.arrive(stream[:cut])
        wire.arrive(stream[cut:])
        assert await first == [b"a"]
        one, error, two = await second
        assert (one, two) == (1, b"hi")
        assert isinstance(error, ReplyError)
        assert error.code == "OOM"
        assert await third == [[None, True]]
        assert heard == [[b"message", b"hello"]]
        assert protocol.alive


async def test_each_pipeline_has_its_own_decoding(make):
    protocol, wire = make()
    plain = protocol.send(PING, timeout=5)
    entries = protocol.send(PING, decode=ENTRIES, timeout=5)
    reply = b"*1\r\n*2\r\n$3\r\n1-1\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n"
    wire.arrive(reply * 2)
    assert await plain == [[[b"1-1", [b"f", b"v"]]]]
    ((entry,),) = await entries
    assert entry == (b"1-1", {b"f": b"v"})


async def test_the_reply_to_a_cancelled_caller_is_thrown_away(make):
    protocol, wire = make()
    cancelled = protocol.send(PING * 2, 2, timeout=5)
    kept = protocol.send(PING, timeout=5)
    wire.arrive(b"+one\r\n+tw")
    cancelled.cancel()
    wire.arrive(b"o\r\n+three\r\n")
    assert await kept == [b"three"]
    assert protocol.alive


async def test_messages_that_come_as_replies(make):
    heard: list[Any] = []
    protocol, wire = make(on_push=heard.append)
    reply = protocol.send(PING, timeout=5)
    protocol.replies_are_pushes = True
    wire.arrive(PONG + b"*1\r\n+message\r\n-NOPERM no\r\n*1\r\n+hal")
    assert await reply == [b"PONG"]
    assert heard[0] == [b"message"]
    assert isinstance(heard[1], ReplyError)
    wire.arrive(b"f\r\n")
    assert heard[2] == [b"half"]
    assert protocol.alive


async def test_messages_nobody_listens_to_are_dropped(make):
    protocol, wire = make()
    wire.arrive(MESSAGE)
    reply = protocol.send(PING, timeout=5)
    wire.arrive(MESSAGE + PONG + MESSAGE)
    assert await reply == [b"PONG"]
    assert protocol.alive


async def test_a_reply_nobody_asked_for_ends_the_connection(make):
    protocol, wire = make()
    asked = protocol.send(PING, timeout=5)
    wire.arrive(PONG + b"+surplus\r\n")
    assert await asked == [b"PONG"]
    assert wire.aborted
    assert not protocol.alive
    with pytest.raises(ProtocolError, match="surplus"):
        await protocol.send(PING, timeout=5)


async def test_an_error_nobody_asked_for_says_why_the_connection_ends(make):
    protocol, wire = make()
    wire.arrive(b"-ERR max number of clients reached\r\n")
    assert wire.aborted
    with pytest.raises(ConnectionLost, match="max number of clients reached"):
        await protocol.send(PING, timeout=5)


async def test_garbage_fails_all_who_wait(make):
    protocol, wire = make()
    waiting = [protocol.send(PING, timeout=5) for _ in range(3)]
    wire.arrive(PONG + b"HTTP/1.1 400 Bad Request\r\n")
    assert await waiting[0] == [b"PONG"]
    for future in waiting[1:]:
        with pytest.raises(ProtocolError):
            await future
    assert wire.aborted
    wire.arrive(b"more of it")  # TLS may still have some


async def test_what_arrives_after_the_end_is_of_no_interest(make, complaints):
    heard: list[Any] = []
    protocol, wire = make(on_push=heard.append)
    reply = protocol.send(PING, timeout=5)
    protocol.close()
    wire.arrive(PONG + MESSAGE)
    with pytest.raises(ConnectionLost):
        await reply
    assert not wire.aborted
    assert (heard, complaints) == ([], [])


async def test_reading_pauses_for_a_turn_after_much_data(make):
    protocol, wire = make()
    reply = protocol.send(PING, timeout=5)
    wire.arrive(b"$%d\r\n" % (3 << 20))
    wire.arrive(bytes(1 << 19))
    assert wire.reading
    wire.arrive(bytes(1 << 20))
    assert not wire.reading
    await a_turn()
    assert wire.reading
    wire.arrive(bytes((3 << 20) - (3 << 19)) + b"\r\n")
    assert len((await reply)[0]) == 3 << 20


async def test_reading_does_not_resume_on_a_closed_connection(make):
    protocol, wire = make()
    reply = protocol.send(PING, timeout=5)
    wire.arrive(b"$2000000\r\n" + bytes(1 << 20))
    assert not wire.reading
    protocol.close()
    await a_turn()
    assert not wire.reading
    assert reply.done()


# --- deadlines ------------------------------------------------------------------------------------


async def test_a_late_reply_ends_the_connection(make):
    protocol, wire = make()
    late = protocol.send(PING, timeout=0.05)
    behind = protocol.send(PING, timeout=60)
    with pytest.raises(DeadlineExceeded):
        await late
    with pytest.raises(DeadlineExceeded):
        await behind
    assert wire.aborted
    assert not protocol.alive


async def test_a_sooner_deadline_behind_a_later_one_counts(make):
    protocol, wire = make()
    patient = protocol.send(PING, timeout=60)
    hasty = protocol.send(PING, timeout=0.05)
    with pytest.raises(DeadlineExceeded):
        await hasty
    with pytest.raises(DeadlineExceeded):
        await patient
    assert wire.aborted


async def test_replies_in_time_keep_the_connection(make):
    protocol, wire = make()
    for _ in range(4):
        reply = protocol.send(PING, timeout=0.1)
        await asyncio.sleep(0.05)
        wire.arrive(PONG)
        await reply
    await asyncio.sleep(0.2)  # idle past every deadline
    assert protocol.alive


async def test_a_cancelled_caller_does_not_lift_its_deadline(make):
    # Its reply is still owed: a server that is silent must be found out.
    protocol, wire = make()
    protocol.send(PING, timeout=0.05).cancel()
    await asyncio.wait_for(asyncio.shield(fails(protocol.send(PING, timeout=60))), 5)
    assert wire.aborted


async def fails(future: asyncio.Future[Any]) -> None:
    with pytest.raises(DeadlineExceeded):
        await future


async def test_being_late_ourselves_is_no_missed_deadline(make):
    protocol, wire = make()
    loop = asyncio.get_running_loop()
    reply = protocol.send(PING, timeout=0.05)
    await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251
    # The loop finds the deadline passed before it gets round to reading.
    loop.call_later(0, wire.arrive, PONG)
    assert await reply == [b"PONG"]
    assert protocol.alive


async def test_a_reply_is_waited_for_as_long_as_bytes_come(make):
    protocol, wire = make()
    reply = protocol.send(PING, timeout=0.2)
    behind = protocol.send(PING, timeout=0.1)
    wire.arrive(b"$20\r\n")
    for _ in range(20):
        await asyncio.sleep(0.03)
        wire.arrive(b"x")
    assert not reply.done()
    wire.arrive(b"\r\n")
    assert await reply == [b"x" * 20]
    wire.arrive(PONG)
    assert await behind == [b"PONG"]
    assert protocol.alive


async def test_a_reply_that_stops_halfway_misses_its_deadline(make):
    protocol, wire = make()
    loop = asyncio.get_running_loop()
    reply = protocol.send(PING, timeout=0.2)
    await asyncio.sleep(0.1)
    wire.arrive(b"$20\r\nx")
    stopped_at = loop.time()
    with pytest.raises(DeadlineExceeded):
        await reply
    assert loop.time() - stopped_at >= 0.2
    assert wire.aborted


async def test_bytes_before_a_command_was_sent_do_not_prolong_its_deadline(make):
    protocol, wire = make()
    first = protocol.send(PING, timeout=60)
    late = protocol.send(PING, timeout=0.1)
    wire.arrive(PONG)
    await first
    await asyncio.wait_for(asyncio.shield(fails(late)), 5)
    assert wire.aborted


async def test_a_large_command_that_goes_out_slowly_is_waited_for(make):
    protocol, wire = make()
    large = pack("SET", "k", bytes(module.JOIN_UP_TO))
    reply = protocol.send(large, timeout=0.1)
    for left in range(10):
        wire.unsent = len(large) - 1000 * left
        await asyncio.sleep(0.06)
    assert not reply.done()
    stalled = wire.unsent
    with pytest.raises(DeadlineExceeded):
        await reply
    assert wire.unsent == stalled
    assert wire.aborted


async def test_no_timer_survives_the_connection(make, monkeypatch):
    protocol, _ = make()
    fired = []
    monkeypatch.setattr(RedisProtocol, "_check_deadlines", lambda self: fired.append(self))
    protocol.send(PING, timeout=0.02)
    protocol.abort()
    await asyncio.sleep(0.06)
    assert not fired


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "closed", "end of file"])
async def test_a_lost_connection_fails_all_who_wait(make, complaints, how):
    protocol, wire = make()
    done = protocol.send(PING, timeout=5)
    halfway = protocol.send(PING * 2, 2, timeout=5)
    behind = protocol.send(PING, timeout=5)
    wire.arrive(PONG + PONG + b"+PO")
    if how == "end of file":
        protocol.eof_received()
        assert wire.aborted
    protocol.connection_lost(OSError("reset") if how == "reset" else None)
    assert await done == [b"PONG"]
    assert protocol.closed.done()
    errors = [future.exception() for future in (halfway, behind)]
    assert all(type(error) is ConnectionLost for error in errors)
    assert errors[0] is not errors[1]
    assert ("reset" in str(errors[0])) == (how == "reset")
    assert not complaints


async def test_errors_nobody_waited_for_make_no_noise(make, complaints):
    protocol, _ = make()
    forgotten = [protocol.send(PING, timeout=5) for _ in range(3)]
    protocol.connection_lost(None)
    forgotten.append(protocol.send(PING, timeout=5))
    await a_turn()
    forgotten.clear()
    gc.collect()
    await a_turn()
    assert not complaints


async def test_close_still_sends_what_was_given_to_it(make):
    protocol, wire = make()
    first = protocol.send(PING, timeout=5)
    second = protocol.send(pack("ECHO", "x"), timeout=5)
    protocol.close()
    assert b"".join(wire.writes) == PING + pack("ECHO", "x")
    assert wire.closed
    for future in (first, second):
        with pytest.raises(ConnectionLost, match="the connection was closed"):
            await future


async def test_an_ended_connection_takes_nothing_more(make):
    protocol, wire = make()
    protocol.abort()
    protocol.post(PING)
    with pytest.raises(ConnectionLost):
        await protocol.send(PING, timeout=5)
    await a_turn()
    assert not wire.writes
    protocol.close()  # once more does no harm
    protocol.abort()


async def test_given_up_before_it_was_connected():
    protocol, wire = RedisProtocol(), Wire()
    protocol.abort()
    protocol.connection_made(wire)
    assert wire.aborted
