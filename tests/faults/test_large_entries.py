"""Entries with much in them: recovered and handed over a few at a time."""

from __future__ import annotations

from helpers import Renewals, eventually, take, weigh

from relstream import RecoveryConfig

MB = 1 << 20


def announce(service, count, size):
    info = '{"a": "' + "x" * size + '"}'
    for i in range(count):
        service.announce(f"s{i}", info)


async def test_a_backlog_of_large_entries_is_read_a_few_at_a_time(consumer, service):
    announce(service, 60, MB)
    client = consumer()
    sizes = weigh(client._engine.partitions[0].fetcher._reading)
    notes = await client.init()
    assert len(await take(notes, 60)) == 60
    assert 0 < max(sizes) < 5 * MB


async def test_many_large_orphans_are_recovered(consumer, service):
    announce(service, 60, MB)
    service.redis.xgroup_create(service.lbs, service.group, "0")
    for _ in range(12):
        service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"}, count=5)
    pages = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=1, batch_size=10)
    client = consumer(max_streams=1, queue_size=2, recovery=pages)
    sizes = weigh(client._engine.partitions[0].recoverer._link)
    await client.init()
    await eventually(lambda: not service.pending("ghost"))
    assert len(service.entries()) == 60
    assert 0 < max(sizes) < 3 * MB


async def test_an_owner_of_large_entries_hands_them_over(consumer, service):
    announce(service, 30, 2 * MB)
    idle = RecoveryConfig(min_idle_time=3600)
    owner = consumer("owner", recovery=idle)
    notes = await owner.init()
    assert len(await take(notes, 30)) == 30
    await owner.aclose()
    assert (service.pending(), len(service.entries())) == ([], 30)
    counts = [fields.get(b"_retry_count") for _, fields in service.redis.xrange(service.lbs)]
    assert counts == [None] * 30


async def test_leadership_does_not_wait_for_what_is_being_recovered(consumer, service, monkeypatch):
    monkeypatch.setattr("relstream.recovery.election.LEADERSHIP", 4.0)
    leader = consumer(
        "leader", heartbeat_interval=30.0, recovery=RecoveryConfig(min_idle_time=3600)
    )
    await leader.init()
    key = "svc-input-reconciler"
    await eventually(lambda: (service.redis.get(key) or b"").startswith(b"leader#"))
    protocol = await leader._engine._connections.recovering.link(service.lbs.encode()).get()
    protocol._transport.pause_reading()  # a reply that takes long
    renewals = Renewals(service, [key])
    await eventually(lambda: renewals.seen() == 3)
    assert protocol.alive
    protocol._transport.resume_reading()
