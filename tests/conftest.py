from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import pytest_asyncio
import redis
import uvloop
from cluster.observing import ClusterService, EveryMaster
from helpers import Service, connections_left, forget_settings

from relstream.testing import Cluster, Node, Sentinels
from relstream.testing.server import Binary, Server, ServerNotFound, find_binary

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
BINARY = pytest.StashKey[Binary]()
# Of a test that uses one of these fixtures, or none of the deployment's, there is one kind.
SINGLE = {"server", "make_server", "proxy"}
# Long enough that a slow machine is no dead master, in seconds, where no test wants one.
PATIENCE = 15.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("relstream")
    group.addoption(
        "--server", metavar="NAME", help="server to test against, such as redis-7.0 or valkey-8.1"
    )
    group.addoption("--loop", choices=sorted(LOOPS), default="uvloop", help="event loop to test on")
    group.addoption(
        "--deployment",
        choices=["single", "sentinel", "cluster"],
        default="single",
        help="what `redis_url` leads to; other than single, runs tests alone that can run there",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[BINARY] = find_binary(config.getoption("--server"))
    except ServerNotFound as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> str:
    server, loop = config.stash[BINARY].name, config.getoption("--loop")
    return f"server: {server} ({config.getoption('--deployment')}), event loop: {loop}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deployment = config.getoption("--deployment")
    if deployment == "single":
        return

    def runs(item: pytest.Item) -> bool:
        fixtures = set(getattr(item, "fixturenames", ()))
        marks = item.iter_markers("only")
        return (
            "redis_url" in fixtures
            and not fixtures & SINGLE
            and all(deployment in mark.args for mark in marks)
        )

    left_out = [item for item in items if not runs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if runs(item)]


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


@pytest.fixture(scope="session")
def deployment(pytestconfig: pytest.Config) -> str:
    """What `--deployment` chose."""
    chosen: str = pytestconfig.getoption("--deployment")
    return chosen


# One cluster and one set of Sentinels for all tests: started by the first that wants it. A test may
# kill, pause and move what it likes: the next one finds the original layout, without data.


@pytest.fixture(scope="session")
def shared_cluster(binary: Binary, deployment: str) -> Iterator[Cluster]:
    options = {} if deployment == "single" else {"node_timeout": PATIENCE}
    with Cluster(binary=binary, **options) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared_sentinels(binary: Binary, deployment: str) -> Iterator[Sentinels]:
    options = {} if deployment == "single" else {"down_after": PATIENCE}
    with Sentinels(binary=binary, **options) as sentinels:
        yield sentinels


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Three masters with a replica each, without data, users and settings of earlier tests."""
    shared_cluster.restore()
    for node in shared_cluster.nodes:
        forget_settings(node.client)
    yield shared_cluster
    nothing_connected(shared_cluster.nodes)


@pytest.fixture
def sentinels(shared_sentinels: Sentinels) -> Iterator[Sentinels]:
    """A master, two replicas, three Sentinels, without what earlier tests left."""
    shared_sentinels.restore()
    for node in shared_sentinels.nodes:
        forget_settings(node.client)
    yield shared_sentinels
    nothing_connected([*shared_sentinels.nodes, *shared_sentinels.sentinels])


def nothing_connected(nodes: Iterable[Node]) -> None:
    left = connections_left(node.client for node in nodes if node.living)
    assert not left, f"connections left behind: {left}"


# What tests are run against that care for no kind of deployment.


@pytest.fixture
def redis_url(deployment: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where Redis is, without data, scripts, users and settings of earlier tests."""
    if deployment == "cluster":
        cluster: Cluster = request.getfixturevalue("cluster")
        yield cluster.url.replace("redis://", "redis+cluster://")
    elif deployment == "sentinel":
        yield request.getfixturevalue("sentinels").url
    else:
        server: Server = request.getfixturevalue("server")
        with redis.Redis.from_url(server.url) as admin:
            admin.flushall()
            forget_settings(admin)
            yield server.url
            assert not (left := connections_left([admin])), f"connections left behind: {left}"


@pytest.fixture
def redis_sync(
    redis_url: str, deployment: str, request: pytest.FixtureRequest
) -> Iterator[redis.Redis | EveryMaster]:
    """To look at the state of Redis, and to change it; of a cluster: on all masters."""
    client: redis.Redis | EveryMaster
    if deployment == "cluster":
        client = EveryMaster.from_url(request.getfixturevalue("cluster").url)
    elif deployment == "sentinel":
        client = redis.Redis.from_url(request.getfixturevalue("sentinels").master().url)
    else:
        client = redis.Redis.from_url(redis_url)
    with client:
        yield client


@pytest.fixture
def service(redis_sync: redis.Redis, deployment: str, request: pytest.FixtureRequest) -> Service:
    """The state of service `svc`."""
    if deployment == "cluster":
        return ClusterService(redis_sync, request.getfixturevalue("cluster"))
    return Service(redis_sync)


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
