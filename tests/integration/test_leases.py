"""Locks: kept while the owner lives, and their loss found out and told."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import redis
from core.resp import batch_of
from core.resp import entry as resp_entry
from helpers import (
    ADDED,
    DISOWNED,
    HEARTBEAT,
    QUICK,
    SEPARATOR,
    TERMINATED,
    Renewals,
    eventually,
    names,
    nothing_comes,
    take,
)

from relstream import LBSInfo, RecoveryConfig, StreamNotOwned
from relstream._core import announcements
from relstream.lbs.locks import Locks
from relstream.ownership.leases import locks_of
from relstream.ownership.renewer import LeaseRenewer


def lock(name: str, entry_id: str) -> str:
    return f"{name}{SEPARATOR}{entry_id}"


@pytest.mark.parametrize("threaded", [True, False])
async def test_locks_outlive_their_ttl_while_the_owner_lives(consumer, service, threaded):
    for i in range(250):
        service.announce(f"s{i}")
    notes = await consumer(renew_in_thread=threaded, heartbeat_interval=2.0).init()
    await take(notes, 250)
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() == 3)
    assert len(service.locks()) == 250
    assert all(0 < service.redis.pttl(key) <= 2000 for key in service.locks())
    await nothing_comes(notes, 0.1)


@pytest.mark.parametrize(
    "rounds", [3, pytest.param(10, marks=pytest.mark.slow, id="10-which-take-ten-seconds")]
)
async def test_an_application_that_blocks_its_loop_keeps_its_leases(consumer, service, rounds):
    for i in range(20):
        service.announce(f"s{i}")
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    await take(notes, 20)
    renewals = Renewals(service)
    deadline = time.monotonic() + 40
    while renewals.seen() < rounds:
        assert time.monotonic() < deadline
        time.sleep(0.02)  # noqa: ASYNC251
    assert len(service.locks()) == 20
    await nothing_comes(notes, 0.5)
    await client.done_stream("s3")


async def test_a_lease_that_expired_is_taken_again_if_the_entry_is_still_ours(consumer, service):
    entry_id = service.announce("s1")
    # Without others who would put it back, as is their right.
    notes = await consumer(heartbeat_interval=QUICK, auto_claim=False).init()
    await take(notes, 1)
    service.redis.delete(lock("s1", entry_id))
    await eventually(lambda: service.locks() == {lock("s1", entry_id): "c1"})
    await nothing_comes(notes, 0.7)


async def test_who_lost_a_stream_is_told_once_and_takes_no_lock_again(consumer, service):
    entry_id = service.announce("s1")
    client = consumer(heartbeat_interval=QUICK, max_streams=1, auto_claim=False)
    notes = await client.init()
    await take(notes, 1)
    service.redis.xgroup_createconsumer(service.lbs, service.group, "c2")
    service.redis.delete(lock("s1", entry_id))
    new_id = service.requeuer(entry_id)
    ((_, ((got, _),)),) = service.redis.xreadgroup(service.group, "c2", {service.lbs: ">"})
    assert got.decode() == new_id
    service.redis.set(lock("s1", new_id), "c2", px=60_000)
    (told,) = await take(notes, 1, DISOWNED)
    assert told.payload == ("s1", entry_id)
    await nothing_comes(notes, 1.2)
    with pytest.raises(StreamNotOwned):
        await client.done_stream("s1")
    assert service.locks() == {lock("s1", new_id): "c2"}
    assert service.pending("c2") == service.entries() == [new_id]


async def test_a_late_done_harms_nothing_of_the_new_owner(consumer, service, monkeypatch):
    async def nothing(*args: object) -> None:
        """It does not find out by itself."""

    monkeypatch.setattr(LeaseRenewer, "_renew_all", nothing)
    entry_id = service.announce("s1")
    client = consumer(heartbeat_interval=60, max_streams=1)
    notes = await client.init()
    await take(notes, 1)
    service.redis.delete(lock("s1", entry_id))
    new_id = service.requeuer(entry_id)
    service.redis.xreadgroup(service.group, "c2", {service.lbs: ">"})
    service.redis.set(lock("s1", new_id), "c2", px=60_000)
    with pytest.raises(StreamNotOwned, match="lost"):
        await client.done_stream("s1")
    await take(notes, 1, DISOWNED)
    assert service.locks() == {lock("s1", new_id): "c2"}
    assert service.pending("c2") == service.entries() == [new_id]


async def test_a_lock_that_somebody_else_holds_is_lost(consumer, service):
    entry_id = service.announce("s1")
    notes = await consumer(heartbeat_interval=QUICK, auto_claim=False).init()
    await take(notes, 1)
    service.redis.set(lock("s1", entry_id), "somebody", px=60_000)
    assert names(await take(notes, 1, DISOWNED)) == ["s1"]
    assert service.locks() == {lock("s1", entry_id): "somebody"}


async def test_an_entry_claimed_by_another_is_found_by_the_audit(consumer, service):
    ids = [service.announce(f"s{i}") for i in range(3)]
    notes = await consumer(heartbeat_interval=QUICK, max_streams=3, auto_claim=False).init()
    await take(notes, 3)
    service.redis.xclaim(service.lbs, service.group, "c2", 0, [ids[1]])
    assert names(await take(notes, 1, DISOWNED)) == ["s1"]
    await nothing_comes(notes, 1.2)
    assert len(service.pending("c1")) == 2


async def test_a_deleted_consumer_finishes_what_it_holds(consumer, service):
    """Nobody else can get that: it is pending for nobody, and was delivered."""
    for i in range(3):
        service.announce(f"s{i}")
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    await take(notes, 3)
    service.redis.xgroup_delconsumer(service.lbs, service.group, "c1")
    await nothing_comes(notes, 3 * QUICK)
    for i in range(3):
        await client.done_stream(f"s{i}")
    assert (service.entries(), service.locks()) == ([], {})


async def test_losing_one_announcement_of_two_loses_the_stream(consumer, service):
    first = service.announce("s1")
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    await take(notes, 1)
    second = service.announce("s1")
    await eventually(lambda: client._engine.partitions[0].leases.get("s1").again)
    service.redis.xclaim(service.lbs, service.group, "c2", 0, [first])
    await take(notes, 1, DISOWNED)
    (again,) = await take(notes, 1)  # nobody holds this one: it was put back, and came to us
    assert again.payload.id_in_lbs > second
    await eventually(lambda: set(service.locks()) == {lock("s1", again.payload.id_in_lbs)})
    assert service.pending("c2") == [first]
    assert len(service.entries()) == 2


async def test_a_stream_lost_while_it_waits_in_the_queue_is_never_told(consumer, service):
    entry_id = service.announce("s1")
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    await eventually(lambda: client._engine.partitions[0].leases.get("s1"))
    service.redis.set(lock("s1", entry_id), "somebody", px=60_000)
    await eventually(lambda: not client._engine.partitions[0].leases.get("s1"))
    await nothing_comes(notes, 0.3)


async def test_losses_are_told_before_what_waits_in_the_queue(consumer, service):
    entry_id = service.announce("s0")
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    await take(notes, 1)
    for i in range(1, 50):
        service.announce(f"s{i}")
    service.redis.set(lock("s0", entry_id), "somebody", px=60_000)
    await eventually(
        lambda: (
            not client._engine.partitions[0].leases.get("s0")
            and len(client._engine.partitions[0].leases) == 49
        )
    )
    assert names(await take(notes, 1, DISOWNED)) == ["s0"]
    await take(notes, 49)


async def test_leases_survive_out_of_memory(consumer, service):
    for i in range(30):
        service.announce(f"s{i}")
    client = consumer()
    notes = await client.init()
    await take(notes, 30)
    service.redis.config_set("maxmemory", 1)
    with pytest.raises(redis.OutOfMemoryError):
        service.redis.set("key", "value")
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() == 2)
    assert len(service.locks()) == 30
    await client.done_stream("s7")
    assert len(service.locks()) == len(service.entries()) == 29
    await nothing_comes(notes, 0.1)


async def test_streams_that_could_not_be_locked_for_lack_of_memory_come_later(consumer, service):
    for i in range(10):
        service.announce(f"s{i}")
    client = consumer(heartbeat_interval=2.0, auto_claim=False)
    service.redis.xgroup_create(service.lbs, service.group, "0")
    service.redis.config_set("maxmemory", 1)
    announced = set(service.entries())
    notes = await client.init()
    # Each was read and put back, so that nobody takes it for a dead owner's; one after the other.
    await eventually(
        lambda: announced.isdisjoint(service.entries()) and len(service.pending()) <= 1
    )
    requeuer = set(service.entries())
    await nothing_comes(notes, 0.5)
    # From then on one is read, and put back, now and then.
    assert len(service.entries()) == 10
    assert len(requeuer - set(service.entries())) < 5
    service.redis.config_set("maxmemory", 0)
    assert sorted(names(await take(notes, 10))) == sorted(f"s{i}" for i in range(10))
    await eventually(lambda: len(service.locks()) == 10)
    fields = dict(service.redis.xrange(service.lbs))
    assert not any(b"_retry_count" in each for each in fields.values())


async def test_a_forgotten_script_is_loaded_again(consumer, service):
    for i in range(3):
        service.announce(f"s{i}")
    client = consumer(heartbeat_interval=2.0)
    await take(await client.init(), 3)
    service.redis.script_flush()
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() == 2)
    assert len(service.locks()) == 3
    service.redis.script_flush()
    await client.done_stream("s0")
    service.redis.script_flush()
    await client.release("s1")
    assert "s0" not in {key.split(SEPARATOR)[0] for key in service.locks()}


async def test_the_end_of_renewal_ends_the_client(consumer, service, monkeypatch):
    service.announce("s1")

    async def broken(*args: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(LeaseRenewer, "_renew_all", broken)
    client = consumer()
    notes = await client.init()
    last = [n async for n in notes][-1]
    assert "renewer failed: a mistake of ours" in last.additional_info["info"]


async def test_what_is_locked_late_may_be_anothers_already(
    consumer, service, deployment, monkeypatch
):
    """On a cluster, where nobody can look at a lock and put its entry back in one step."""
    acquire = Locks.acquire
    delays = [1.2 * QUICK]

    async def late(locks, keys):
        if delays:
            await asyncio.sleep(delays.pop())
        return await acquire(locks, keys)

    monkeypatch.setattr(Locks, "acquire", late)
    quick = RecoveryConfig(reconciliation_interval=3600, min_idle_time=QUICK)
    notes = await consumer(auto_claim=False, heartbeat_interval=8 * QUICK, recovery=quick).init()
    entry_id = service.announce("s1")
    ((_, payload, *_),) = await take(notes, 1)
    assert (payload.id_in_lbs == entry_id) == (deployment != "cluster")
    ((_, fields),) = service.redis.xrange(service.lbs)
    assert b"_retry_count" not in fields  # nobody had owned it
    assert len(service.locks()) == 1
    # How long a read has waited for it is no matter.
    await asyncio.sleep(1.2 * QUICK)
    entry_id = service.announce("s2")
    ((_, payload, *_),) = await take(notes, 1)
    assert payload.id_in_lbs == entry_id


async def test_renewal_ends_however_often_it_is_cancelled(consumer, caplog):
    client = consumer()
    notes = await client.init()
    renewer = client._engine._running("renewer")
    await asyncio.sleep(0.1)
    for _ in range(3):
        renewer.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({renewer})
    assert renewer.cancelled()
    assert not [t for t in threading.enumerate() if t.name.startswith("relstream")]
    (last,) = await take(notes, 1, TERMINATED)
    assert "renewer was cancelled" in last.additional_info["info"]
    await asyncio.sleep(0.1)
    assert "Exception in callback" not in caplog.text


async def test_a_big_batch_is_locked_and_renewed_whole(consumer, service):
    for start in range(0, 5000, 500):
        pipe = service.redis.pipeline(transaction=False)
        for i in range(start, start + 500):
            pipe.xadd(service.lbs, {"lbs-input": f'{{"DataStreamName":"s{i}","Info":null}}'})
        pipe.execute()
    notes = await consumer(queue_size=5000).init()
    assert len({n.payload for n in await take(notes, 5000, ADDED)}) == 5000
    renewals = Renewals(service)
    assert len(service.locks()) == 5000
    await eventually(lambda: renewals.seen() == 2)


async def test_what_was_lost_and_came_back_untold_is_not_finished_by_the_old_worker(
    consumer, service
):
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    old_id = service.announce("s1")
    (old,) = await take(notes, 1)
    service.requeuer(old_id)
    service.redis.delete(f"s1{SEPARATOR}{old_id}")
    # The application does not look: it has not heard of the loss, nor of what it owns instead.
    owned = client._engine.partitions[0].leases
    await eventually(lambda: (head := owned.get("s1")) and head.id_in_lbs != old_id)
    new_id = owned.get("s1").id_in_lbs
    for give_up in (client.done_stream, client.release):
        for what in ("s1", old.payload):
            with pytest.raises(StreamNotOwned, match="lost"):
                await give_up(what)
    assert service.entries() == service.pending() == [new_id]
    (lost,) = await take(notes, 1, DISOWNED)
    (new,) = await take(notes, 1)
    assert lost.payload == old.payload == ("s1", old_id)
    assert new.payload == ("s1", new_id)
    for give_up in (client.done_stream, client.release):
        with pytest.raises(StreamNotOwned, match=old_id):
            await give_up(old.payload)
    assert service.entries() == service.pending() == [new_id]
    await client.done_stream(new.payload)
    assert (service.entries(), service.locks()) == ([], {})


async def test_each_announcement_of_an_owned_stream_tells_which_one_is_meant(consumer, service):
    client = consumer()
    notes = await client.init()
    service.announce("s1")
    (told,) = await take(notes, 1)
    again = service.announce("s1")
    await eventually(lambda: len(service.locks()) == 2)
    with pytest.raises(StreamNotOwned):
        await client.done_stream(LBSInfo("s1", "1-1"))
    with pytest.raises(StreamNotOwned):
        await client.done_stream(LBSInfo("s2", again))
    await client.release(told.payload)
    (told,) = await take(notes, 1)
    # They may be read one after the other.
    owned = client._engine.partitions[0].leases
    await eventually(lambda: (head := owned.get("s1")) and len(locks_of(head)) == 2)
    await client.done_stream(told.payload)
    await eventually(lambda: not service.entries() and not service.locks())


async def test_a_finish_that_failed_leaves_one_ownership_though_it_was_announced_again(
    consumer, service
):
    client = consumer()
    notes = await client.init()
    service.announce("s1")
    (told,) = await take(notes, 1)
    owned = client._engine.partitions[0].leases
    head = owned.get("s1")
    head.finishing = True  # as `done_stream` says; then it is announced, and taken, again ...
    service.announce("s1")
    await eventually(lambda: owned.get("s1") is not head)
    head.finishing = False
    owned.restore(head)  # ... and Redis refuses to finish it
    await nothing_comes(notes, 0.1)  # it was told of, and is owned as before
    await client.done_stream(told.payload)
    assert (service.entries(), service.pending(), service.locks()) == ([], [], {})
    await nothing_comes(notes, 0.1)


async def test_a_lock_taken_unheard_of_is_ours_for_its_full_time(consumer, service):
    (entry_id,) = service.orphan(1, "other")
    client = consumer("c1", auto_claim=False)
    await client.init()
    service.redis.xclaim(service.lbs, service.group, "c1", 0, [entry_id])
    # Its reply was lost, and so was all hope in it but for half a second.
    service.redis.set(lock("s0", entry_id), "c1", px=500)
    leases = client._engine.partitions[0].leases
    read = batch_of(resp_entry(entry_id.encode(), b"lbs-input", b'{"DataStreamName":"s0"}'))
    entries, _, _ = announcements(
        read, b"lbs-input", b"_retry_count", SEPARATOR.encode(), json.loads
    )
    now = asyncio.get_running_loop().time()
    new, refusals = await leases.acquire(entries, now, again=True)
    assert (len(new), refusals) == (1, [])
    assert service.redis.pttl(lock("s0", entry_id)) > 1000 * HEARTBEAT / 2
