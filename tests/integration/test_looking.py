"""Deaths are looked for, also where nothing can be done about some entries, or not at once."""

from __future__ import annotations

import asyncio

import pytest
from helpers import SEPARATOR, eventually, names, nothing_comes, take

from relstream import AlreadyClaimed, LBSInfo, RecoveryConfig
from relstream.errors import ReplyError
from relstream.recovery import prober, scanner

# By looking, or by expiry events alone.
NO_SCANS = RecoveryConfig(reconciliation_interval=3600, min_idle_time=3600)
# Locks so short that what was just read counts as forgotten soon.
SHORT = 0.5


async def test_a_walk_that_takes_long_holds_up_no_other(consumer, service, monkeypatch):
    walk = scanner.Scanner.walk
    under_way = asyncio.Event()

    async def endless(recoverer, min_idle_ms, tally, consumer=None):
        if consumer != b"stuck":
            await walk(recoverer, min_idle_ms, tally, consumer)
            return
        under_way.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(scanner.Scanner, "walk", endless)
    service.orphan(1, "stuck")
    notes = await consumer(heartbeat_interval=SHORT, recovery=NO_SCANS).init()
    await asyncio.wait_for(under_way.wait(), 10)
    service.orphan(1)
    assert names(await take(notes, 1)) == ["s1"]
    # Nor does it hold up what events tell.
    (entry_id,) = service.orphan(1, "stuck")
    service.redis.set(f"s2{SEPARATOR}{entry_id}", "stuck", px=1)
    assert names(await take(notes, 1)) == ["s2"]
    assert len(service.pending("stuck")) == 1


async def test_who_comes_just_after_an_outage_takes_nothing_from_the_living(consumer, service):
    """Whose locks have expired meanwhile, and who may be a moment later in being back."""
    living = consumer("living", heartbeat_interval=1.0, recovery=NO_SCANS, auto_claim=False)
    notes = await living.init()
    for i in range(20):
        service.announce(f"s{i}")
    await take(notes, 20)
    await asyncio.sleep(2.2)  # what was only just read would be left alone anyway
    newcomer = consumer("newcomer", heartbeat_interval=2.0, recovery=NO_SCANS)
    service.redis.delete("svc-input-reconciler")
    for lock in service.locks():
        service.redis.delete(lock)
    await newcomer.init()
    await eventually(lambda: newcomer._engine.partitions[0].recoverer.leads)
    await eventually(lambda: len(service.locks()) == 20)
    await nothing_comes(notes, 1.5)
    assert set(service.locks().values()) == {"living"}
    service.orphan(1)
    await eventually(lambda: not service.pending("ghost"))  # the dead are found as ever


async def test_the_longer_nothing_can_be_done_the_less_it_is_tried(consumer, service, monkeypatch):
    monkeypatch.setattr(prober, "PROBE_EVERY", 0.01)
    monkeypatch.setattr(prober, "PROBE_AGAIN", 0.02)
    service.redis.set(service.dlq, "in the way")
    stuck = service.orphan(1, _retry_count="3")
    client = consumer(heartbeat_interval=SHORT, recovery=NO_SCANS)
    await client.init()
    recoverer = client._engine.partitions[0].recoverer
    await eventually(lambda: recoverer.prober._fruitless.get(b"ghost", (0, 0))[1] > 10 * 0.02)
    assert service.pending("ghost") == stuck
    service.redis.delete(service.dlq)
    await eventually(lambda: not service.pending("ghost"))
    assert service.redis.xlen(service.dlq) == 1


async def test_behind_what_nothing_can_be_done_about_a_death_is_seen_at_once(
    consumer, service, monkeypatch
):
    """However long the pause has grown with which the former is tried."""
    monkeypatch.setattr(prober, "PROBE_AGAIN", 3600.0)
    service.redis.set(service.dlq, "in the way")
    stuck = service.orphan(4, "owner", _retry_count="3")
    ids = service.orphan(2, "owner")
    locks = [f"{name}{SEPARATOR}{i}" for name, i in zip(("s4", "s5"), ids, strict=True)]
    for lock in locks:
        service.redis.set(lock, "owner")
    client = consumer(heartbeat_interval=SHORT, recovery=NO_SCANS)
    notes = await client.init()
    recoverer = client._engine.partitions[0].recoverer
    await eventually(lambda: recoverer.prober._held.get(b"owner") == {i.encode() for i in ids})
    for lock in locks:  # no event tells of it
        service.redis.delete(lock)
    assert sorted(names(await take(notes, 2))) == ["s4", "s5"]
    assert service.pending("owner") == stuck


async def test_a_scan_that_broke_off_is_repeated_soon(consumer, service, monkeypatch):
    monkeypatch.setattr(scanner, "SCAN_AGAIN", 0.1)
    walk = scanner.Scanner.walk
    broken = []

    async def breaking_off(recoverer, *args):
        if len(broken) < 2:
            broken.append(args)
            raise ReplyError("BUSY Redis is busy running a script")
        await walk(recoverer, *args)

    monkeypatch.setattr(scanner.Scanner, "walk", breaking_off)
    service.orphan(1)
    await asyncio.sleep(0.05)
    once = RecoveryConfig(reconciliation_interval=3600, min_idle_time=0.01)
    notes = await consumer(auto_claim=False, recovery=once).init()
    assert names(await take(notes, 1)) == ["s0"]
    assert len(broken) == 2


async def test_an_id_alone_makes_no_death(consumer, service):
    """Another service's stream may have an entry of the same id, and its lock no service's name."""
    client = consumer(recovery=NO_SCANS)  # looking comes a heartbeat later
    notes = await client.init()
    await eventually(lambda: client._engine.partitions[0].recoverer.leads)
    # As if it had been read, and were about to be locked.
    (entry_id,) = service.orphan(1, "busy")
    service.redis.set(f"other{SEPARATOR}{entry_id}", "whoever", px=1)
    with pytest.raises(AlreadyClaimed, match="another stream"):
        await client.claim(LBSInfo("other", entry_id))
    await nothing_comes(notes, 1.0)
    assert service.pending("busy") == [entry_id]
    service.redis.set(f"s0{SEPARATOR}{entry_id}", "busy", px=1)
    assert names(await take(notes, 1)) == ["s0"]


async def test_each_kind_of_trouble_is_said(consumer, service, caplog):
    """Also when another was there before, and passed."""
    service.orphan(1)
    client = consumer(heartbeat_interval=SHORT, recovery=NO_SCANS)
    recoverer = client._engine.partitions[0].recoverer
    recoverer.steps.complain(1, "put back", ReplyError("OOM as it was"))
    notes = await client.init()
    await take(notes, 1)
    recoverer.steps.complain(1, "put back", ReplyError("OOM as it is again"))
    service.redis.set(service.dlq, "in the way")
    service.orphan(1, _retry_count="3")
    await eventually(lambda: f"dead-letter stream {service.dlq}" in caplog.text)
    assert caplog.text.count("can't be put back") == 2


@pytest.mark.parametrize(("heartbeat", "lasts"), [(0.1, 500), (0.7, 700), (2.0, 1000)])
async def test_leadership_ends_in_time_for_short_locks(consumer, service, heartbeat, lasts):
    """Who follows a dead leader has to find its streams within a second of their locks' end."""
    await consumer(heartbeat_interval=heartbeat).init()
    key = "svc-input-reconciler"
    await eventually(lambda: service.redis.exists(key))
    assert lasts / 2 < service.redis.pttl(key) <= lasts
