"""Slots move from one master to another while everything goes on."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from helpers import ADDED, EXPIRED, SEPARATOR, eventually, names, take

from relstream import Producer, RecoveryConfig, StreamClient
from relstream.ownership import fetcher
from relstream.testing import Cluster, Node

# No lock expires because the machine is slow.
HEARTBEAT = 30.0


def two_masters(cluster: Cluster, key: str) -> tuple[Node, Node]:
    """The one that has the key, and another."""
    source = cluster.master_of(key)
    return source, next(node for node in cluster.masters() if node is not source)


def move(cluster: Cluster, key: str) -> None:
    """The key's slot goes to another master, without waiting until all know it."""
    source, target = two_masters(cluster, key)
    slot = cluster.slot_of(key)
    cluster.start_move(slot, source, target)
    cluster.finish_move(slot, source, target)


@pytest.mark.slow
async def test_locks_that_expire_while_their_slot_moves_are_all_told(cluster, service, consumer):
    notes = await consumer(queue_size=5000, auto_claim=False).init()
    wanted = [f"{{m}}{i}" for i in range(1500)]
    source, target = two_masters(cluster, "{m}")
    pipe = source.client.pipeline(transaction=False)
    for i, name in enumerate(wanted):
        pipe.set(f"{name}{SEPARATOR}1-{i}", "ghost", px=200 + i)
    pipe.execute()
    slot = cluster.slot_of("{m}")
    cluster.start_move(slot, source, target)
    moving = asyncio.ensure_future(asyncio.to_thread(cluster.finish_move, slot, source, target))
    heard = names(await take(notes, 1500, EXPIRED, timeout=30))
    await moving
    assert Counter(heard) == Counter(wanted)


@pytest.mark.slow
async def test_slots_that_move_to_and_fro(cluster, service, consumer, url):
    """Those of the load balancer stream and of all locks, which have one tag."""
    clients = [consumer(f"c{i}") for i in range(2)]
    added: Counter[str] = Counter()
    finishing: set[asyncio.Task[None]] = set()

    async def work(client: StreamClient, notes) -> None:
        async for notification in notes:
            if notification.type is ADDED:
                name = notification.payload.data_stream_name
                added[name] += 1
                finishing.add(asyncio.ensure_future(client.done_stream(name)))

    working = [asyncio.ensure_future(work(c, await c.init())) for c in clients]
    moves = 0
    stop = asyncio.Event()

    async def storm() -> None:
        nonlocal moves
        while not stop.is_set():
            for key in (service.lbs, "{m}"):
                await asyncio.to_thread(move, cluster, key)
                moves += 1

    storming = asyncio.ensure_future(storm())
    wanted = [f"{{m}}{i}" for i in range(500)]
    async with Producer(url, "svc") as producer:
        for start in range(0, 500, 10):
            await producer.announce_many([(name, None) for name in wanted[start : start + 10]])
            await asyncio.sleep(0.02)
    await eventually(lambda: len(added) == 500, 40)
    await asyncio.gather(*finishing)
    stop.set()
    await storming
    assert added == Counter(wanted)
    assert moves >= 10
    await asyncio.to_thread(cluster.wait_ok)
    assert (service.entries(), service.pending(), service.locks()) == ([], [], {})
    for client in clients:
        await client.aclose()
    await asyncio.gather(*working)


async def test_a_blocked_read_follows_its_slot(cluster, service, consumer, monkeypatch):
    monkeypatch.setattr(fetcher, "BLOCK", 60.0)
    client = consumer()
    notes = await client.init()
    for i in range(3):
        await eventually(lambda: service.reads("c1"))
        await asyncio.to_thread(move, cluster, service.lbs)
        await asyncio.to_thread(service.announce, f"s{i}")
        assert names(await take(notes, 1)) == [f"s{i}"]
        await client.done_stream(f"s{i}")
    # Nor does closing wait for it: the read is ended where it waits now.
    await asyncio.wait_for(client.aclose(), 5)
    assert service.pending() == []


@pytest.mark.slow
async def test_a_replica_promoted_while_thousands_are_requeued(cluster, service, consumer):
    count = 3000
    master = cluster.master_of(service.lbs)
    wanted = [f"s{i}" for i in range(count)]
    service.orphan(count)
    assert master.call("WAIT", 1, 4000) == 1
    recovery = RecoveryConfig(
        min_idle_time=0.0, reconciliation_interval=0.5, batch_size=20, max_retries=100
    )
    client = consumer(heartbeat_interval=2.0, queue_size=2 * count, recovery=recovery)
    notes = await client.init()
    await take(notes, 100)
    master.kill()
    await asyncio.to_thread(cluster.wait_ok, 40)
    leases = client._engine.partitions[0].leases
    # All of them, each once: what the replica had not heard of was put back once more.
    await eventually(lambda: len(leases) == count, 40)
    await eventually(lambda: len(service.locks()) == count, 40)
    entries = service.redis.xrange(service.lbs)
    found = Counter(fields[b"lbs-input"].split(b'"')[3].decode() for _, fields in entries)
    assert found == Counter(wanted)
    assert sorted(head.data_stream_name for head in leases.all()) == sorted(wanted)
    assert len(service.pending("c1")) == count
    assert service.redis.xlen(service.dlq) == 0
