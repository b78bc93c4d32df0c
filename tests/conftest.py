from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
import pytest_asyncio
import redis
import uvloop
from helpers import connections_left, forget_settings

from relstream.server import Binary, Server, ServerNotFound, find_binary

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
BINARY = pytest.StashKey[Binary]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("relstream")
    group.addoption(
        "--server", metavar="NAME", help="server to test against, such as redis-7.0 or valkey-8.1"
    )
    group.addoption("--loop", choices=sorted(LOOPS), default="uvloop", help="event loop to test on")


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[BINARY] = find_binary(config.getoption("--server"))
    except ServerNotFound as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> str:
    return f"server: {config.stash[BINARY].name}, event loop: {config.getoption('--loop')}"


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    name = config.getoption("--loop")
    return {name: LOOPS[name]}


@pytest.fixture(scope="session")
def binary(pytestconfig: pytest.Config) -> Binary:
    """What `--server` chose."""
    return pytestconfig.stash[BINARY]


@pytest.fixture(scope="session")
def server(binary: Binary) -> Iterator[Server]:
    """Shared by all tests: those that stop it, or change it for good, want `make_server`."""
    with Server(binary=binary) as server:
        yield server


@pytest.fixture
def redis_url(server: Server) -> Iterator[str]:
    """The shared server, without data, scripts, users and settings of earlier tests."""
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()
        forget_settings(admin)
        yield server.url
        assert not (left := connections_left([admin])), f"connections left behind: {left}"


@pytest.fixture
def redis_sync(redis_url: str) -> Iterator[redis.Redis]:
    """To look at the shared server's state, and to change it."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def make_server(binary: Binary) -> Iterator[Callable[..., Server]]:
    """Starts servers with the options of `Server`, for this test alone."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Server:
            return stack.enter_context(Server(**{"binary": binary} | options))

        yield make


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if pytest_asyncio.is_async_test(request.node):
        request.getfixturevalue("no_task_left_behind")
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("relstream")]
    assert not left, f"threads left behind: {left}"


@pytest.fixture
async def no_task_left_behind() -> AsyncIterator[None]:
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
