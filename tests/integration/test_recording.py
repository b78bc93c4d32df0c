"""What a recorder is called with: counts and outcomes, once a batch."""

from __future__ import annotations

import asyncio
import contextvars
import random

import pytest
from helpers import DISOWNED, QUICK, SEPARATOR, Heard, eventually, names, take

from relstream import Producer, RecoveryConfig, RetryConfig, StreamNotOwned
from relstream.ownership import completion

# Finds nothing by itself within a test.
NEVER = RecoveryConfig(reconciliation_interval=60.0)


def ended(heard):
    """How the streams ended: each once, or this fails."""
    outcomes = {}
    for streams, outcome in heard.calls("stream_processing_end"):
        assert streams
        for stream in streams:
            assert stream not in outcomes
            outcomes[stream] = outcome
    return outcomes


def totals(heard, what):
    """How many locks that succeeded and failed for, all batches together."""
    calls = heard.calls(what)
    assert all(succeeded + failed and duration > 0 for succeeded, failed, duration in calls)
    return sum(call[0] for call in calls), sum(call[1] for call in calls)


async def test_a_batch_is_recorded_once(consumer, service):
    for i in range(200):
        service.announce(f"s{i}")
    heard = Heard()
    client = consumer(recorder=heard, recovery=NEVER)
    notes = await client.init()
    wanted = names(await take(notes, 200))
    assert sorted(heard.calls("stream_processing_start")) == sorted((name,) for name in wanted)
    await asyncio.gather(*map(client.done_stream, wanted))
    assert ended(heard) == dict.fromkeys(wanted, "done")
    assert totals(heard, "lock_acquisition") == totals(heard, "lock_release") == (200, 0)
    for what in ("lock_acquisition", "lock_release", "stream_processing_end"):
        assert len(heard.calls(what)) < 20


def restrict(service, scripts):
    """A user `app`, who may run scripts or not."""
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "+@scripting" if scripts else "-@scripting"],
    )  # fmt: skip


def take_away(service, stream, entry_id):
    """Another consumer recovers the entry of a stream, and finishes it."""
    with service.redis.pipeline(transaction=True) as pipe:
        pipe.xack(service.lbs, service.group, entry_id)
        pipe.xdel(service.lbs, entry_id)
        pipe.execute()
    service.redis.delete(f"{stream}{SEPARATOR}{entry_id}")


@pytest.mark.parametrize("scripts", [True, False])
async def test_each_stream_ends_once_with_its_outcome(consumer, service, redis_url, scripts):
    restrict(service, scripts)
    heard = Heard()
    url = redis_url.replace("://", "://app:x@")
    client = consumer(url=url, recorder=heard, recovery=NEVER)
    for name in ("done", "released", "late", "kept"):
        service.announce(name)
    notes = await client.init()
    at = {n.payload.data_stream_name: n.payload.id_in_lbs for n in await take(notes, 4)}
    take_away(service, "late", at["late"])
    with pytest.raises(StreamNotOwned):
        await client.done_stream("late")
    await client.done_stream("done")
    assert ended(heard) == {"late": "lost", "done": "done"}
    await client.release("released")
    await client.aclose()
    # What was released came back, but the application has not been notified of it.
    assert ended(heard) == {
        "late": "lost", "done": "done", "released": "released", "kept": "released",
    }  # fmt: skip


async def test_a_lost_stream_ends_once_however_often_it_was_announced(consumer, service):
    heard = Heard()
    client = consumer(recorder=heard, recovery=NEVER, heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    first = service.announce("s1")
    service.announce("s2")
    await take(notes, 2)
    service.announce("s1")
    await eventually(lambda: len(service.locks()) == 3)
    take_away(service, "s1", first)
    assert names(await take(notes, 1, DISOWNED)) == ["s1"]
    assert names(await take(notes, 1)) == ["s1"]  # the other announcement went back
    assert ended(heard) == {"s1": "lost"}
    await eventually(lambda: totals(heard, "lock_extension")[1] == 1)
    await client.done_stream("s2")
    assert ended(heard) == {"s1": "lost", "s2": "done"}


async def test_a_stream_announced_again_while_it_is_found_lost_ends_once(
    consumer, service, monkeypatch
):
    heard = Heard()
    client = consumer(recorder=heard, recovery=NEVER, heartbeat_interval=60.0)
    notes = await client.init()
    first = service.announce("s1")
    await take(notes, 1)
    again = asyncio.Event()

    async def late(*args):
        await again.wait()
        return await run(*args)

    run = completion.run
    monkeypatch.setattr(completion, "run", late)
    finishing = asyncio.create_task(client.done_stream("s1"))
    await asyncio.sleep(0)
    take_away(service, "s1", first)  # no renewal finds that any more
    service.announce("s1")
    await take(notes, 1)
    again.set()
    with pytest.raises(StreamNotOwned):
        await finishing
    assert ended(heard) == {"s1": "lost"}
    assert len(heard.calls("stream_processing_start")) == 2
    await client.done_stream("s1")
    outcomes = [outcome for _, outcome in heard.calls("stream_processing_end")]
    assert outcomes == ["lost", "done"]


async def test_what_can_not_be_handed_over_is_lost(consumer, make_server):
    with make_server() as server:
        heard = Heard()
        client = consumer(url=server.url, retry=RetryConfig(max_retries=0), recorder=heard)
        notes = await client.init()
        async with Producer(server.url, "svc") as producer:
            await producer.announce_many([("s1", None), ("s2", None)])
        assert sorted(names(await take(notes, 2))) == ["s1", "s2"]
        await asyncio.to_thread(server.kill)
        await client.aclose()
        assert ended(heard) == {"s1": "lost", "s2": "lost"}


async def test_locks_that_others_hold_count_as_failed(consumer, service):
    entry_id = "1-1"
    service.redis.set(f"s1{SEPARATOR}{entry_id}", "somebody")
    heard = Heard()
    client = consumer(recorder=heard, recovery=NEVER)
    notes = await client.init()
    with service.redis.pipeline(transaction=True) as pipe:
        for name, fields in (("s1", entry_id), ("s2", "*")):
            value = f'{{"DataStreamName": "{name}", "Info": null}}'
            pipe.xadd(service.lbs, {"lbs-input": value}, id=fields)
        pipe.execute()
    assert names(await take(notes, 1)) == ["s2"]
    assert totals(heard, "lock_acquisition") == (1, 1)


async def test_locks_that_are_gone_when_they_are_released_count_as_failed(
    consumer, service, monkeypatch
):
    heard = Heard()
    client = consumer(recorder=heard, recovery=NEVER)
    notes = await client.init()
    for name in ("s1", "s2"):
        service.announce(name)
    taken = await take(notes, 2)
    lock = f"s1{SEPARATOR}{taken[0].payload.id_in_lbs}"

    async def after_the_lock(*args):  # it is not renewed any more
        assert service.redis.delete(lock) == 1
        return await run(*args)

    run = completion.run
    monkeypatch.setattr(completion, "run", after_the_lock)
    await asyncio.gather(client.done_stream("s1"), client.done_stream("s2"))
    assert totals(heard, "lock_release") == (1, 1)
    assert ended(heard) == {"s1": "done", "s2": "done"}


async def test_refused_renewals_count_as_failed(consumer, service, redis_url):
    restrict(service, scripts=True)
    heard = Heard()
    url = redis_url.replace("://", "://app:x@")
    client = consumer(url=url, recorder=heard, recovery=NEVER, heartbeat_interval=QUICK)
    for i in range(3):
        service.announce(f"s{i}")
    notes = await client.init()
    await take(notes, 3)
    await eventually(lambda: heard.calls("lock_extension"))
    before = totals(heard, "lock_extension")
    service.redis.acl_setuser("app", enabled=True, commands=["-pexpire", "-@scripting"])
    await eventually(lambda: totals(heard, "lock_extension")[1] > before[1])
    service.redis.acl_setuser("app", enabled=True, commands=["+@all"])


@pytest.mark.parametrize("scripts", [True, False])
async def test_what_the_leader_requeued_itself_is_no_failure(consumer, service, redis_url, scripts):
    """A scan and a probe come upon the same entries, and each is too late for some of them."""
    restrict(service, scripts)
    wanted = [f"s{i}" for i in range(len(service.orphan(1000)))]
    await asyncio.sleep(2 * QUICK)  # idle for long enough for both
    heard = Heard()
    client = consumer(
        url=redis_url.replace("://", "://app:x@"),
        recorder=heard,
        recovery=RecoveryConfig(reconciliation_interval=60.0, min_idle_time=QUICK),
        heartbeat_interval=QUICK,
        queue_size=1000,
    )
    await take(await client.init(), 1000)
    await eventually(lambda: heard.calls("reconciliation_scan"))
    requeues = heard.calls("requeue")
    assert sorted(stream for streams, _ in requeues for stream in streams) == sorted(wanted)
    assert {success for _, success in requeues} == {True}
    assert len(requeues) < 100
    ((*_, vanished, _),) = heard.calls("reconciliation_scan")
    assert vanished == 0


@pytest.mark.parametrize("scripts", [True, False])
async def test_events_probes_and_scans_of_one_leader_are_in_nobodys_way(
    consumer, service, redis_url, scripts
):
    """Whichever of them is first to try, and whichever is first to do it."""
    restrict(service, scripts)
    heard = Heard()
    client = consumer(
        url=redis_url.replace("://", "://app:x@"),
        recorder=heard,
        recovery=RecoveryConfig(reconciliation_interval=0.1, min_idle_time=0.2, batch_size=7),
        heartbeat_interval=QUICK,
        queue_size=1000,
    )
    recoverer = client._engine.partitions[0].recoverer
    came: dict[str, set[bytes]] = {"scan": set(), "probe": set(), "event": set()}
    put, walk, heed = (
        recoverer._requeuer.requeue_planned,
        recoverer.scanner.walk,
        recoverer.steps.recover_ids,
    )
    origin: contextvars.ContextVar[str] = contextvars.ContextVar("origin")

    async def slowly(plan, **how):
        came[origin.get()].update(plan.ids())
        await asyncio.sleep(random.uniform(0, 0.05))  # so that others come upon the same entries
        return await put(plan, **how)

    async def walked(*args):
        origin.set("probe" if len(args) > 2 else "scan")
        await walk(*args)

    async def heeded(*args):
        origin.set("event")
        return await heed(*args)

    recoverer._requeuer.requeue_planned = slowly
    recoverer.scanner.walk, recoverer.steps.recover_ids = walked, heeded
    notes = await client.init()
    await eventually(lambda: recoverer.leads)
    wanted = []
    for _ in range(3):
        ids = service.orphan(200)
        dead = [f"s{i}" for i in range(len(wanted), len(wanted) + 200)]
        with service.redis.pipeline(transaction=False) as pipe:
            for name, entry_id in zip(dead, ids, strict=True):
                pipe.set(f"{name}{SEPARATOR}{entry_id}", "ghost", px=300)
            pipe.execute()
        wanted += dead
        await take(notes, 200)
    requeues = heard.calls("requeue")
    assert sorted(stream for streams, _ in requeues for stream in streams) == sorted(wanted)
    assert {success for _, success in requeues} == {True}
    assert all(came.values()), {kind: len(ids) for kind, ids in came.items()}
    assert came["event"] & (came["scan"] | came["probe"])


async def test_where_another_recovers_first_is_a_failure_once(consumer, service):
    """Also for the passes that come upon the same entries as the one that was too late."""
    service.orphan(50)
    await asyncio.sleep(2 * QUICK)
    heard = Heard()
    client = consumer(
        recorder=heard,
        recovery=RecoveryConfig(reconciliation_interval=60.0, min_idle_time=QUICK),
        heartbeat_interval=QUICK,
    )
    requeuer = client._engine.partitions[0].recoverer._requeuer
    put = requeuer.requeue_planned

    async def too_late(plan, **how):
        for entry_id in plan.ids():
            service.redis.xack(service.lbs, service.group, entry_id)
        return await put(plan, **how)

    requeuer.requeue_planned = too_late
    await client.init()
    await eventually(lambda: len(heard.calls("reconciliation_scan")) == 1)
    await eventually(lambda: sum(len(streams) for streams, _ in heard.calls("requeue")) == 50)
    streams = [stream for streams, _ in heard.calls("requeue") for stream in streams]
    assert sorted(streams) == sorted(f"s{i}" for i in range(50))
    assert {success for _, success in heard.calls("requeue")} == {False}


async def test_what_was_requeued_since_it_was_seen_pending_has_not_vanished(
    consumer, service, monkeypatch
):
    monkeypatch.setattr("relstream.lbs.vanished.HEARD", 0.0)
    requeued, trimmed = service.orphan(2)
    heard = Heard()
    recovery = RecoveryConfig(reconciliation_interval=60.0, min_idle_time=0.1)
    client = consumer(recorder=heard, auto_claim=False, recovery=recovery)
    entries = client._engine.partitions[0].recoverer.steps._entries
    read = entries.read

    def meanwhile(ids, *page_size):
        if requeued.encode() in list(ids):
            service.requeuer(requeued)
        return read(ids, *page_size)

    entries.read = meanwhile
    service.redis.xdel(service.lbs, trimmed)
    await asyncio.sleep(0.2)
    await client.init()
    await eventually(lambda: heard.calls("reconciliation_scan"))
    assert heard.calls("reconciliation_scan")[0][:4] == (0, 0, 0, 1)
