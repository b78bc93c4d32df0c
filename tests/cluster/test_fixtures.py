"""The servers that the other tests here stand on do what they say."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis.asyncio
import redis.asyncio.sentinel
from cluster.observing import ClusterService, locks_by_master, subscriptions

from relstream.testing import Cluster, Sentinels
from relstream.testing.server import Binary, TLSFiles

Group = type[Cluster] | type[Sentinels]


def layout(cluster: Cluster) -> list[tuple[int, list[int]]]:
    """Every master's first slot, in their order, and the places of its replicas."""
    return [
        (min(cluster.slots_of(master)), list(map(cluster.nodes.index, cluster.replicas(of=master))))
        for master in cluster.nodes[:3]
    ]


def set_some(cluster: Cluster, tag: str, count: int) -> list[str]:
    keys = [f"{{{tag}}}{i}" for i in range(count)]
    master = cluster.master_of(tag)
    for key in keys:
        master.call("SET", key, key)
    return keys


# A cluster


async def test_a_client_reaches_all_of_it(cluster: Cluster) -> None:
    async with redis.asyncio.RedisCluster.from_url(cluster.url) as client:
        for i in range(20):
            await client.set(f"key{i}", i)
            assert await client.get(f"key{i}") == b"%d" % i
            assert cluster.master_of(f"key{i}").call("GET", f"key{i}") == str(i)
    assert cluster.masters() == cluster.nodes[:3]
    assert cluster.replicas() == cluster.nodes[3:]
    assert layout(cluster) == [(0, [3]), (5461, [4]), (10923, [5])]


def test_the_next_test_finds_no_data_and_the_same_layout(cluster: Cluster) -> None:
    before = layout(cluster)
    pids = [node.pid for node in cluster.nodes]
    set_some(cluster, "a", 3)
    cluster.restore()
    assert [node.call("DBSIZE") for node in cluster.nodes] == [0] * 6
    assert [node.pid for node in cluster.nodes] == pids
    assert layout(cluster) == before


@pytest.mark.slow
def test_a_replica_takes_the_place_of_a_killed_master(cluster: Cluster) -> None:
    before = layout(cluster)
    master = cluster.master_of("a")
    (replica,) = cluster.replicas(of=master)
    (key,) = set_some(cluster, "a", 1)
    master.call("WAIT", 1, 5000)
    master.kill()
    with pytest.raises(LookupError):
        cluster.master_of("a")
    cluster.wait_ok()
    assert cluster.master_of("a") is replica
    assert replica.call("GET", key) == key
    assert len(cluster.replicas()) == 2
    master.start()
    cluster.wait_ok()
    assert cluster.replicas(of=replica) == [master]
    cluster.restore()
    assert layout(cluster) == before
    assert cluster.master_of("a") is master


@pytest.mark.slow
def test_a_replica_takes_the_place_of_a_paused_master(cluster: Cluster) -> None:
    before = layout(cluster)
    master = cluster.master_of("a")
    (replica,) = cluster.replicas(of=master)
    master.pause()
    cluster.wait_ok()
    assert cluster.master_of("a") is replica
    cluster.restore()
    assert master.living
    assert layout(cluster) == before


@pytest.mark.slow
def test_failover_and_failback(cluster: Cluster) -> None:
    before = layout(cluster)
    master = cluster.master_of("a")
    (replica,) = cluster.replicas(of=master)
    for one, other in ((replica, master), (master, replica)):
        cluster.failover(one)
        assert cluster.master_of("a") is one
        assert cluster.replicas(of=one) == [other]
    assert layout(cluster) == before


@pytest.mark.slow
def test_a_master_comes_and_goes(cluster: Cluster) -> None:
    before = layout(cluster)
    added = cluster.add_master()
    assert cluster.masters() == [*cluster.nodes[:3], added]
    keys = set_some(cluster, "a", 250)
    source, slot = cluster.master_of("a"), cluster.slot_of("a")
    with pytest.raises(ValueError, match="slots"):
        cluster.remove(source)
    cluster.move_slots([slot, slot + 1], source, added)
    assert cluster.master_of(slot) is cluster.master_of(slot + 1) is added
    assert [added.call("GET", key) for key in keys] == keys
    assert source.call("DBSIZE") == 0
    with pytest.raises(redis.exceptions.MovedError):
        source.call("GET", keys[0])
    cluster.move_slots([slot, slot + 1], added, source)
    assert [source.call("GET", key) for key in keys] == keys
    pid = added.pid
    cluster.remove(added)
    assert not psutil.pid_exists(pid)
    assert layout(cluster) == before
    assert all(len(n.call("CLUSTER", "NODES").splitlines()) == 6 for n in cluster.nodes)


@pytest.mark.slow
def test_restore_undoes_everything_at_once(cluster: Cluster) -> None:
    before = layout(cluster)
    one, two, three, *replicas = cluster.nodes
    added = cluster.add_master()
    cluster.move_slots(range(5), one, added)
    cluster.failover(replicas[1])
    cluster.remove(two)
    set_some(cluster, "a", 3)
    one.kill()
    three.pause()
    cluster.restore()
    assert layout(cluster) == before
    assert cluster.nodes == [one, two, three, *replicas]
    assert [node.call("DBSIZE") for node in cluster.nodes] == [0] * 6
    assert not added.living


@pytest.mark.slow
def test_half_of_a_move_answers_ask(cluster: Cluster) -> None:
    source, slot = cluster.master_of("a"), cluster.slot_of("a")
    target = next(master for master in cluster.masters() if master is not source)
    (key,) = set_some(cluster, "a", 1)
    cluster.start_move(slot, source, target)
    assert source.call("GET", key) == key
    with pytest.raises(redis.exceptions.AskError):
        source.call("GET", "{a}new")
    cluster.finish_move(slot, source, target)
    cluster.wait_ok()
    assert target.call("GET", key) == key
    cluster.restore()
    assert cluster.master_of("a") is source


def test_what_is_wrong_is_said(cluster: Cluster) -> None:
    for node in (cluster.nodes[0], cluster.nodes[3]):
        node.kill()
    with pytest.raises(TimeoutError, match=r"does not live|not ok|does not reach"):
        cluster.wait_ok(0.1)


def test_observing(cluster: Cluster, service: ClusterService) -> None:
    for i in range(20):
        service.redis.set(f"data{i}<MUTEX_KEY_SEP>1-{i}", f"c{i}")
    assert service.locks() == {f"data{i}<MUTEX_KEY_SEP>1-{i}": f"c{i}" for i in range(20)}
    for master, held in locks_by_master(cluster).items():
        assert held
        assert all(cluster.master_of(key) is master for key in held)
    with (
        redis.Redis.from_url(cluster.url, client_name="me") as client,
        client.pubsub() as pubsub,
    ):
        pubsub.psubscribe("a*", "b*")
        assert [pubsub.get_message(timeout=5)["data"] for _ in range(2)] == [1, 2]
        assert subscriptions(cluster.nodes[0]) == {"me": 2}
        assert subscriptions(cluster.nodes[1]) == {}


# Sentinels


async def test_a_client_finds_the_master(sentinels: Sentinels) -> None:
    finder = redis.asyncio.sentinel.Sentinel(sentinels.addresses)
    found = await finder.discover_master(sentinels.service_name)
    assert found == sentinels.master().address == sentinels.nodes[0].address
    for client in finder.sentinels:
        await client.aclose()
    assert sentinels.replicas() == sentinels.nodes[1:]
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels.sentinels)
    assert sentinels.url == f"redis+sentinel://{hosts}/relstream/0"


@pytest.mark.slow
def test_sentinels_replace_a_killed_master(sentinels: Sentinels) -> None:
    master = sentinels.master()
    master.call("SET", "key", "value")
    master.call("WAIT", 2, 5000)
    master.kill()
    promoted = sentinels.wait_master()
    assert promoted is not master
    assert promoted.call("GET", "key") == "value"
    sentinels.wait_ok()
    assert len(sentinels.replicas()) == 1
    sentinels.restore()
    assert sentinels.master() is master
    assert [node.call("DBSIZE") for node in sentinels.nodes] == [0] * 3


@pytest.mark.slow
def test_sentinels_fail_over_when_told(sentinels: Sentinels) -> None:
    master = sentinels.master()
    promoted = sentinels.failover()
    assert promoted is not master
    assert promoted.role == "master"
    sentinels.wait_ok()  # by now the former master knows
    assert master.role == "slave"
    sentinels.restore()
    assert [node.role for node in sentinels.nodes] == ["master", "slave", "slave"]


@pytest.mark.slow
def test_two_of_three_sentinels_are_enough_and_the_third_catches_up(sentinels: Sentinels) -> None:
    sentinels.sentinels[0].kill()
    master = sentinels.master()
    master.pause()
    promoted = sentinels.wait_master()
    assert promoted is not master
    sentinels.sentinels[0].start()
    assert sentinels.wait_master() is promoted
    sentinels.restore()
    assert sentinels.master() is master


# Both


@pytest.fixture
def temporary_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers started in this test, or by its child processes, make their directories."""
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = Path("/tmp") / f"rs{time.monotonic_ns()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    folder.rmdir()  # fails when a server left something


@pytest.mark.slow
def test_a_cluster_with_tls_and_password(make: Callable[..., Cluster], tls: TLSFiles) -> None:
    cluster = make(Cluster, tls=tls, password="secret")
    keys = set_some(cluster, "a", 3)
    source = cluster.master_of("a")
    target = next(master for master in cluster.masters() if master is not source)
    cluster.move_slots([cluster.slot_of("a")], source, target)
    options = {"password": "secret", "ssl_ca_certs": str(tls.ca)}
    with redis.RedisCluster.from_url(cluster.url, **options) as client:
        assert [client.get(key).decode() for key in keys] == keys
    with (
        redis.Redis.from_url(cluster.url, ssl_ca_certs=str(tls.ca)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    cluster.restore()
    assert cluster.master_of("a") is source


@pytest.mark.slow
def test_sentinels_with_tls_and_password(make: Callable[..., Sentinels], tls: TLSFiles) -> None:
    sentinels = make(Sentinels, tls=tls, password="secret")
    promoted = sentinels.failover()
    options = {"ssl_ca_certs": str(tls.ca)}
    with redis.Redis.from_url(sentinels.sentinels[0].url, **options) as client:
        assert client.sentinel_get_master_addr_by_name("relstream")[1] == promoted.port
    with redis.Redis.from_url(promoted.url, password="secret", **options) as client:
        assert client.set("key", "value")


@pytest.mark.slow
@pytest.mark.parametrize("group", [Cluster, Sentinels])
def test_nothing_is_left(
    make: Callable[..., Cluster | Sentinels], group: Group, temporary_directory: Path
) -> None:
    started = make(group)
    nodes = [*started.nodes, *getattr(started, "sentinels", [])]
    pids = [node.pid for node in nodes]
    nodes[0].pause()
    nodes[1].kill()
    started.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not list(temporary_directory.iterdir())


PARENT = """
import sys, time
import relstream.testing
from relstream.testing.server import find_binary

started = getattr(relstream.testing, sys.argv[1])(binary=sys.argv[2])
started.start()
nodes = [*started.nodes, *getattr(started, "sentinels", [])]
nodes[0].pause()
print(*(node.pid for node in nodes), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", ["Cluster", "Sentinels"])
def test_all_end_with_their_parent(group: str, binary: Binary, temporary_directory: Path) -> None:
    command = [sys.executable, "-c", PARENT, group, binary.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 6
        parent.kill()
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) or list(temporary_directory.iterdir()):
        assert time.monotonic() < deadline, "they outlive their parent"
        time.sleep(0.02)
