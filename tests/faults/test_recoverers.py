"""Several that recover the same entries at the same time: each is put back once, none is lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from helpers import eventually

from relstream import AlreadyClaimed, LBSInfo, RecoveryConfig

LEADER = "svc-input-reconciler"
COUNT = 600


def assert_requeued_once(service, count=COUNT):
    entries = service.redis.xrange(service.lbs)
    announced = Counter(fields[b"lbs-input"].split(b'"')[3].decode() for _, fields in entries)
    assert announced == Counter(f"s{i}" for i in range(count))
    assert Counter(fields[b"_retry_count"] for _, fields in entries) == {b"1": count}
    assert service.pending("ghost") == []
    assert service.redis.xlen(service.dlq) == 0


async def lead_all(service):
    """Takes the leadership away from whoever has it, so that all others lead at once, too."""
    while True:
        service.redis.delete(LEADER)
        await asyncio.sleep(0.005)


@pytest.fixture
async def many_leaders(service):
    task = asyncio.ensure_future(lead_all(service))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_in_one_process(consumer, service, many_leaders):
    # One that owns nothing can't take back what it has just put back.
    at_once = RecoveryConfig(reconciliation_interval=0.1, min_idle_time=0.2, batch_size=7)
    clients = [consumer(f"c{i}", recovery=at_once, max_streams=1) for i in range(4)]
    orphans = [LBSInfo(f"s{i}", entry_id) for i, entry_id in enumerate(service.orphan(COUNT))]
    for client in clients:
        await client.init()
    # A page of each, over and over, while all of them scan.
    claims = [client.claim(each) for each in orphans for client in clients[:2]]
    outcomes = await asyncio.gather(*claims, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), AlreadyClaimed}
    assert outcomes.count(None) <= COUNT
    await eventually(lambda: not service.pending("ghost"))
    await asyncio.sleep(0.5)
    assert_requeued_once(service)
    assert len(service.pending()) == len(service.locks()) == 4


async def test_each_entry_claimed_by_many_at_once(consumer, service):
    clients = [consumer(f"c{i}", auto_claim=False, max_streams=1) for i in range(3)]
    for client in clients:
        await client.init()
    blockers = [service.announce(f"blocker{i}") for i in range(3)]  # now nobody reads any more
    await eventually(lambda: len(service.locks()) == 3)
    for i, entry_id in enumerate(service.orphan(20)):
        outcomes = await asyncio.gather(
            *[client.claim(LBSInfo(f"s{i}", entry_id)) for client in clients for _ in range(3)],
            return_exceptions=True,
        )
        assert outcomes.count(None) == 1, outcomes
        assert sum(isinstance(outcome, AlreadyClaimed) for outcome in outcomes) == 8
    for entry_id in blockers:
        service.redis.xdel(service.lbs, entry_id)
    assert_requeued_once(service, 20)


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "two-steps"])
@pytest.mark.parametrize("with_reference", [False, True], ids=["ours", "and-the-reference's"])
async def test_in_several_processes(
    start, start_reference, consumer, service, redis_url, many_leaders, with_reference, scripts
):
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "+@scripting" if scripts else "-@scripting"],
    )  # fmt: skip
    url = redis_url.replace("://", "://app:x@")
    orphans = [*enumerate(service.orphan(COUNT))]
    orphaned = time.monotonic()
    foreign = [start_reference() for _ in range(2 * with_reference)]
    for process in foreign:
        await process.heard("ready")
    # A process that claims hundreds at once may take long to lock what it has just read.
    at_once = {"reconciliation_interval": 0.1, "min_idle_time": 1.0, "batch_size": 7}
    # What recovers does not start before the others are under way.
    idle = {"reconciliation_interval": 3600.0, "min_idle_time": 3600.0}
    processes = [
        await start(f"p{i}", url=url, auto_claim=False, max_streams=COUNT, recovery=idle).ready()
        for i in range(2)
    ]
    mine = consumer("c1", url=url, heartbeat_interval=1.0, recovery=RecoveryConfig(**at_once))
    await asyncio.sleep(orphaned + at_once["min_idle_time"] - time.monotonic())
    for process in foreign:
        process.tell("go")
    for i, entry_id in reversed(orphans):
        for process in processes:
            process.tell(f"claim s{i} {entry_id}")
    notes = await mine.init()
    for process in processes:
        await process.heard("claim", COUNT)
    await eventually(lambda: not service.pending("ghost"))

    async def hear():
        async for notification in notes:
            heard[notification.type.name, notification.payload.data_stream_name] += 1

    heard = Counter()
    hearing = asyncio.ensure_future(hear())
    try:
        await eventually(lambda: len(service.locks()) == COUNT)
        await asyncio.sleep(0.5)
        assert_requeued_once(service)
        added = Counter(name for process in processes for name in process.added)
        added.update(name for (kind, name) in heard if kind == "STREAM_ADDED")
        assert added == Counter(f"s{i}" for i in range(COUNT))
        assert not [kind for kind, _ in heard if kind == "STREAM_DISOWNED"]
        assert [process.lost for process in processes] == [[], []]
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
    won = sum([line["error"] is None for p in processes for line in p.said("claim")])
    for process in foreign:
        (line,) = await process.heard("won")
        won += line["count"]
    assert won <= COUNT
