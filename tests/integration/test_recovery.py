"""Streams of dead owners come back; those of living ones stay; what can't be served is routed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from helpers import ADDED, SEPARATOR, Heard, Renewals, eventually, names, nothing_comes, take

from relstream import AlreadyClaimed, InvalidOption, LBSInfo, RecoveryConfig
from relstream.recovery import election, prober

SCAN_ONLY = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.5, batch_size=50)


def retries(service):
    return [fields.get(b"_retry_count") for _, fields in service.redis.xrange(service.lbs)]


async def test_orphans_are_found_by_the_scan_alone(consumer, service):
    service.orphan(120)
    notes = await consumer(auto_claim=False, recovery=SCAN_ONLY).init()
    assert sorted(names(await take(notes, 120))) == sorted(f"s{i}" for i in range(120))
    assert set(retries(service)) == {b"1"}
    assert service.pending("ghost") == []
    await nothing_comes(notes, 0.5)


async def test_orphans_are_found_by_looking_before_any_scan(consumer, service):
    service.orphan(120)
    # Its scans look at what was idle for 30 s only.
    notes = await consumer(heartbeat_interval=2.0).init()
    assert len(await take(notes, 120)) == 120
    await nothing_comes(notes, 0.5)


async def test_slow_but_living_owners_are_left_alone_however_many_stand_before(consumer, service):
    living = service.orphan(60, "slow")
    for i, entry_id in enumerate(living):
        service.redis.set(f"s{i}{SEPARATOR}{entry_id}", "slow")
    dead = service.orphan(10)
    # Who looks for deaths would find them without a scan.
    notes = await consumer(auto_claim=False, recovery=SCAN_ONLY).init()
    got = await take(notes, 10)
    assert sorted(names(got)) == sorted(f"s{i}" for i in range(60, 70))
    assert not {n.payload.id_in_lbs for n in got} & set(dead)
    await nothing_comes(notes, 1.0)
    assert service.pending("slow") == living


async def test_too_many_retries_make_a_dead_letter(consumer, service):
    (entry_id,) = service.orphan(1, _retry_count="3", other="kept")
    notes = await consumer(recovery=SCAN_ONLY).init()
    await eventually(lambda: not service.entries())  # it is added there before it is deleted here
    ((_, letter),) = service.redis.xrange(service.dlq)
    assert letter[b"_retry_count"] == b"4"
    assert letter[b"_dlq_reason"] == b"max_retries_exceeded"
    assert letter[b"_source_id"] == entry_id.encode()
    assert letter[b"other"] == b"kept"
    await eventually(lambda: (service.entries(), service.pending()) == ([], []))
    await nothing_comes(notes, 0.3)


@pytest.mark.parametrize("count", ["", "x", "-5", "1.5"])
async def test_a_malformed_retry_count_reads_as_none(consumer, service, count):
    service.orphan(1, _retry_count=count)
    await take(await consumer(recovery=SCAN_ONLY).init(), 1)
    assert retries(service) == [b"1"]


async def test_no_retries_at_all(consumer, service):
    service.orphan(3)
    none = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.2, max_retries=0)
    await consumer(recovery=none).init()
    await eventually(lambda: not service.entries())
    assert service.redis.xlen(service.dlq) == 3


async def test_an_unwritable_dead_letter_stream_loses_nothing(consumer, service):
    service.redis.set(service.dlq, "in the way")
    ids = service.orphan(1, _retry_count="3")
    service.orphan(1)
    notes = await consumer(recovery=SCAN_ONLY).init()
    assert names(await take(notes, 1)) == ["s1"]
    await asyncio.sleep(0.5)
    assert service.pending("ghost") == ids
    service.redis.delete(service.dlq)
    await eventually(lambda: service.redis.xlen(service.dlq) == 1)


@pytest.mark.parametrize("why", ["memory", "rights"])
async def test_a_refused_dead_letter_stays_pending(consumer, service, redis_url, why):
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all"]
    )
    heard = Heard()
    url = redis_url.replace("://", "://app:x@")
    await consumer(url=url, recovery=SCAN_ONLY, recorder=heard).init()
    if why == "memory":
        ids = service.orphan(2, _retry_count="3")
        service.redis.config_set("maxmemory", 1)
    else:
        service.redis.acl_setuser(
            "app", reset_keys=True, channels=["*"], commands=["+@all"], enabled=True, nopass=True,
            keys=[service.lbs, "svc-input-reconciler", f"*{SEPARATOR}*"],
        )  # fmt: skip
        ids = service.orphan(2, _retry_count="3")
    scans = len(heard.calls("reconciliation_scan"))
    await eventually(lambda: len(heard.calls("reconciliation_scan")) > scans + 2)
    assert service.pending("ghost") == service.entries() == ids
    assert heard.calls("dlq_routing") == []
    service.redis.config_set("maxmemory", 0)
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all"]
    )
    await eventually(lambda: heard.calls("dlq_routing"))
    assert (service.entries(), service.redis.xlen(service.dlq)) == ([], 2)
    routed = heard.calls("dlq_routing")
    assert sorted(stream for streams, _ in routed for stream in streams) == ["s0", "s1"]
    assert {reason for _, reason in routed} == {"max_retries_exceeded"}


@pytest.mark.parametrize("scripts", [True, False])
async def test_the_recorder_hears_of_recovery(consumer, service, redis_url, scripts, monkeypatch):
    monkeypatch.setattr("relstream.lbs.vanished.HEARD", 0.0)
    living = service.orphan(2, "slow")
    for i, entry_id in enumerate(living):
        service.redis.set(f"s{i}{SEPARATOR}{entry_id}", "slow")
    service.orphan(3)  # s2 to s4
    service.orphan(1, _retry_count="3")
    service.redis.xdel(service.lbs, *service.orphan(1))
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "+@scripting" if scripts else "-@scripting"],
    )  # fmt: skip
    await asyncio.sleep(0.6)  # idle for long enough, and for longer than a lock lives
    heard = Heard()
    client = consumer(
        url=redis_url.replace("://", "://app:x@"),
        recovery=SCAN_ONLY,
        recorder=heard,
        auto_claim=False,
    )
    notes = await client.init()
    got = await take(notes, 3)
    await eventually(lambda: len(heard.calls("reconciliation_scan")) >= 2)
    ((success, count, took),) = heard.calls("startup_recovery")
    assert (success, count) == (True, 3)
    assert 0 < took < 10
    first, second, *_ = heard.calls("reconciliation_scan")
    assert first[:4] == (3, 2, 1, 1)
    assert second[:4] == (0, 2, 0, 0)
    requeues = heard.calls("requeue")
    assert sorted(stream for streams, _ in requeues for stream in streams) == ["s2", "s3", "s4"]
    assert {success for _, success in requeues} == {True}
    assert heard.calls("dlq_routing") == [(["s5"], "max_retries_exceeded")]
    assert heard.calls("alive_skip")[:2] == [(2,), (2,)]
    gaps = heard.calls("ack_add_gap")
    assert [count for count, _ in gaps] == ([] if scripts else [3])
    # Another is first, after the entry was looked at.
    put = client._engine.partitions[0].recoverer._requeuer.requeue_planned
    entry_id = got[0].payload.id_in_lbs

    async def put_late(plan, **how):
        service.redis.xack(service.lbs, service.group, entry_id)
        return await put(plan, **how)

    client._engine.partitions[0].recoverer._requeuer.requeue_planned = put_late
    service.redis.delete(f"{got[0].payload.data_stream_name}{SEPARATOR}{entry_id}")
    with pytest.raises(AlreadyClaimed):
        await client.claim(got[0].payload)
    assert ([got[0].payload.data_stream_name], False) in heard.calls("requeue")
    service.redis.xdel(service.lbs, entry_id)


async def test_an_entry_that_can_not_be_added_stays_pending(consumer, service):
    ids = service.orphan(3)
    service.redis.execute_command("XSETID", service.lbs, f"{2**64 - 1}-{2**64 - 1}")
    heard = Heard()
    notes = await consumer(auto_claim=False, recovery=SCAN_ONLY, recorder=heard).init()
    await eventually(lambda: len(heard.calls("reconciliation_scan")) > 2)
    assert service.pending("ghost") == service.entries() == ids
    service.redis.execute_command("XSETID", service.lbs, ids[-1])
    assert sorted(names(await take(notes, 3))) == ["s0", "s1", "s2"]
    assert retries(service) == [b"1"] * 3


async def test_of_several_that_only_scan_one_does(consumer, service):
    heard = Heard()
    for i in range(3):
        await consumer(f"c{i}", auto_claim=False, recovery=SCAN_ONLY, recorder=heard).init()
    await eventually(lambda: heard.calls("reconciliation_scan"))
    await asyncio.sleep(2.0)
    assert len(heard.calls("startup_recovery")) == 1
    assert 3 <= len(heard.calls("reconciliation_scan")) <= 9  # 0.27 s at least are in between


@pytest.mark.slow
async def test_a_burst_of_expiries_is_recovered_by_events_alone(consumer, service, monkeypatch):
    async def no_look(self):
        pass

    monkeypatch.setattr(prober.Prober, "_look", no_look)
    count = 5000
    pipe = service.redis.pipeline()
    for i, entry_id in enumerate(service.orphan(count)):
        pipe.set(f"s{i}{SEPARATOR}{entry_id}", "ghost", px=2000)
    pipe.execute()
    notes = await consumer(queue_size=count).init()
    got: set[str] = set()
    async for note in notes:
        if note.type is ADDED:
            got.add(note.payload.data_stream_name)
            if len(got) == count:
                break
    assert service.pending("ghost") == []
    assert set(retries(service)) == {b"1"}


async def test_what_vanished_is_acknowledged(consumer, service):
    ids = service.orphan(3)
    service.redis.xdel(service.lbs, ids[1])
    notes = await consumer(recovery=SCAN_ONLY).init()
    assert sorted(names(await take(notes, 2))) == ["s0", "s2"]
    await eventually(lambda: service.pending("ghost") == [])


async def test_claim_puts_back_what_is_free(consumer, service):
    client = consumer(auto_claim=False)
    (entry_id,) = service.orphan(1)
    notes = await client.init()
    await client.claim(LBSInfo("s0", entry_id))
    (got,) = await take(notes, 1)
    assert got.payload.id_in_lbs > entry_id
    with pytest.raises(AlreadyClaimed, match="finished"):
        await client.claim(LBSInfo("s0", entry_id))
    with pytest.raises(AlreadyClaimed, match="lock is held"):
        await client.claim(got.payload)
    with pytest.raises(InvalidOption):
        await client.claim(LBSInfo("s0", "nonsense"))


async def test_several_claims_at_once_requeue_once(consumer, service):
    clients = [consumer(f"c{i}", auto_claim=False, max_streams=1) for i in range(3)]
    (entry_id,) = service.orphan(1)
    for client in clients:
        await client.init()
    outcomes = await asyncio.gather(
        *[c.claim(LBSInfo("s0", entry_id)) for c in clients * 5], return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == (
        ["AlreadyClaimed"] * 14 + ["NoneType"]
    )
    assert len(service.entries()) == 1


async def test_one_leads_and_another_follows(consumer, service, monkeypatch):
    monkeypatch.setattr("relstream.recovery.election.LEADERSHIP", 4.0)
    clients = [consumer(f"c{i}") for i in range(3)]
    for client in clients:
        await client.init()
    key = "svc-input-reconciler"
    await eventually(lambda: service.redis.get(key))
    leader = service.redis.get(key).decode()
    renewals = Renewals(service, [key])
    await eventually(lambda: renewals.seen() == 2)
    assert service.redis.get(key).decode() == leader
    await next(client for client in clients if leader.startswith(f"{client.id}#")).aclose()
    assert service.redis.get(key) != leader.encode()  # it does not keep the others waiting
    await eventually(lambda: service.redis.get(key))


@pytest.mark.only("single", reason="counts the commands of one server")
async def test_only_who_leads_looks_for_deaths(consumer, service):
    def looks() -> int:
        stats = service.redis.info("commandstats")
        calls = {name: each["calls"] for name, each in stats.items()}
        return sum(n for name, n in calls.items() if name.startswith("cmdstat_xinfo"))

    async def looks_in(seconds: float) -> int:
        before = looks()
        await asyncio.sleep(seconds)
        return looks() - before

    clients = [consumer(f"c{i}") for i in range(5)]
    await clients[0].init()
    key = "svc-input-reconciler"
    await eventually(lambda: (service.redis.get(key) or b"").startswith(b"c0#"))
    before = looks()
    await eventually(lambda: looks() > before + 2)  # it has begun: one may be about consumers gone
    alone = await looks_in(3)
    for client in clients[1:]:
        await client.init()
    assert 5 < await looks_in(3) < 1.5 * alone
    # Who was away for long enough finds another in its place, and is silent from then on.
    service.redis.set(key, "another", px=60_000)
    await asyncio.sleep(election.LEADERSHIP / 2)
    assert await looks_in(2) == 0
    service.redis.delete(key)
    await eventually(
        lambda: (service.redis.get(key) or b"").partition(b"#")[0] in {b"c%d" % i for i in range(5)}
    )
    # A key that is gone before its time: first owners are given the time to renew their locks.
    before = looks()
    await eventually(lambda: looks() > before)


async def test_scripts_forbidden_by_acl(consumer, service, redis_url):
    service.redis.acl_setuser(
        "noscripts", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-@scripting"],
    )  # fmt: skip
    living = service.orphan(5, "slow")
    for i, entry_id in enumerate(living):
        service.redis.set(f"s{i}{SEPARATOR}{entry_id}", "slow")
    service.orphan(30)
    url = redis_url.replace("://", "://noscripts:x@")
    notes = await consumer(url=url, recovery=SCAN_ONLY).init()
    assert len(await take(notes, 30)) == 30
    await nothing_comes(notes, 0.5)
    assert service.pending("slow") == living


async def test_recovery_goes_on_out_of_memory(consumer, service):
    service.orphan(20)
    # What can't be locked is put back again and again.
    notes = await consumer(recovery=replace(SCAN_ONLY, max_retries=1000)).init()
    service.redis.config_set("maxmemory", 1)
    await eventually(lambda: not service.pending("ghost"))
    assert len(service.entries()) == 20
    service.redis.config_set("maxmemory", 0)
    assert len(await take(notes, 20)) == 20
