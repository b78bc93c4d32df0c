"""One service over several load balancer streams, on different masters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from cluster.observing import ClusterService
from helpers import ADDED, SEPARATOR, Heard, Service, eventually, names, nothing_comes, take

from relstream import DeadLetters, Producer, RecoveryConfig, StreamClient
from relstream.lbs.names import Names, partition_of
from relstream.testing import Cluster

HEARTBEAT = 0.5
NAMES = Names.all_of("svc", partitions=3)


class Partition(ClusterService):
    """One load balancer stream of the service."""

    def __init__(self, service: Service, cluster: Cluster, names: Names) -> None:
        super().__init__(service.redis, cluster)
        self.lbs = names.lbs.decode()


@pytest.fixture
def partitions(service: Service, cluster: Cluster) -> list[Partition]:
    return [Partition(service, cluster, names) for names in NAMES]


@pytest.fixture
def url(cluster: Cluster) -> str:
    return f"redis+cluster://127.0.0.1:{cluster.masters()[0].port}"


@pytest.fixture
async def consumer(url: str) -> AsyncIterator[Callable[..., StreamClient]]:
    made: list[StreamClient] = []

    def make(name: str = "c1", **options: Any) -> StreamClient:
        options = {"heartbeat_interval": HEARTBEAT, "partitions": 3, **options}
        made.append(StreamClient(url, "svc", consumer_id=name, **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


async def announce(url: str, count: int) -> list[str]:
    wanted = [f"s{i}" for i in range(count)]
    async with Producer(url, "svc", partitions=3) as producer:
        ids = await producer.announce_many([(name, None) for name in wanted])
    assert len(ids) == count
    return wanted


def pending(partitions: list[Partition]) -> list[list[str]]:
    return [partition.pending() for partition in partitions]


async def test_partitions_are_on_different_masters(cluster, partitions):
    masters = {cluster.master_of(partition.lbs) for partition in partitions}
    assert len(masters) == 3
    assert all(cluster.master_of(names.leader) is cluster.master_of(names.lbs) for names in NAMES)


async def test_one_set_of_consumers_serves_all(cluster, url, partitions, consumer):
    clients = [consumer(f"c{i}", queue_size=40) for i in range(2)]
    notes = [await client.init() for client in clients]
    wanted = await announce(url, 300)
    owner: dict[str, StreamClient] = {}

    async def own(client: StreamClient, notifications) -> None:
        async for notification in notifications:
            if notification.type is ADDED:
                name = notification.payload.data_stream_name
                assert name not in owner or len(owner) == 300  # else: handed over at the end
                owner[name] = client

    owning = [asyncio.ensure_future(own(*pair)) for pair in zip(clients, notes, strict=True)]
    await eventually(lambda: len(owner) == 300)
    assert sorted(owner) == sorted(wanted)
    assert all(len(ids) > 60 for ids in pending(partitions))
    await asyncio.gather(*(owner[name].done_stream(name) for name in wanted[:150]))
    assert sum(map(len, pending(partitions))) == 150
    for client in clients:
        await client.aclose()
    await asyncio.gather(*owning)
    assert pending(partitions) == [[], [], []]
    assert sum(len(partition.entries()) for partition in partitions) == 150
    assert partitions[0].locks() == {}


async def test_no_more_than_max_streams_of_all_together(url, partitions, consumer):
    await announce(url, 60)
    client = consumer(max_streams=10)
    notes = await client.init()
    added = names(await take(notes, 10))
    await nothing_comes(notes, 0.5)
    assert sum(map(len, pending(partitions))) == 10
    for name in added:
        await client.done_stream(name)
    await take(notes, 10)
    assert len(partitions[0].locks()) == 10


@pytest.mark.parametrize("bound", [{"max_streams": 1}, {"max_streams": 2}, {"queue_size": 1}])
async def test_the_only_room_there_is_goes_from_one_to_the_next(url, partitions, consumer, bound):
    """A partition in which nothing is announced would take all there is, again and again."""
    client = consumer(**bound)
    notes = await client.init()
    await eventually(lambda: any(partition.reads("c1") for partition in partitions))
    candidates = list(map("{}s".format, range(100)))
    for number, partition in [*enumerate(partitions)] * 2:
        named = next(name for name in candidates if partition_of(name, 3) == number)
        partition.redis.xadd(partition.lbs, {"lbs-input": f'{{"DataStreamName": "{named}"}}'})
        assert names(await take(notes, 1, timeout=3)) == [named]
        await client.done_stream(named)


async def test_a_dead_owners_streams_come_back_from_all(url, partitions, consumer):
    wanted = await announce(url, 90)
    for partition in partitions:
        partition.redis.xgroup_create(partition.lbs, partition.group, "0")
        partition.redis.xreadgroup(partition.group, "ghost", {partition.lbs: ">"})
    client = consumer(recovery=RecoveryConfig(min_idle_time=0.0, reconciliation_interval=0.5))
    notes = await client.init()
    assert sorted(names(await take(notes, 90))) == sorted(wanted)
    await client.done()
    assert pending(partitions) == [[], [], []]


async def test_what_is_lost_in_one_is_told(url, partitions, consumer):
    await announce(url, 12)
    client = consumer()
    notes = await client.init()
    added = await take(notes, 12)
    for lost in added[:6]:
        name, entry_id = lost.payload.data_stream_name, lost.payload.id_in_lbs
        for partition in partitions:
            partition.redis.xack(partition.lbs, partition.group, entry_id)
        partitions[0].redis.delete(f"{name}{SEPARATOR}{entry_id}")
    told: set[str] = set()
    while len(told) < 6:
        notification = await asyncio.wait_for(notes.__anext__(), 10)
        if notification.type.name == "STREAM_DISOWNED":
            told.add(notification.payload.data_stream_name)
    assert told == {lost.payload.data_stream_name for lost in added[:6]}


@pytest.mark.parametrize("size", [1, 2])
async def test_little_room_is_never_forgotten(url, consumer, size):
    """However readers and the application take turns while nothing is given back."""
    count = 1500
    await announce(url, count)
    client = consumer(queue_size=size)
    notes = await client.init()
    assert len(set(names(await take(notes, count, timeout=60)))) == count


async def test_what_is_announced_in_another_partition_is_a_dead_letter(
    url, partitions, consumer, caplog
):
    """Whoever finishes it would look for it where it belongs. Replayed, it is announced there."""
    recorder = Heard()
    client = consumer(recorder=recorder)
    notes = await client.init()
    stray = next(name for name in map("s{}".format, range(100)) if partition_of(name, 3) == 2)
    partition = partitions[0]
    partition.redis.xadd(partition.lbs, {"lbs-input": f'{{"DataStreamName": "{stray}"}}'})
    await eventually(lambda: partition.redis.xlen(partition.dlq) == 1)
    async with DeadLetters(url, "svc", partitions=3) as letters:
        (letter,) = [letter async for letter in letters]
        assert (letter.reason, letter.data_stream_name) == ("wrong_partition", stray)
        await eventually(lambda: pending(partitions) == [[], [], []])
        assert await letters.replay() == 1
    assert names(await take(notes, 1)) == [stray]
    assert list(map(len, pending(partitions))) == [0, 0, 1]
    await client.done_stream(stray)
    assert "is of partition 2: give partitions=3" in caplog.text
    assert ("dlq_routing", [stray], "wrong_partition") in recorder.events


async def test_dead_letters_go_back_to_where_they_were(url, partitions, consumer):
    wanted = await announce(url, 30)
    for partition in partitions:
        partition.redis.xgroup_create(partition.lbs, partition.group, "0")
        partition.redis.xreadgroup(partition.group, "ghost", {partition.lbs: ">"})
    recovery = RecoveryConfig(min_idle_time=0.0, reconciliation_interval=0.5, max_retries=0)
    client = consumer(recovery=recovery)
    notes = await client.init()
    await eventually(lambda: partitions[0].redis.xlen(partitions[0].dlq) == 30)
    async with DeadLetters(url, "svc", partitions=3) as letters:
        assert await letters.replay() == 30
    assert sorted(names(await take(notes, 30))) == sorted(wanted)
    assert all(len(ids) > 3 for ids in pending(partitions))
