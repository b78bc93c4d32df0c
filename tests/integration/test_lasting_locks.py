"""Held locks that expire far too late, or never: a dead owner's streams stay its own."""

from __future__ import annotations

import asyncio
import logging

import pytest
from helpers import SEPARATOR, Monitor, eventually, names, nothing_comes, take

from relstream import RecoveryConfig
from relstream.recovery import lasting


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lasting, "TTL_CHECK_EVERY", 0.3)


@pytest.fixture
def warnings(caplog):
    return lambda: [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING
        and "if the owner is gone, delete this key" in r.getMessage()
    ]


@pytest.mark.parametrize(("ttl", "said"), [(3_600_000, "expires in 3"), (None, "never expires")])
async def test_one_is_reported_until_it_is_gone(consumer, service, warnings, ttl, said):
    (entry_id,) = service.orphan(1)
    lock = f"s0{SEPARATOR}{entry_id}"
    service.redis.set(lock, "ghost", px=ttl)
    client = consumer(heartbeat_interval=1.0, recovery=RecoveryConfig(min_idle_time=1.0))
    notes = await client.init()
    await eventually(lambda: client.health().reasons)
    (reason,) = client.health().reasons
    assert lock in reason
    assert said in reason
    assert client.health().live
    assert client.health().ready
    await nothing_comes(notes, 1.0)
    assert len(warnings()) == 1
    service.redis.delete(lock)
    assert names(await take(notes, 1)) == ["s0"]
    await eventually(lambda: not client.health().reasons)
    assert len(warnings()) == 1


async def test_those_of_living_owners_are_none(consumer, service, warnings):
    """Nor that of one whose heartbeat is longer."""
    slow = consumer("slow", heartbeat_interval=5.0, max_streams=3)
    notes = await slow.init()
    for i in range(3):
        service.announce(f"s{i}")
    await take(notes, 3)
    await slow._engine.partitions[0].recoverer.resign()
    leader = consumer("leader", heartbeat_interval=1.0)
    await leader.init()
    await asyncio.sleep(3)
    assert not leader.health().reasons
    assert warnings() == []


@pytest.mark.only("single", "sentinel", reason="watches one server")
async def test_it_is_not_asked_again_where_that_is_forbidden(consumer, service, redis_url):
    (entry_id,) = service.orphan(1)
    service.redis.set(f"s0{SEPARATOR}{entry_id}", "ghost")
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-pttl"]
    )
    client = consumer(heartbeat_interval=1.0, url=redis_url.replace("://", "://app:x@"))
    await client.init()
    await eventually(lambda: client.health().leader)
    await asyncio.sleep(2)
    with Monitor(service.redis) as monitor:
        await asyncio.sleep(1.5)
        assert not [seen for seen in monitor.seen() if seen.startswith("PTTL")]
    assert not client.health().reasons
