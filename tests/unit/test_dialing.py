"""Names with several addresses, some of which lead nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from wire import GREETING, command, listening, until_eof

from relstream.errors import ConnectionFailed
from relstream.net.dialing import dial
from relstream.net.endpoint import Endpoint
from relstream.net.handshake import connect

NAME = "several.example"
Resolve = Callable[..., None]


@pytest.fixture
def swallowing() -> Iterator[tuple[str, int]]:
    """An address that answers no SYN: the queue of its listener is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        while True:
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()


@pytest.fixture
def refusing() -> Iterator[tuple[str, int]]:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()


@pytest.fixture
async def good() -> AsyncIterator[tuple[str, int]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await command(reader)
        writer.write(GREETING)
        await until_eof(reader)

    async with listening(serve) as port:
        yield "127.0.0.1", port


@pytest.fixture
async def resolve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resolve]:
    """Gives `NAME` these addresses. After the test no socket is left that nobody closed."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    def resolve(*addresses: tuple[str, int]) -> None:
        async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
            if host != NAME:  # uvloop asks for addresses, too
                return await real(host, port, **options)
            return [
                (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
                for address in addresses
            ]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        yield resolve
        gc.collect()


async def test_an_address_that_swallows_packets_is_passed_over(
    resolve: Resolve, swallowing: Any, refusing: Any, good: Any
) -> None:
    resolve(swallowing, refusing, swallowing, good)
    for _ in range(3):
        protocol = await connect(Endpoint(host=NAME, connect_timeout=1.0))
        assert protocol.alive
        protocol.abort()
        await protocol.closed


async def test_a_refusing_address_does_not_wait(
    resolve: Resolve, refusing: Any, good: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relstream.net.dialing.NEXT_AFTER", 60.0)
    resolve(refusing, good)
    (await asyncio.wait_for(dial(NAME, 0), 10)).close()


async def test_a_slow_address_wins_if_the_next_ones_fail(
    resolve: Resolve, refusing: Any, good: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    real = loop.sock_connect
    failed = asyncio.Event()

    async def sock_connect(sock: socket.socket, address: Any) -> None:
        if address == good:
            await failed.wait()
        try:
            await real(sock, address)
        except OSError:
            failed.set()
            raise

    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    resolve(good, refusing)
    (await asyncio.wait_for(dial(NAME, 0), 10)).close()


async def test_the_error_names_all_that_failed(resolve: Resolve, refusing: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        resolve(refusing, other.getsockname())
        with pytest.raises(ConnectionFailed, match=rf"{NAME}.*refused.*refused|{refusing[1]}"):
            await connect(Endpoint(host=NAME))


async def test_all_addresses_swallow_packets(resolve: Resolve, swallowing: Any) -> None:
    resolve(swallowing, swallowing)
    with pytest.raises(ConnectionFailed, match="no answer within"):
        await connect(Endpoint(host=NAME, connect_timeout=0.6))
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_moment(
    resolve: Resolve, swallowing: Any, good: Any, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relstream.net.dialing.NEXT_AFTER", 0.0)
    resolve(swallowing, good, good)
    dialing = asyncio.ensure_future(dial(NAME, 0))
    for _ in range(turns):
        await asyncio.sleep(0)
    dialing.cancel()
    (outcome,) = await asyncio.gather(dialing, return_exceptions=True)
    if isinstance(outcome, socket.socket):
        outcome.close()
    else:
        assert isinstance(outcome, asyncio.CancelledError)
        assert asyncio.all_tasks() == {asyncio.current_task()}
    await asyncio.sleep(0.01)


async def test_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    v6, v4 = socket.AF_INET6, socket.AF_INET
    tried = []

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        return [
            (family, socket.SOCK_STREAM, 6, "", (str(number), port))
            for number, family in enumerate([v6, v6, v6, v4, v4])
        ]

    async def refused(family: int, kind: int, proto: int, address: Any) -> None:
        tried.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("relstream.net.dialing._connect", refused)
    with pytest.raises(OSError, match="refused"):
        await dial(NAME, 1)
    assert tried == ["0", "3", "1", "4", "2"]
