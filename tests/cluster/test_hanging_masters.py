"""The contract while a master hangs: connections to it stay, and nothing is answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from cluster.observing import ClusterService, EveryMaster, subscriptions
from helpers import EXPIRED, SEPARATOR, Heard, Renewals, eventually, names, nothing_comes, take

from relstream import (
    ClientClosed,
    LBSInfo,
    RecoveryConfig,
    ReplyError,
    RetryConfig,
    StreamClient,
)
from relstream.testing import Cluster, Node


def url_of(cluster: Cluster) -> str:
    return cluster.url.replace("redis://", "redis+cluster://")


@pytest.fixture
def lasting(make: Callable[..., Cluster]) -> Cluster:
    """A cluster in which nobody replaces a master that hangs, and the others serve on."""
    return make(
        Cluster, replicas=0, node_timeout=15.0, config={"cluster-require-full-coverage": "no"}
    )


@pytest.fixture
def apart(lasting: Cluster) -> Iterator[ClusterService]:
    """A service in it whose keys, but for locks, are all on one master."""

    def together(name: str) -> bool:
        keys = (f"{name}-input", f"{name}-input-dlq", f"{name}-input-reconciler")
        return len({lasting.master_of(key) for key in keys}) == 1

    name = next(name for name in map("svc{}".format, range(1000)) if together(name))
    with EveryMaster.from_url(lasting.url) as client:
        yield ClusterService(client, lasting, name)


@pytest.fixture
async def consumer() -> AsyncIterator[Callable[..., StreamClient]]:
    made: list[StreamClient] = []

    def make(url: str, service: str = "svc", name: str = "c1", **options: Any) -> StreamClient:
        made.append(StreamClient(url, service, consumer_id=name, **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


# --- a master that holds only locks ---------------------------------------------------------------


def tag_on(cluster: Cluster, node: Node) -> str:
    """Locks of streams whose names begin with it are on this master."""
    tags = map("{{{}}}".format, range(1000))
    return next(tag for tag in tags if cluster.master_of(tag) is node)


def announce(service: ClusterService, *wanted: str) -> dict[str, str]:
    """All at once, for one read; returns their locks, as long as they are not put back."""
    pipe = service.lbs_master.client.pipeline(transaction=True)
    for name in wanted:
        pipe.xadd(service.lbs, {"lbs-input": f'{{"DataStreamName": "{name}"}}'})
    ids = pipe.execute()
    return {name: f"{name}{SEPARATOR}{i}" for name, i in zip(wanted, ids, strict=True)}


@pytest.mark.slow
async def test_a_hanging_master_costs_streams_of_others_nothing(lasting, apart, consumer):
    """They are delivered, kept and finished while it hangs, together with its own."""
    victim, *healthy = sorted(lasting.masters(), key=lambda node: node is apart.lbs_master)
    hangs, *lives = (tag_on(lasting, node) for node in (victim, *healthy))
    seed = "redis+cluster://{}:{}".format(*victim.address)  # what init() learnt has to do
    client = consumer(seed, apart.lbs.removesuffix("-input"))
    notes = await client.init()
    early = announce(apart, *(f"{tag}early{i}" for i in range(20) for tag in (hangs, *lives)))
    await take(notes, 60)
    kept = {name: key for name, key in early.items() if not name.startswith(hangs)}
    renewals = [Renewals(apart, kept.values())]
    await eventually(lambda: apart.reads("c1"))
    victim.pause()
    late = announce(apart, *(f"{tag}late{i}" for i in range(5) for tag in (hangs, *lives)))
    new = {name: key for name, key in late.items() if not name.startswith(hangs)}
    assert names(await take(notes, 10, timeout=10)) == list(new)
    renewals.append(Renewals(apart, new.values()))
    await eventually(lambda: min([seen.seen() for seen in renewals]) >= 4)
    assert not any(b"_retry_count" in fields for _, fields in apart.redis.xrange(apart.lbs))
    # What needs nothing of it but a lock is finished, too, and the lock expires.
    await asyncio.wait_for(asyncio.gather(*map(client.done_stream, early | new)), 10)
    await nothing_comes(notes, 0.1)
    assert len(apart.entries()) == 5
    victim.resume()
    assert sorted(names(await take(notes, 5))) == sorted(late.keys() - new.keys())
    await client.done()
    assert (apart.entries(), apart.pending()) == ([], [])


@pytest.mark.slow
async def test_a_client_opens_though_a_master_hangs(lasting, consumer):
    """One that has its dead letters and its leader key, say, but not what it reads."""
    victim = lasting.masters()[0]

    def kept_apart(name: str) -> bool:
        masters = [lasting.master_of(f"{name}-input{end}") for end in ("", "-dlq", "-reconciler")]
        return [master is victim for master in masters] == [False, True, True]

    name = next(name for name in map("svc{}".format, range(1000)) if kept_apart(name))
    lives = tag_on(lasting, lasting.master_of(f"{name}-input"))
    with EveryMaster.from_url(lasting.url) as client:
        service = ClusterService(client, lasting, name)
        announce(service, f"{lives}1")
        victim.pause()
        try:
            notes = await asyncio.wait_for(consumer(url_of(lasting), name).init(), 15)
            assert names(await take(notes, 1)) == [f"{lives}1"]
        finally:
            victim.resume()


@pytest.mark.slow
async def test_locks_that_can_not_be_taken_keep_nothing_else_from_being_read(
    lasting, apart, consumer
):
    victim, *healthy = sorted(lasting.masters(), key=lambda node: node is apart.lbs_master)
    hangs, *lives = (tag_on(lasting, node) for node in (victim, *healthy))
    client = consumer(url_of(lasting), apart.lbs.removesuffix("-input"))
    notes = await client.init()
    await eventually(lambda: apart.reads("c1"))
    victim.pause()
    try:
        hanging = announce(apart, *(f"{hangs}{i}" for i in range(5)))
        await eventually(lambda: apart.pending())
        wanted = announce(apart, *(f"{tag}{i}" for i in range(10) for tag in lives))
        assert names(await take(notes, 20, timeout=12)) == list(wanted)
    finally:
        victim.resume()
    assert sorted(names(await take(notes, 5))) == sorted(hanging)
    assert not any(b"_retry_count" in fields for _, fields in apart.redis.xrange(apart.lbs))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "refuses writes"])
async def test_what_lives_is_not_recovered_when_a_failing_master_is_back(
    lasting, apart, consumer, how
):
    """Its locks expired meanwhile, and those of new streams could not even be taken."""
    victim = next(node for node in lasting.masters() if node is not apart.lbs_master)

    def fail() -> None:
        if how == "hangs":
            victim.pause()
        else:  # NOREPLICAS; who holds a lock it still says
            victim.client.config_set("min-replicas-to-write", 1)

    def mend() -> None:
        if how == "hangs":
            victim.resume()
        else:
            victim.client.config_set("min-replicas-to-write", 0)

    hangs = tag_on(lasting, victim)
    name = apart.lbs.removesuffix("-input")
    clients = [consumer(url_of(lasting), name, f"c{i}", heartbeat_interval=1.0) for i in range(3)]
    told: Counter[str] = Counter()

    async def listen(client: StreamClient) -> None:
        async for note in await client.init():
            if note.type is EXPIRED:  # all hear of it
                continue
            told[note.payload.data_stream_name] += 1

    listening = [asyncio.ensure_future(listen(client)) for client in clients]
    await eventually(lambda: all(apart.reads(f"c{i}") for i in range(3)))
    wanted: list[str] = []

    def announce_ten() -> None:
        wanted.extend([f"{hangs}{len(wanted) + i}" for i in range(10)])
        announce(apart, *wanted[-10:])

    for _ in range(3):
        announce_ten()
        await eventually(lambda: told == Counter(wanted))
        fail()
        try:
            announce_ten()
            await asyncio.sleep(2.5)
        finally:
            mend()
        await eventually(lambda: told >= Counter(wanted))
        await asyncio.sleep(1.5)
        assert told == Counter(wanted)
    assert not any(b"_retry_count" in fields for _, fields in apart.redis.xrange(apart.lbs))
    for client in clients:
        await client.aclose()
    await asyncio.gather(*listening)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dead", "hanging"])
async def test_dead_letters_that_can_not_be_written_keep_nothing_else(
    lasting, apart, consumer, how
):
    """Neither from being recovered nor from being read; they stay pending until they can."""
    victim = next(node for node in lasting.masters() if node is not apart.lbs_master)
    lives = tag_on(lasting, apart.lbs_master)
    dlq = f"{tag_on(lasting, victim)}-dlq"
    apart.redis.xgroup_create(apart.lbs, apart.group, "0", mkstream=True)
    apart.redis.xadd(apart.lbs, {"poison": "1"})
    lost = announce(apart, *(f"{lives}{i}" for i in range(10)))
    apart.redis.xreadgroup(apart.group, "ghost", {apart.lbs: ">"})
    if how == "dead":
        victim.kill()
    else:
        victim.pause()
    recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=0.5, dlq_stream=dlq)
    client = consumer(
        url_of(lasting),
        apart.lbs.removesuffix("-input"),
        recovery=recovery,
        retry=RetryConfig(max_retries=0),
    )
    notes = await client.init()
    assert sorted(names(await take(notes, 10, timeout=20))) == sorted(lost)
    apart.redis.xadd(apart.lbs, {"poison": "2"})
    (new,) = announce(apart, f"{lives}new")
    assert names(await take(notes, 1, timeout=20)) == [new]
    await nothing_comes(notes, 1.0)
    if how == "dead":
        await asyncio.to_thread(victim.start)
    else:
        victim.resume()
    await asyncio.to_thread(lasting.wait_ok, 40)
    await eventually(lambda: victim.client.xlen(dlq) >= 2, 40)
    await client.done()
    await eventually(lambda: apart.pending() == [])


@pytest.mark.slow
async def test_a_claim_tells_what_is_not_known_from_what_is_held(lasting, apart, consumer):
    victim = next(node for node in lasting.masters() if node is not apart.lbs_master)
    apart.redis.xgroup_create(apart.lbs, apart.group, "0", mkstream=True)
    name, lock = next(iter(announce(apart, tag_on(lasting, victim)).items()))
    apart.redis.xreadgroup(apart.group, "ghost", {apart.lbs: ">"})
    client = consumer(url_of(lasting), apart.lbs.removesuffix("-input"), auto_claim=False)
    notes = await client.init()
    stray = LBSInfo(name, lock.rpartition(SEPARATOR)[2])
    victim.kill()
    with pytest.raises(ReplyError, match="MASTERDOWN"):
        await client.claim(stray)
    await asyncio.to_thread(victim.start)
    # What a leader holds back for a while is for who asks for it.
    await eventually(
        lambda: client._engine.partitions[0].recoverer._grace_periods.unverifiable([lock.encode()]),
        10,
    )

    while True:
        try:
            await client.claim(stray)
            break
        except ReplyError:  # it is not back yet
            await asyncio.sleep(0.05)
    assert names(await take(notes, 1)) == [name]


@pytest.mark.slow
async def test_a_leaders_successor_gives_owners_the_time_to_come_back(lasting, apart, consumer):
    """A master may have been restarted without its locks just before, and only that one knew."""
    victim = next(node for node in lasting.masters() if node is not apart.lbs_master)
    name = apart.lbs.removesuffix("-input")
    first = consumer(url_of(lasting), name, "c0", heartbeat_interval=6.0, max_streams=1)
    announce(apart, tag_on(lasting, victim))
    await take(await first.init(), 1)
    leader = f"{name}-input-reconciler"
    await eventually(lambda: (apart.redis.get(leader) or b"").startswith(b"c0#"))
    owner = consumer(url_of(lasting), name, "c1", heartbeat_interval=6.0)
    notes = await owner.init()
    wanted = announce(apart, *(f"{tag_on(lasting, victim)}{i}" for i in range(5)))
    await take(notes, 5)
    await asyncio.sleep(6.1)  # entries younger than a lease are not looked at
    renewals = Renewals(apart, wanted.values())
    await eventually(lambda: renewals.seen() >= 1)  # so the next one is not due at once
    victim.client.delete(*wanted.values())
    await first.aclose()
    await take(notes, 1)  # what that one owned
    await eventually(lambda: victim.client.exists(*wanted.values()) == 5)
    await nothing_comes(notes, 1.0)
    assert len(apart.entries()) == 6


@pytest.mark.slow
async def test_a_master_that_is_silent_is_left_for_its_successor(cluster, service, consumer):
    """Because there is another: its silence alone would be borne for a minute."""
    client = consumer(f"{url_of(cluster)}?socket_timeout=60", heartbeat_interval=30.0)
    notes = await client.init()
    service.announce("before")
    assert names(await take(notes, 1)) == ["before"]
    await eventually(lambda: service.reads("c1"))
    victim = service.lbs_master
    victim.call("WAIT", 1, 4000)
    victim.pause()
    await asyncio.to_thread(cluster.wait_ok, 30)
    promoted = service.lbs_master
    assert promoted is not victim
    promoted.call("XADD", service.lbs, "*", "lbs-input", '{"DataStreamName": "after"}')
    assert names(await take(notes, 1, timeout=10)) == ["after"]
    await asyncio.wait_for(client.done_stream("after"), 10)
    assert len(promoted.call("XRANGE", service.lbs, "-", "+")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moving", [False, True], ids=["settled", "moving"])
async def test_scripts_are_learnt_only_where_they_are_missing(lasting, apart, consumer, moving):
    """Not by a master that hangs, which would be waited for; wherever a lock is on its way."""
    victim, *healthy = sorted(lasting.masters(), key=lambda node: node is apart.lbs_master)
    source, target = healthy
    # All on their way, or nothing would tell that the target does not know the script.
    lives = [tag_on(lasting, node) for node in ([source] if moving else healthy)]
    url = f"{url_of(lasting)}?socket_timeout=60"
    client = consumer(url, apart.lbs.removesuffix("-input"), heartbeat_interval=30.0)
    notes = await client.init()
    wanted = announce(apart, *(f"{tag}{i}" for i in range(5) for tag in lives))
    await take(notes, len(wanted))
    if moving:
        slot = lasting.slot_of(lives[0])
        await asyncio.to_thread(lasting.start_move, slot, source, target)
        keys = source.call("CLUSTER", "GETKEYSINSLOT", slot, 100)
        assert sum(SEPARATOR in key for key in keys) == len(wanted)
        source.call("MIGRATE", *target.address, "", 0, 5000, "KEYS", *keys)
    victim.pause()
    try:
        for node in healthy:
            node.call("SCRIPT", "FLUSH")
        await asyncio.wait_for(asyncio.gather(*map(client.done_stream, wanted)), 10)
    finally:
        victim.resume()
    if moving:
        await asyncio.to_thread(lasting.finish_move, slot, source, target)
    assert (apart.entries(), apart.pending(), apart.locks()) == ([], [], {})


@pytest.mark.slow
async def test_a_lock_gone_while_the_lbs_hangs_costs_no_other(lasting, apart, consumer):
    """Whether its entry is still pending can't be asked, and that is waited for."""
    victim = apart.lbs_master
    healthy = next(node for node in lasting.masters() if node is not victim)
    tag = tag_on(lasting, healthy)
    client = consumer(url_of(lasting), apart.lbs.removesuffix("-input"), heartbeat_interval=2.0)
    notes = await client.init()
    gone, *others = announce(apart, *(f"{tag}{i}" for i in range(20))).values()
    await take(notes, 20)
    victim.pause()
    try:
        healthy.call("DEL", gone)
        deadline = asyncio.get_running_loop().time() + 5.0
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
            left = [healthy.call("PTTL", key) for key in others]
            assert min(left) > 0, left
    finally:
        victim.resume()
    await eventually(lambda: healthy.call("GET", gone) == "c1")
    await nothing_comes(notes, 1.5)


@pytest.mark.slow
async def test_the_recorder_counts_locks_that_could_not_be_released(lasting, apart, consumer):
    victim, *healthy = sorted(lasting.masters(), key=lambda node: node is apart.lbs_master)
    tags = [tag_on(lasting, node) for node in (victim, *healthy)]
    recorder = Heard()
    url = f"{url_of(lasting)}?socket_timeout=1"
    client = consumer(url, apart.lbs.removesuffix("-input"), recorder=recorder)
    notes = await client.init()
    wanted = announce(apart, *(f"{tag}{i}" for i in range(5) for tag in tags))
    await take(notes, 15)
    victim.pause()
    try:
        await asyncio.gather(*map(client.done_stream, wanted))
    finally:
        victim.resume()
    released = recorder.calls("lock_release")
    assert sum(succeeded for succeeded, _, _ in released) == 10
    assert sum(failed for _, failed, _ in released) == 5


# --- reset_topology -------------------------------------------------------------------------------


async def test_closing_ends_a_reset_with_an_error_of_ours(cluster, service, consumer):
    client = consumer(url_of(cluster))
    await client.init()
    silent = cluster.replicas()[0]
    silent.pause()  # not for long enough that others would take it for dead
    try:
        resets = [asyncio.ensure_future(client.reset_topology()) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(reset.done() for reset in resets)
        await client.aclose()
        outcomes = await asyncio.gather(*resets, return_exceptions=True)
    finally:
        silent.resume()
    assert [type(outcome) for outcome in outcomes] == [ClientClosed] * 3


def subscribed_at(node: Node) -> list[str]:
    """The ids of its connections with a subscription."""
    return [c["id"] for c in node.client.client_list() if int(c["psub"])]


@pytest.mark.slow
async def test_a_reset_asked_for_during_another_is_done_after_it(lasting, consumer):
    """The one under way may have passed by already what this caller knows of."""
    client = consumer(url_of(lasting))
    await client.init()
    passed, *_, silent = lasting.masters()
    before = subscribed_at(passed)
    silent.pause()
    try:
        first = asyncio.ensure_future(client.reset_topology())
        await eventually(lambda: (now := subscribed_at(passed)) and now != before)
        passed.client.config_set("notify-keyspace-events", "")
        others = [asyncio.ensure_future(client.reset_topology()) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not first.done()
        assert not any(other.done() for other in others)
    finally:
        silent.resume()
    await asyncio.gather(*others)
    assert first.done()
    setting = passed.client.config_get("notify-keyspace-events")["notify-keyspace-events"]
    assert set(setting) >= set("Kx")
    for node in lasting.masters():
        assert list(subscriptions(node).values()) == [1]


@pytest.mark.slow
async def test_a_stray_whose_lock_can_not_be_looked_at_holds_up_no_other(lasting, apart, consumer):
    victim, *healthy = sorted(lasting.masters(), key=lambda node: node is apart.lbs_master)
    hangs, *lives = (tag_on(lasting, node) for node in (victim, *healthy))
    apart.redis.xgroup_create(apart.lbs, apart.group, "0", mkstream=True)
    announce(apart, f"{hangs}0", *(f"{tag}{i}" for i in range(5) for tag in lives), f"{hangs}1")
    apart.redis.xreadgroup(apart.group, "other", {apart.lbs: ">"})
    name = apart.lbs.removesuffix("-input")
    client = consumer(url_of(lasting), name, heartbeat_interval=20.0, auto_claim=False)
    notes = await client.init()
    first, *others, last = apart.pending()
    apart.redis.xclaim(apart.lbs, apart.group, "c1", 0, [first, *others, last])
    victim.pause()
    try:
        recoverer = client._engine.partitions[0].recoverer
        stay = await recoverer.hand_back([i.encode() for i in (first, *others, last)])
    finally:
        victim.resume()
    assert stay == [first.encode(), last.encode()]
    assert len(await take(notes, 10)) == 10


@pytest.mark.slow
async def test_a_hanging_master_to_which_a_slot_moves_holds_up_no_other_slot(
    lasting, apart, consumer
):
    """New locks in that slot are asked for there already (ASK)."""
    victim, source = (node for node in lasting.masters() if node is not apart.lbs_master)
    tags = map("{{{}}}".format, range(1000))
    moving, stays = [tag for tag in tags if lasting.master_of(tag) is source][:2]
    other = tag_on(lasting, apart.lbs_master)
    client = consumer(url_of(lasting), apart.lbs.removesuffix("-input"))
    notes = await client.init()
    await eventually(lambda: apart.reads("c1"))
    lasting.start_move(lasting.slot_of(moving), source, victim)
    victim.pause()
    try:
        wanted = [f"{tag}{i}" for i in range(5) for tag in (moving, stays, other)]
        announce(apart, *wanted)
        here = [name for name in wanted if not name.startswith(moving)]
        assert names(await take(notes, 10, timeout=12)) == here
        # Many at once are asked for at once, too: not for one timeout each.
        more = [f"{moving}{i}" for i in range(5, 300)]
        announce(apart, *more)
        announce(apart, f"{other}last")
        assert names(await take(notes, 1, timeout=12)) == [f"{other}last"]
    finally:
        victim.resume()
    there = [name for name in wanted if name.startswith(moving)]
    assert sorted(names(await take(notes, 300))) == sorted(there + more)
    assert not any(b"_retry_count" in fields for _, fields in apart.redis.xrange(apart.lbs))
