"""Where scripts are forbidden entries are put back by XACK, then XADD: what may come between."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from helpers import SEPARATOR, Heard, eventually, names, nothing_comes, take
from wire import Proxy

from relstream import ConnectionLost, RecoveryConfig, RetryConfig
from relstream.engine import engine
from relstream.lbs.two_phase import TwoPhaseRequeue

SCAN_ONLY = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.2)
LEAVE_ALONE = RecoveryConfig(min_idle_time=3600)
ALL = Counter(f"s{i}" for i in range(10))


@pytest.fixture
def url(service, redis_url):
    """Of a user who may not run scripts."""
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-eval", "-evalsha"],
    )  # fmt: skip
    return redis_url.replace("://", "://app:x@")


@pytest.fixture
def ghosts(service):
    """Entries that a consumer has read that died."""
    return service.orphan(10)


def gaps(heard):
    """How many entries were put back in two steps."""
    return sum(count for count, _ in heard.calls("ack_add_gap"))


def full(service):
    service.redis.config_set("maxmemory", 1)


def room(service):
    service.redis.config_set("maxmemory", 0)


@pytest.fixture
def full_in_between(service, monkeypatch):
    """Memory runs out just when it was found that there is some; tells how often it was asked."""
    asked = []
    check = TwoPhaseRequeue._check_adding

    async def check_and_fill(self):
        await check(self)
        if not asked:
            full(service)
        asked.append(self)

    monkeypatch.setattr(TwoPhaseRequeue, "_check_adding", check_and_fill)
    return asked


async def test_out_of_memory_nothing_is_acknowledged_by_a_scan(consumer, service, url, ghosts):
    full(service)
    heard = Heard()
    notes = await consumer(url=url, recovery=SCAN_ONLY, recorder=heard).init()
    await eventually(lambda: len(heard.calls("reconciliation_scan")) >= 3)
    assert service.pending("ghost") == service.entries() == ghosts
    assert gaps(heard) == 0
    room(service)
    assert Counter(names(await take(notes, 10))) == ALL
    await nothing_comes(notes, 0.5)


async def test_out_of_memory_what_is_owned_stays_pending_when_its_owner_closes(
    consumer, service, url
):
    ids = [service.announce(f"s{i}") for i in range(10)]
    once = RetryConfig(max_retries=1, initial_delay=0.01)
    owner = consumer("owner", url=url, retry=once, recovery=LEAVE_ALONE)
    await take(await owner.init(), 10)
    full(service)
    await owner.aclose()
    assert service.pending("owner") == service.entries() == ids
    room(service)
    notes = await consumer("next", url=url, recovery=SCAN_ONLY).init()
    assert Counter(names(await take(notes, 10))) == ALL


async def test_memory_that_runs_out_between_the_steps_of_a_scan(
    consumer, service, url, ghosts, full_in_between
):
    heard = Heard()
    patient = replace(SCAN_ONLY, min_idle_time=1.0)
    notes = await consumer(url=url, heartbeat_interval=2.0, recovery=patient, recorder=heard).init()
    await eventually(lambda: service.pending("ghost") != ghosts)
    await nothing_comes(notes, 0.5)
    assert service.entries() == ghosts
    room(service)
    assert Counter(names(await take(notes, 10))) == ALL
    assert len(service.entries()) == 10
    await eventually(lambda: gaps(heard) == 10)
    await nothing_comes(notes, 0.5)


async def test_memory_that_runs_out_while_a_stream_is_handed_over(
    consumer, service, url, full_in_between
):
    entry_id = service.announce("s0")
    owner = consumer("owner", url=url, max_streams=1, recovery=LEAVE_ALONE)
    notes = await owner.init()
    await take(notes, 1)
    releasing = asyncio.create_task(owner.release("s0"))
    await eventually(lambda: not service.pending())
    await nothing_comes(notes, 0.5)
    assert not releasing.done()  # it would be nobody's
    assert service.entries() == [entry_id]
    room(service)
    await releasing
    (again,) = await take(notes, 1)
    assert service.entries() == [again.payload.id_in_lbs]


async def test_closing_in_between_says_what_is_lost(
    consumer, service, url, full_in_between, caplog, monkeypatch
):
    monkeypatch.setattr(engine, "CLOSE_TIMEOUT", 0.5)
    entry_id = service.announce("s0")
    owner = consumer("owner", url=url, recovery=LEAVE_ALONE)
    await take(await owner.init(), 1)
    await owner.aclose()
    (told,) = [r.getMessage() for r in caplog.records if "given up" in r.getMessage()]
    assert entry_id in told
    assert '"DataStreamName": "s0"' in told
    assert service.entries() == [entry_id]  # so that it can be announced again


@pytest.mark.only("single", "sentinel", reason="cuts the connection to one server")
async def test_a_connection_cut_between_the_steps(consumer, service, url, ghosts):
    async with Proxy(service.redis.connection_pool.connection_kwargs["port"]) as proxy:
        heard = Heard()
        leader = consumer(
            url=proxy.url.replace("://", "://app:x@"), recovery=SCAN_ONLY, recorder=heard
        )
        leader._engine.partitions[0].recoverer._requeuer._no_scripts = True
        proxy.cut_at = b'{"DataStreamName"'  # XADD
        notes = await leader.init()
        assert Counter(names(await take(notes, 10))) == ALL
        assert not proxy.cut_at
        assert len(service.entries()) == 10
        await eventually(lambda: gaps(heard) == 10)
        await nothing_comes(notes, 0.5)
        await leader.aclose()


class Losing:
    """A link over which the answer to the first XACK gets lost."""

    def __init__(self, link, carried_out):
        self._link = link
        self._carried_out = carried_out
        self.lost = 0

    def __getattr__(self, name):
        return getattr(self._link, name)

    async def pipeline(self, packed, replies, **options):
        if self.lost or b"XACK" not in packed:
            return await self._link.pipeline(packed, replies, **options)
        self.lost = replies
        if self._carried_out:
            await self._link.pipeline(packed, replies, **options)
        raise ConnectionLost("just now")


@pytest.mark.parametrize("carried_out", [True, False], ids=["carried-out", "not-carried-out"])
@pytest.mark.parametrize("by", ["scan", "release"])
async def test_the_answer_to_the_first_step_gets_lost(consumer, service, url, by, carried_out):
    for i in range(10):
        service.announce(f"s{i}")
    owner = consumer("owner", url=url, recovery=LEAVE_ALONE)
    if by == "scan":
        service.redis.xgroup_create(service.lbs, service.group, "0")
        service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"}, count=100)
        owner = consumer("owner", url=url, recovery=SCAN_ONLY)
        requeuer = owner._engine.partitions[0].recoverer._requeuer._two_phase
    else:
        requeuer = owner._engine.partitions[0]._requeuer._two_phase
    losing = requeuer._link = Losing(requeuer._link, carried_out)
    notes = await owner.init()
    if by == "release":
        await take(notes, 10)
        for i in range(10):
            await owner.release(f"s{i}")
    assert Counter(names(await take(notes, 10))) == ALL
    assert losing.lost
    assert len(service.entries()) == len(service.pending("owner")) == 10
    await nothing_comes(notes, 0.5)


@pytest.mark.parametrize("carried_out", [True, False], ids=["carried-out", "not-carried-out"])
@pytest.mark.parametrize("by", ["client", "application"])
async def test_finishing_is_tried_again_when_the_answer_gets_lost(
    consumer, service, url, by, carried_out
):
    """By whomever: that the entry is not pending any more is what the first try did."""
    retry = RetryConfig(max_retries=0 if by == "application" else -1, initial_delay=0.01)
    owner = consumer("owner", url=url, retry=retry, recovery=LEAVE_ALONE)
    notes = await owner.init()
    service.announce("s0")
    await take(notes, 1)
    completer = owner._engine.partitions[0].completer
    losing = completer._completion._link = Losing(completer._completion._link, carried_out)
    if by == "application":
        with pytest.raises(ConnectionLost):
            await owner.done_stream("s0")
    await owner.done_stream("s0")
    assert losing.lost
    assert (service.entries(), service.pending(), service.locks()) == ([], [], {})
    await nothing_comes(notes, 0.5)


class Dead:
    """A link over which nothing is answered any more from the first XACK on."""

    def __init__(self, link):
        self._link = link
        self._dead = False

    def __getattr__(self, name):
        return getattr(self._link, name)

    async def pipeline(self, packed, replies, **options):
        self._dead = self._dead or b"XACK" in packed
        if self._dead:
            raise ConnectionLost("just now")
        return await self._link.pipeline(packed, replies, **options)


async def test_closing_gives_up_what_is_being_routed(consumer, service, url, monkeypatch, caplog):
    monkeypatch.setattr(engine, "CLOSE_TIMEOUT", 0.5)
    before = asyncio.all_tasks()
    service.redis.xadd(service.lbs, {"lbs-input": "announces nothing"})
    reader = consumer(url=url, recovery=LEAVE_ALONE)
    requeuer = reader._engine.partitions[0]._requeuer._two_phase
    requeuer._link = Dead(requeuer._link)
    await reader.init()
    await eventually(lambda: requeuer._moving)
    await reader.aclose()
    assert asyncio.all_tasks() == before
    assert "given up: 1 entries" in caplog.text


async def test_one_lock_that_is_forbidden_is_no_reason_to_forbid_scripts(
    consumer, service, redis_url
):
    service.redis.acl_setuser(
        "narrow", enabled=True, nopass=True, channels=["*"], commands=["+@all"],
        keys=["svc-input*", "mine*"],
    )  # fmt: skip
    ids = [service.announce(name) for name in ("mine0", "other", "mine1")]
    service.redis.xgroup_create(service.lbs, service.group, "0")
    service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"}, count=100)
    narrow = consumer(url=redis_url.replace("://", "://narrow:x@"))
    requeuer = narrow._engine.partitions[0].recoverer._requeuer
    entries = [
        (i.encode(), [b"lbs-input", b"x"], f"{name}{SEPARATOR}{i}".encode())
        for i, name in zip(ids, ("mine0", "other", "mine1"), strict=True)
    ]
    assert await requeuer.requeue(entries) == [1, 2, 1]  # nobody can say whether it is locked
    assert not requeuer._no_scripts
    assert service.pending() == [ids[1]]
    await narrow._engine._connections.recovering.close()
