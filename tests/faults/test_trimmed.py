"""Entries that are taken out of the load balancer stream while they are pending."""

from __future__ import annotations

import asyncio
import json

import pytest
from helpers import DISOWNED, SEPARATOR, Heard, eventually, names, take

from relstream import RecoveryConfig

HEARTBEAT = 1.0
RECOVERY = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=0.3)


@pytest.fixture
async def owner(consumer, service):
    """Owns streams `s0` to `s9`, beside a leader; the entries of all are trimmed."""
    leader = consumer("leader", heartbeat_interval=HEARTBEAT, max_streams=1, recovery=RECOVERY)
    service.announce("first")
    await take(await leader.init(), 1)
    await eventually(lambda: leader.health().leader)
    client = consumer("owner", heartbeat_interval=HEARTBEAT, recovery=RECOVERY)
    notes = await client.init()
    for i in range(9):
        service.announce(f"s{i}", info=json.dumps({"n": i}), _retry_count="1")
    service.announce("s9", info=json.dumps({"n": 9}), other="kept")
    await take(notes, 10)
    assert service.redis.xtrim(service.lbs, maxlen=0, approximate=False) == 11
    return client, notes


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
async def test_a_living_owner_finishes_and_fails_what_it_knows(owner, service, scripts):
    client, notes = owner
    if not scripts:
        service.redis.acl_setuser("default", enabled=True, commands=["-evalsha", "-eval"])
    try:
        await asyncio.sleep(2.5 * HEARTBEAT)
        assert len(service.locks()) == 11, "they are owned as before"
        assert len(service.pending("owner")) == 10
        await client.done_stream("s0")
        await client.reject("s1", "bad")
        await client.fail("s2", "broken", delay=0)
        await client.release("s3")
        back = await take(notes, 2)
        assert not [note for note in back if note.type is DISOWNED]
        told = {
            note.payload.data_stream_name: (note.additional_info, note.retry_count) for note in back
        }
        assert told == {"s2": ({"n": 2}, 2), "s3": ({"n": 3}, 1)}
        ((_, letter),) = service.redis.xrange(service.dlq)
        assert json.loads(letter[b"lbs-input"]) == {"DataStreamName": "s1", "Info": {"n": 1}}
        await client.aclose()
        waiting = [
            json.loads(fields[b"lbs-input"]) for _, fields in service.redis.xrange(service.lbs)
        ]
        assert sorted(each["DataStreamName"] for each in waiting) == [f"s{i}" for i in range(2, 10)]
        assert service.pending("owner") == []
    finally:
        service.redis.acl_setuser("default", enabled=True, commands=["+evalsha", "+eval"])


async def test_what_a_dead_owner_leaves_is_acknowledged_and_said(consumer, service, caplog):
    ids = service.orphan(3)
    service.redis.xdel(service.lbs, *ids[:2])
    heard = Heard()
    client = consumer("c1", heartbeat_interval=HEARTBEAT, recovery=RECOVERY, recorder=heard)
    notes = await client.init()
    assert names(await take(notes, 1)) == ["s2"]
    await eventually(lambda: not service.pending("ghost"))
    await eventually(lambda: heard.calls("entries_vanished"))
    assert sum(count for (count,) in heard.calls("entries_vanished")) == 2
    (said,) = [r.getMessage() for r in caplog.records if "were gone from" in r.getMessage()]
    assert ids[0] in said
    assert ids[1] in said


async def test_what_a_former_life_left_is_acknowledged(consumer, service):
    """Though a consumer of its name lives."""
    ids = service.orphan(2, "c1")
    service.redis.xdel(service.lbs, *ids)
    await consumer("c1", heartbeat_interval=HEARTBEAT).init()
    await eventually(lambda: not service.pending("c1"))


async def test_what_nobody_owns_is_acknowledged_and_said(consumer, service, caplog):
    """It was read under the name of a consumer that lives, and lost on the way to it."""
    heard = Heard()
    client = consumer("c1", heartbeat_interval=HEARTBEAT, max_streams=1, recorder=heard)
    service.announce("first")
    await take(await client.init(), 1)
    entry_id = service.announce("s1")
    service.redis.xreadgroup(service.group, "c1", {service.lbs: ">"})
    service.redis.xdel(service.lbs, entry_id)
    await eventually(lambda: len(service.pending("c1")) == 1)
    assert heard.calls("entries_vanished") == [(1,)]
    (said,) = [r.getMessage() for r in caplog.records if "were gone from" in r.getMessage()]
    assert entry_id in said


@pytest.mark.only("single", "sentinel", reason="one server that is out of memory")
async def test_what_was_read_and_could_not_be_locked_is_requeued(consumer, service):
    """From what who read it knows, as nobody else does."""
    client = consumer("c1", heartbeat_interval=HEARTBEAT, recovery=RECOVERY)
    notes = await client.init()
    await client.pause()
    ids = [service.announce(f"s{i}", info='{"n": 1}', _retry_count="2") for i in range(5)]
    service.redis.config_set("maxmemory", 1)
    try:
        client.resume()
        await eventually(lambda: len(service.pending("c1")) == 5)
        service.redis.xdel(service.lbs, *ids)
        await eventually(lambda: not set(service.pending("c1")) & set(ids))
    finally:
        service.redis.config_set("maxmemory", 0)
    told = await take(notes, 5)
    assert sorted(names(told)) == [f"s{i}" for i in range(5)]
    assert {(note.retry_count, note.additional_info["n"]) for note in told} == {(2, 1)}


@pytest.mark.parametrize("finished", [True, False])
async def test_a_consumer_that_only_holds_locks_lives(consumer, service, finished):
    """As one of the reference's, which writes no instance, and of which an old server tells little.

    One that holds none any more is dead.
    """
    leader = consumer("leader", heartbeat_interval=HEARTBEAT, recovery=RECOVERY)
    await leader.init()
    await eventually(lambda: leader.health().leader)
    await leader.pause()
    held, trimmed = service.announce("held"), service.announce("trimmed")
    service.redis.xreadgroup(service.group, "go", {service.lbs: ">"})
    lock = f"held{SEPARATOR}{held}"
    service.redis.set(lock, "go", px=60_000)
    service.redis.xdel(service.lbs, trimmed)
    await asyncio.sleep(6.0)  # its read is forgotten
    assert len(service.pending("go")) == 2
    if finished:
        service.redis.xack(service.lbs, service.group, held)
        service.redis.xdel(service.lbs, held)
        service.redis.delete(lock)
    else:
        service.redis.delete(lock)
        leader.resume()
    await eventually(lambda: not service.pending("go"))
