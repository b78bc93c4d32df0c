"""What else can happen to a service: scripts forgotten, groups destroyed, events off, and so on."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import redis
from helpers import SEPARATOR, Monitor, eventually, names, nothing_comes, take

from relstream import NotificationType, RecoveryConfig
from relstream.recovery.result import ScanResult

SCAN_ONLY = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.2, batch_size=50)


class Ear:
    """Hears all that a client tells, in the background."""

    def __init__(self, notifications):
        self.told = []
        self._task = asyncio.ensure_future(self._hear(notifications))

    async def _hear(self, notifications):
        async for notification in notifications:
            self.told.append((notification.type, notification.payload.data_stream_name))

    def count(self, kind):
        return Counter(name for type_, name in self.told if type_ is kind)

    @property
    def owns(self):
        owned = self.count(NotificationType.STREAM_ADDED)
        owned.subtract(self.count(NotificationType.STREAM_DISOWNED))
        return +owned

    async def stop(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def listen():
    ears = []

    def make(notifications):
        ears.append(Ear(notifications))
        return ears[-1]

    yield make
    for ear in ears:
        await ear.stop()


async def test_scripts_flushed_between_all_that_uses_them(consumer, service):
    service.orphan(30)
    service.redis.script_flush()
    client = consumer(recovery=SCAN_ONLY)
    notes = await client.init()
    assert len(await take(notes, 30)) == 30  # put back
    service.redis.script_flush()
    await asyncio.sleep(1.2)  # renewed, longer than a lock lives
    assert len(service.locks()) == 30
    service.redis.script_flush()
    await asyncio.gather(*[client.done_stream(f"s{i}") for i in range(10)])
    service.redis.script_flush()
    await asyncio.gather(*[client.release(f"s{i}") for i in range(10, 20)])
    assert sorted(names(await take(notes, 10))) == [f"s{i}" for i in range(10, 20)]
    service.redis.script_flush()
    service.orphan(30)
    assert len(await take(notes, 30)) == 30
    await nothing_comes(notes, 0.3)


@pytest.mark.slow
async def test_scripts_flushed_all_the_time(consumer, service):
    flushes = 0

    async def flush():
        nonlocal flushes
        while True:
            service.redis.script_flush()
            flushes += 1
            await asyncio.sleep(0.01)

    service.orphan(300)
    flushing = asyncio.ensure_future(flush())
    try:
        pages = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.2, batch_size=10)
        client = consumer(recovery=pages)
        notes = await client.init()
        got = names(await take(notes, 300))
        assert Counter(got) == Counter(f"s{i}" for i in range(300))
        await asyncio.gather(*[client.done_stream(name) for name in got])
        assert (service.entries(), service.pending()) == ([], [])
        await eventually(lambda: not service.locks())
        await nothing_comes(notes, 0.3)
    finally:
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
    assert flushes > 10


@pytest.mark.parametrize("consumers", [1, 2])
async def test_a_group_destroyed_while_running(consumer, service, listen, consumers):
    clients = [consumer(f"c{i}", queue_size=4, recovery=SCAN_ONLY) for i in range(consumers)]
    ears = [listen(await client.init()) for client in clients]
    for i in range(40):
        service.announce(f"s{i}")

    await eventually(lambda: len(service.locks()) == 40)
    await eventually(lambda: sum(len(ear.told) for ear in ears) == 40)
    owners = service.locks()
    for _ in range(2):
        service.redis.xgroup_destroy(service.lbs, service.group)
        # All is handed out again, to whom it need not belong; nobody loses a stream by that.
        await eventually(lambda: len(service.pending()) == 40)
        await asyncio.sleep(1.5)  # three heartbeats
        assert service.locks() == owners
    assert sum((ear.owns for ear in ears), Counter()) == Counter(f"s{i}" for i in range(40))
    entries = [fields for _, fields in service.redis.xrange(service.lbs)]
    assert len(entries) == 40
    assert not [fields for fields in entries if b"_retry_count" in fields]
    for client, ear in zip(clients, ears, strict=True):
        await asyncio.gather(*(client.done_stream(name) for name in ear.owns))
    assert (service.entries(), service.pending()) == ([], [])


@pytest.mark.only("single", reason="one server tells of all commands")
async def test_what_is_owned_though_pending_for_nobody_is_asked_for_now_and_then(
    consumer, service, monkeypatch
):
    """All that is owned may be so for as long as it is owned."""
    monkeypatch.setattr("relstream.ownership.leases.AUDIT_PAGE", 7)
    client = consumer(heartbeat_interval=0.5, max_streams=20, recovery=SCAN_ONLY)
    notes = await client.init()
    for i in range(20):
        service.announce(f"s{i}")
    await take(notes, 20)
    service.redis.xgroup_destroy(service.lbs, service.group)
    service.redis.xgroup_create(service.lbs, service.group, "$")
    await asyncio.sleep(1.5)
    with Monitor(service.redis) as monitor:
        await asyncio.sleep(2.5)
        ids = set(service.entries())
        asked = [line for line in monitor.seen() if line.startswith("XPENDING")]
    assert len([line for line in asked if ids & set(line.split())]) <= 20
    assert len(list(client.owned())) == 20


async def test_failing_after_the_group_was_destroyed(consumer, service, listen):
    """What failed is pending for nobody, or another, then; it must come back all the same."""
    clients = [consumer(f"c{i}", queue_size=4, recovery=SCAN_ONLY) for i in range(2)]
    ears = [listen(await client.init()) for client in clients]
    for i in range(40):
        service.announce(f"s{i}")
    await eventually(lambda: sum(len(ear.told) for ear in ears) == 40)
    service.redis.xgroup_destroy(service.lbs, service.group)
    await eventually(lambda: len(service.pending()) == 40)
    for client, ear in zip(clients, ears, strict=True):
        await asyncio.gather(*(client.fail(name, "broken", delay=0.1) for name in ear.owns))
    await eventually(lambda: sum(len(ear.told) for ear in ears) == 80)
    assert sum((ear.owns for ear in ears), Counter()) == Counter(2 * [f"s{i}" for i in range(40)])
    entries = [fields for _, fields in service.redis.xrange(service.lbs)]
    assert [fields[b"_retry_count"] for fields in entries] == 40 * [b"1"]
    assert len(service.pending()) == len(service.locks()) == 40


async def test_a_group_destroyed_while_nobody_reads(consumer, service, listen):
    """One that is full finishes what it has, and creates the group anew when it has room."""
    client = consumer(max_streams=5)
    ear = listen(await client.init())
    for i in range(10):
        service.announce(f"s{i}")
    await eventually(lambda: len(ear.told) == 5)
    service.redis.xgroup_destroy(service.lbs, service.group)
    await asyncio.sleep(1.2)
    await asyncio.gather(*[client.done_stream(f"s{i}") for i in range(5)])
    # Five that are done, and five that it owns.
    everything = Counter(f"s{i}" for i in range(10))
    await eventually(lambda: ear.owns == everything)
    await asyncio.sleep(1.2)
    assert ear.owns == everything
    assert len(service.entries()) == len(service.pending()) == len(service.locks()) == 5


async def test_a_group_destroyed_while_recovering(consumer, service, listen):
    service.orphan(200)
    pages = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.2, batch_size=5)
    ear = listen(await consumer(recovery=pages).init())
    await eventually(lambda: len(ear.told) >= 5)
    service.redis.xgroup_destroy(service.lbs, service.group)
    await eventually(lambda: ear.owns == Counter(f"s{i}" for i in range(200)))
    await asyncio.sleep(1.2)
    assert ear.owns == Counter(f"s{i}" for i in range(200))
    assert len(service.entries()) == len(service.locks()) == 200


@pytest.mark.parametrize("looks", [False, True], ids=["scan-alone", "by-looking"])
async def test_a_killed_consumer_without_expiry_events(start, redis_url, service, looks):
    # All that an application on a managed service may do: no CONFIG, and no event ever comes.
    service.redis.acl_setuser(
        "managed", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-config"],
    )  # fmt: skip
    url = redis_url.replace("://", "://managed:x@")
    scans = {"reconciliation_interval": 0.5, "min_idle_time": 0.5}
    options = {"url": url, "auto_claim": looks}
    if not looks:
        options["recovery"] = scans
    victim = await start("victim", **options).ready()
    for i in range(50):
        service.announce(f"s{i}")
    await victim.heard("stream_added", 50)
    heir = await start("heir", **options).ready()
    killed = victim.kill()
    again = await heir.heard("stream_added", 50)
    assert service.redis.config_get("notify-keyspace-events")["notify-keyspace-events"] == ""
    bound = 1.0 + 1.0 if looks else 1.0 + 0.5 + 0.5 * 1.1 + 1.0
    assert max(line["at"] for line in again) - killed <= bound
    await asyncio.sleep(1.0)
    assert heir.owns() == Counter(f"s{i}" for i in range(50))


async def test_an_entry_deleted_while_its_owner_lives(consumer, service):
    client = consumer(recovery=SCAN_ONLY)
    notes = await client.init()
    ids = [service.announce(f"s{i}") for i in range(2)]
    await take(notes, 2)
    service.redis.xdel(service.lbs, ids[0])
    await nothing_comes(notes, 1.5)
    assert service.pending() == ids, "it is its owner's still"
    await client.done_stream("s0")
    await client.done_stream("s1")
    assert (service.entries(), service.pending()) == ([], [])
    await eventually(lambda: not service.locks())
    await nothing_comes(notes, 0.5)


async def test_an_entry_deleted_just_before_it_is_finished(consumer, service):
    client = consumer(auto_claim=False)
    notes = await client.init()
    entry_id = service.announce("s0")
    await take(notes, 1)
    service.redis.xdel(service.lbs, entry_id)
    await client.done_stream("s0")
    assert (service.pending(), service.locks()) == ([], {})


async def test_dead_letters_come_once_where_nothing_crashes(consumer, service):
    """The scan at start and the look for the dead come upon the same entries at the same time."""
    service.orphan(100, _retry_count="3")
    for _ in range(100):
        service.redis.xadd(service.lbs, {"lbs-input": "no JSON"})
    service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"}, count=100)
    await asyncio.sleep(0.6)
    at_once = RecoveryConfig(reconciliation_interval=0.1, min_idle_time=0.2, batch_size=20)
    clients = [consumer(f"c{i}", recovery=at_once) for i in range(2)]
    for client in clients:
        await client.init()
    await eventually(lambda: not service.pending())
    await asyncio.sleep(0.5)
    sources = Counter(fields[b"_source_id"] for _, fields in service.redis.xrange(service.dlq))
    assert (len(sources), max(sources.values())) == (200, 1)
    assert service.entries() == []


class RacingScan:
    """A recoverer that does something else just before it acknowledges what it has routed."""

    def __init__(self, client, before):
        self.recoverer = client._engine.partitions[0].recoverer
        put = self.recoverer._requeuer.requeue
        self.came = False

        async def put_late(entries, **options):
            if not self.came:
                self.came = True
                await before()
            return await put(entries, **options)

        self.recoverer._requeuer.requeue = put_late

    async def walk(self):
        tally = ScanResult()
        await self.recoverer.scanner.walk(0, tally)
        assert self.came
        await self.recoverer.steps._topology.close()
        return tally


@pytest.mark.parametrize("scripts", [True, False], ids=["script", "two-steps"])
async def test_what_its_owner_finishes_while_it_is_buried_is_no_dead_letter(
    consumer, service, scripts
):
    service.announce("s1", _retry_count="3")
    owner = consumer("owner", auto_claim=False, recovery=RecoveryConfig(min_idle_time=3600))
    await take(await owner.init(), 1)
    scanning = consumer("scanning")
    racing = RacingScan(scanning, lambda: owner.done_stream("s1"))
    scanning._engine.partitions[0].recoverer._requeuer._no_scripts = not scripts

    async def free(mget, keys):
        """It is late with its lock just then, and early enough to finish."""
        return [None for _ in keys()]

    racing.recoverer.steps.holders = free
    tally = await racing.walk()
    assert tally.dead_letters == 0
    assert service.redis.xlen(service.dlq) == 0
    assert (service.entries(), service.pending()) == ([], [])


@pytest.mark.parametrize("scripts", [True, False], ids=["script", "two-steps"])
async def test_whose_owner_comes_back_while_it_is_buried_is_no_dead_letter(
    consumer, service, scripts
):
    (entry_id,) = service.orphan(1, "owner", _retry_count="3")
    scanning = consumer("scanning")

    async def come_back():
        assert service.redis.xlen(service.dlq) == 1
        service.redis.set(f"s0{SEPARATOR}{entry_id}", "owner")

    racing = RacingScan(scanning, come_back)
    scanning._engine.partitions[0].recoverer._requeuer._no_scripts = not scripts
    tally = await racing.walk()
    assert (tally.dead_letters, tally.alive) == (0, 1)
    assert service.redis.xlen(service.dlq) == 0
    assert service.pending("owner") == service.entries() == [entry_id]


async def test_what_another_buried_first_is_buried_once(consumer, service):
    ids = service.orphan(3, _retry_count="3")
    first, second = consumer("first"), consumer("second")

    async def be_late():
        tally = ScanResult()
        await first._engine.partitions[0].recoverer.scanner.walk(0, tally)
        assert tally.dead_letters == 3
        await first._engine._connections.recovering.close()

    tally = await RacingScan(second, be_late).walk()
    assert (tally.dead_letters, tally.alive) == (0, 0)
    letters = [fields[b"_source_id"].decode() for _, fields in service.redis.xrange(service.dlq)]
    assert letters == ids


async def test_what_one_pass_is_routing_another_one_leaves(consumer, service):
    """Both may be the same consumer's: if it dies now, one copy is there too many, and not two."""
    service.orphan(1, _retry_count="3")
    client = consumer("c1")

    async def pass_by():
        await client._engine.partitions[0].recoverer.scanner.walk(0, ScanResult())
        assert service.redis.xlen(service.dlq) == 1

    tally = await RacingScan(client, pass_by).walk()
    assert tally.dead_letters == service.redis.xlen(service.dlq) == 1
    assert (service.entries(), service.pending()) == ([], [])


def consumers(service):
    return {row["name"].decode() for row in service.redis.xinfo_consumers(service.lbs, "svc-group")}


async def test_dead_consumers_are_removed(consumer, service, monkeypatch):
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_AFTER", 0.5)
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_EVERY", 0.05)
    (entry_id,) = service.orphan(1, "slow")  # owned, however long ago it was seen
    service.redis.set(f"s0{SEPARATOR}{entry_id}", "slow")
    for name in ("dead", "empty"):
        service.redis.xgroup_createconsumer(service.lbs, service.group, name)
    client = consumer("c1", recovery=SCAN_ONLY)
    notes = await client.init()
    service.announce("owned")
    await take(notes, 1)
    assert {"dead", "empty"} <= consumers(service)
    await eventually(lambda: not {"dead", "empty"} & consumers(service))
    await asyncio.sleep(1.5)
    assert consumers(service) == {"slow", "c1"}
    assert service.pending("slow") == [entry_id]
    # Whether reads that bring nothing count as a sign of life depends on the server. It does no
    # harm to one that lives: it is there again as soon as it is given something.
    await client.done_stream("owned")
    await asyncio.sleep(1.5)
    service.announce("late")
    assert names(await take(notes, 1)) == ["late"]
    await asyncio.sleep(0.5)
    assert consumers(service) == {"slow", "c1"}
    await client.done_stream("late")


async def test_a_consumer_that_comes_back_is_not_removed_with_what_it_got(
    consumer, service, monkeypatch
):
    """It reads its first entry for long just as it is about to be removed."""
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_AFTER", 0.3)
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_EVERY", 0.001)
    service.redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
    # This one leads and reads nothing more.
    client = consumer("c1", max_streams=1, recovery=RecoveryConfig(min_idle_time=60))
    service.announce("blocker")
    await take(await client.init(), 1)
    for i in range(60):
        service.redis.xgroup_createconsumer(service.lbs, service.group, f"x{i}")
    at = asyncio.get_running_loop().time()
    for i in range(60):
        # From before they may be removed until after.
        await asyncio.sleep(max(0.0, at + 0.27 + i * 0.001 - asyncio.get_running_loop().time()))
        entry_id = service.announce(f"s{i}")
        service.redis.xreadgroup(service.group, f"x{i}", {service.lbs: ">"}, count=1)
        service.redis.set(f"s{i}{SEPARATOR}{entry_id}", f"x{i}", px=60_000)
    await asyncio.sleep(0.5)
    assert len(service.pending()) == 61
    assert len(service.entries()) == 61


async def test_a_read_after_being_removed_is_recovered(consumer, service, listen, monkeypatch):
    """Redis makes a consumer anew when it reads; what it was given is pending as ever."""
    ear = listen(await consumer("c1").init())
    service.redis.xgroup_delconsumer(service.lbs, service.group, "c1")
    service.announce("s0")
    await eventually(lambda: ear.owns == Counter(["s0"]))
    # And with entries, which no client of ours does: who holds their locks finishes them.
    service.redis.xgroup_delconsumer(service.lbs, service.group, "c1")
    await asyncio.sleep(1.5)
    assert ear.owns == Counter(["s0"])


@pytest.mark.slow
async def test_out_of_memory_while_many_die(start, service, redis_url):
    victim = await start("victim").ready()
    for i in range(50):
        service.announce(f"s{i}")
    await victim.heard("stream_added", 50)
    heir = await start("heir").ready()
    service.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            service.announce("refused")
        victim.kill()
        await eventually(lambda: not service.pending("victim"))
        await asyncio.sleep(1.5)
        assert len(service.entries()) == 50
    finally:
        service.redis.config_set("maxmemory", 0)
    await eventually(lambda: heir.owns() == Counter(f"s{i}" for i in range(50)))
    await asyncio.sleep(1.5)
    assert heir.owns() == Counter(f"s{i}" for i in range(50))


@pytest.mark.slow
async def test_out_of_memory_for_long_makes_no_dead_letters(consumer, service, listen):
    """Out of memory entries can be read, but not locked: that is no death of an owner."""
    ears = [listen(await consumer(f"c{i}").init()) for i in range(2)]
    await eventually(lambda: service.reads("c0") and service.reads("c1"))
    service.announce_last(*[f"s{i}" for i in range(10)])
    try:
        # Far more than `max_retries` times as long as a lock lives.
        for _ in range(15):
            await asyncio.sleep(1.0)
            left = service.redis.xrange(service.lbs)
            assert len(left) == 10
            assert all(b"_retry_count" not in fields for _, fields in left)
    finally:
        service.redis.config_set("maxmemory", 0)
    everything = Counter(f"s{i}" for i in range(10))
    await eventually(lambda: ears[0].owns + ears[1].owns == everything)
    assert not service.redis.exists(service.dlq)
    assert all(b"_retry_count" not in fields for _, fields in service.redis.xrange(service.lbs))
