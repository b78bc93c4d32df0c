"""The contract on a Redis Cluster whose masters fail, come, go and move slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis.asyncio
from cluster.observing import (
    ClusterService,
    EveryMaster,
    announces,
    locks_by_master,
    subscriptions,
)
from helpers import (
    ADDED,
    DISOWNED,
    EXPIRED,
    SEPARATOR,
    TERMINATED,
    Heard,
    Renewals,
    Service,
    eventually,
    names,
    nothing_comes,
    take,
)

from relstream import (
    AuthenticationFailed,
    ClientClosed,
    ClusterClientRequired,
    ClusterMode,
    ClusterNotSettled,
    ConfigConflict,
    ConnectionFailed,
    DeadLetters,
    Delayed,
    KeyspaceSetupFailed,
    LBSInfo,
    PermissionDenied,
    Producer,
    RecoveryConfig,
    StreamClient,
    StreamNotOwned,
)
from relstream._core import ITEM, Template
from relstream.errors import ReplyError
from relstream.net.deployment import deployment_of
from relstream.testing import Cluster, Node
from relstream.testing.server import ServerNotFound, TLSFiles, find_binary

HEARTBEAT = 0.5


def url_of(cluster: Cluster) -> str:
    addresses = [f"{host}:{port}" for host, port in (node.address for node in cluster.nodes)]
    return f"redis+cluster://{','.join(addresses)}"


@pytest.fixture
async def consumer(cluster: Cluster) -> AsyncIterator[Callable[..., StreamClient]]:
    made: list[StreamClient] = []

    def make(name: str = "c1", **options: Any) -> StreamClient:
        options = {"heartbeat_interval": HEARTBEAT, "consumer_id": name, **options}
        made.append(StreamClient(options.pop("redis", url_of(cluster)), "svc", **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


def announce(service: Service, count: int, start: int = 0) -> list[str]:
    wanted = [f"s{i}" for i in range(start, start + count)]
    for name in wanted:
        service.announce(name)
    return wanted


def haunt(service: Service, ghost: str = "ghost", ttl_ms: int = 700) -> dict[str, str]:
    """All that waits is read and locked by a consumer that will never renew: its locks."""
    service.redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
    ((_, entries),) = service.redis.xreadgroup(service.group, ghost, {service.lbs: ">"})
    locks = {}
    for entry_id, fields in entries:
        name = fields[b"lbs-input"].split(b'"')[3].decode()
        locks[name] = f"{name}{SEPARATOR}{entry_id.decode()}"
        service.redis.set(locks[name], ghost, px=ttl_ms)
    return locks


def one_subscription_a_master(cluster: Cluster, consumers: int = 1) -> bool:
    masters = cluster.masters()
    return all(
        list(subscriptions(master).values()) == [1] * consumers for master in masters
    ) and not any(subscriptions(replica) for replica in cluster.replicas())


async def works(service: Service, notes, client: StreamClient, name: str) -> None:
    """A stream announced now is owned and can be finished."""
    await asyncio.to_thread(service.announce, name)
    assert names(await take(notes, 1, timeout=20)) == [name]
    await client.done_stream(name)


def write_lock(service: Service, name: str) -> str:
    return f"{name}{SEPARATOR}1-1"


def one_on_every_master(cluster: Cluster, service: Service, prefix: str) -> set[str]:
    """Names whose locks (`write_lock`) are on all masters, one on each."""
    masters = cluster.masters()
    found: dict[Node, str] = {}
    number = 0
    while len(found) < len(masters):
        name = f"{prefix}{number}"
        found.setdefault(cluster.master_of(write_lock(service, name)), name)
        number += 1
    return set(found.values())


async def hears_every_master(cluster: Cluster, service: Service, notes) -> None:
    """Locks that expire are told of, whichever master holds them."""
    wanted = one_on_every_master(cluster, service, "probe")
    for name in wanted:
        service.redis.set(write_lock(service, name), "x", px=50)
    heard = names(await take(notes, len(wanted), EXPIRED))
    assert sorted(heard) == sorted(wanted)


# --- at rest --------------------------------------------------------------------------------------


async def test_owning_and_finishing(cluster, service, consumer):
    wanted = announce(service, 300)
    client = consumer()
    notes = await client.init()
    assert names(await take(notes, 300)) == wanted
    held = locks_by_master(cluster)
    assert all(len(locks) > 50 for locks in held.values())
    assert set(service.locks().values()) == {"c1"}
    await asyncio.sleep(2.5 * HEARTBEAT)  # renewed, wherever they are
    assert len(service.locks()) == 300
    await nothing_comes(notes, 0.1)
    await asyncio.gather(*(client.done_stream(name) for name in wanted[:200]))
    await client.release("s299")
    assert names(await take(notes, 1)) == ["s299"]
    await client.aclose()
    assert service.locks() == {}
    assert service.pending() == []
    assert len(service.entries()) == 100


async def test_streams_are_told_in_order_though_one_master_is_slow(cluster, service, consumer):
    owner = cluster.master_of(service.lbs)
    slow, quick = (
        next(tag for tag in map("{{{}}}".format, range(100)) if place(cluster.master_of(tag)))
        for place in (lambda master: master is not owner, lambda master: master is owner)
    )
    notes = await consumer(heartbeat_interval=30.0, queue_size=5000).init()
    # The first read brings one; the next two bring as many as they may, and are locked together.
    tags = [quick] + [slow] * 190 + [quick] * 1000
    wanted = [f"{tag}{i}" for i, tag in enumerate(tags)]
    late = cluster.master_of(slow)
    late.pause()
    try:
        async with Producer(url_of(cluster), "svc") as producer:
            await producer.announce_many([(name, None) for name in wanted])
        await eventually(lambda: len(service.pending("c1")) > 600)
        await asyncio.sleep(0.2)
    finally:
        late.resume()
    assert names(await take(notes, len(wanted))) == wanted


@pytest.mark.parametrize("mode", ClusterMode)
async def test_a_ready_client_tells_that_it_is_a_cluster(cluster, service, consumer, mode):
    host, port = cluster.nodes[0].address
    ready = redis.asyncio.RedisCluster(host=host, port=port)
    client = consumer(redis=ready, cluster_mode=mode)
    notes = await client.init()
    await works(service, notes, client, "s1")
    async with Producer(ready, "svc") as producer:
        await producer.announce_many([(f"t{i}", None) for i in range(5)])
    assert len(await take(notes, 5)) == 5
    await client.aclose()
    await ready.aclose()


async def test_a_dead_owners_streams_come_back_and_every_survivor_hears_of_every_lock(
    cluster, service, consumer
):
    wanted = announce(service, 200)
    haunt(service, ttl_ms=2000)
    clients = [consumer(f"c{i}", queue_size=1000) for i in range(3)]
    notes = [await client.init() for client in clients]
    added: list[str] = []
    heard: list[list[str]] = [[], [], []]

    async def listen(i: int) -> None:
        async for notification in notes[i]:
            name = notification.payload.data_stream_name
            if notification.type is ADDED:
                added.append(name)
            elif notification.type is EXPIRED:
                heard[i].append(name)

    listening = [asyncio.ensure_future(listen(i)) for i in range(3)]
    await eventually(lambda: len(added) == 200 and all(len(h) == 200 for h in heard))
    assert sorted(added) == sorted(wanted)
    assert all(sorted(h) == sorted(wanted) for h in heard)
    for client in clients:
        await client.aclose()
    await asyncio.gather(*listening)


async def test_a_lock_that_lives_elsewhere_protects_its_entry(service, consumer):
    wanted = announce(service, 50)
    locks = haunt(service, ttl_ms=60_000)
    dead = wanted[::10]
    for name in dead:
        service.redis.delete(locks[name])
    client = consumer(recovery=RecoveryConfig(min_idle_time=0.0, reconciliation_interval=0.2))
    notes = await client.init()
    assert sorted(names(await take(notes, len(dead)))) == sorted(dead)
    await nothing_comes(notes, 0.5)
    with pytest.raises(Exception, match="lock is held"):
        await client.claim(LBSInfo("s1", locks["s1"].rpartition(SEPARATOR)[2]))


async def test_dead_letters_are_on_another_master(cluster, service, consumer):
    service.redis.xadd(service.lbs, {"lbs-input": "not JSON"})
    client = consumer()
    notes = await client.init()
    await works(service, notes, client, "s1")
    assert cluster.master_of(service.lbs) is not cluster.master_of(service.dlq)
    async with DeadLetters(url_of(cluster), "svc") as letters:
        assert [letter.reason async for letter in letters] == ["unparseable"]
        assert await letters.replay() == 0, "it would only come back"
        assert await letters.purge() == 1
    service.announce("s2")
    await take(notes, 1)
    await client.reject("s2", "bad")
    async with DeadLetters(url_of(cluster), "svc") as letters:
        assert await letters.replay() == 1
    assert await take(notes, 1)


async def test_what_is_lost_is_told(service, consumer):
    service.announce("s1")
    client = consumer()
    notes = await client.init()
    ((added),) = await take(notes, 1)
    entry_id = added.payload.id_in_lbs
    service.redis.delete(f"s1{SEPARATOR}{entry_id}")
    service.redis.xack(service.lbs, service.group, entry_id)
    await take(notes, 1, DISOWNED)
    with pytest.raises(StreamNotOwned):
        await client.done_stream("s1")


async def test_settings_that_may_not_be_overridden(cluster, consumer):
    cluster.masters()[1].client.config_set("notify-keyspace-events", "Kg")
    with pytest.raises(ConfigConflict, match=str(cluster.masters()[1].port)):
        await consumer().init()
    client = consumer(force_config_override=True)
    await client.init()
    assert one_subscription_a_master(cluster)


async def test_one_master_without_events_is_not_fatal_and_all_are(
    cluster, service, consumer, caplog
):
    for node in cluster.masters():
        node.client.acl_setuser(
            "joe",
            enabled=True,
            nopass=True,
            keys="*",
            channels="*",
            commands=["+@all", "-psubscribe"],
        )
    url = url_of(cluster).replace("://", "://joe:x@")
    with pytest.raises(KeyspaceSetupFailed, match="no master"):
        await consumer(redis=url).init()
    some = cluster.masters()[1:]
    for node in some:
        node.client.acl_setuser("joe", enabled=True, commands=["+@all"])
    caplog.clear()
    recorder = Heard()
    client = consumer(redis=url, recorder=recorder)
    notes = await client.init()
    assert [len(subscriptions(node)) for node in cluster.masters()] == [0, 1, 1]
    setups = [event[1] for event in recorder.events if event[0] == "keyspace_setup"]
    assert sorted(setups) == [False, True, True]
    (said,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "{}:{}".format(*cluster.masters()[0].address) in said
    await works(service, notes, client, "s1")
    cluster.masters()[0].client.acl_setuser("joe", enabled=True, commands=["+@all"])
    await eventually(lambda: one_subscription_a_master(cluster))
    await eventually(lambda: recorder.events.count(("keyspace_setup", True)) == 3)


async def test_closing_ends_an_opening_at_any_moment(cluster, service, consumer):
    for tenths in range(0, 200, 2):
        client = consumer(f"c{tenths}")
        opening = asyncio.create_task(client.init())
        await asyncio.sleep(tenths / 10_000)
        await client.aclose()
        try:
            notes = await opening
        except ClientClosed:
            continue
        assert [note.type async for note in notes] in ([], [TERMINATED])


# --- the masters change ---------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_graceful_failover_is_followed(cluster, service, consumer):
    announce(service, 60)
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    await take(notes, 60)
    for key in (service.lbs, service.dlq):
        replica = cluster.replicas(of=cluster.master_of(key))[0]
        await asyncio.to_thread(cluster.failover, replica)
        await works(service, notes, client, f"after-{key}")
    await eventually(lambda: one_subscription_a_master(cluster), 5)
    await hears_every_master(cluster, service, notes)
    await asyncio.gather(*(client.done_stream(f"s{i}") for i in range(60)))
    assert service.locks() == {}


@pytest.mark.slow
async def test_a_killed_master_is_replaced(cluster, service, consumer):
    announce(service, 60)
    clients = [consumer(f"c{i}", heartbeat_interval=2.0, max_streams=45) for i in range(2)]
    for client in clients:
        await client.init()
    await eventually(lambda: len(service.locks()) == 60)
    victim = cluster.master_of(service.lbs)
    await asyncio.to_thread(victim.kill)
    await asyncio.to_thread(cluster.wait_ok, 30)
    await eventually(lambda: one_subscription_a_master(cluster, 2), 5)
    # Whatever happened meanwhile: nothing is lost, and nobody believes what is not so.
    await eventually(
        lambda: (
            sorted(
                s.data_stream_name for c in clients for s in c._engine.partitions[0].leases.all()
            )
            == sorted(f"s{i}" for i in range(60))
        ),
        20,
    )
    await eventually(lambda: len(service.locks()) == 60)
    service.announce("later")
    await eventually(lambda: any(c._engine.partitions[0].leases.get("later") for c in clients))
    for client in clients:
        await client.done()
    assert service.locks() == {}
    assert service.pending() == []


@pytest.mark.slow
async def test_a_paused_master_costs_no_lock_of_others(cluster, service, consumer):
    announce(service, 60)
    # Longer than the whole cluster is down, while there is no new master yet.
    client = consumer(redis=f"{url_of(cluster)}?socket_timeout=60", heartbeat_interval=6.0)
    notes = await client.init()
    await take(notes, 60)
    victim = cluster.master_of(service.dlq)
    assert victim is not cluster.master_of(service.lbs)
    kept = [key for key in service.locks() if cluster.master_of(key) is not victim]
    renewals = Renewals(service, kept)
    victim.pause()
    promoted = None
    seen = 0
    while promoted is None or seen < 4:
        await asyncio.sleep(0.05)
        with contextlib.suppress(redis.exceptions.ClusterDownError):  # nobody can look meanwhile
            seen = renewals.seen()  # fails when one is gone
        with contextlib.suppress(LookupError):
            promoted = promoted or cluster.master_of(service.dlq)
    await eventually(lambda: one_subscription_a_master(cluster), 10)
    await works(service, notes, client, "s60")


@pytest.mark.slow
async def test_leases_are_renewed_at_once_on_a_new_master(cluster, service, consumer):
    """Though the old one hangs, and is waited for: it is asked for who the masters are as well."""
    announce(service, 60)
    client = consumer(redis=f"{url_of(cluster)}?socket_timeout=60", heartbeat_interval=8.0)
    notes = await client.init()
    await take(notes, 60)
    victim = cluster.master_of(service.dlq)
    assert victim is not cluster.master_of(service.lbs)
    moved = [key for key in service.locks() if cluster.master_of(key) is victim]
    (replica,) = cluster.replicas(of=victim)
    await eventually(lambda: replica.client.dbsize() == victim.client.dbsize())
    renewed_at = Renewals(service, moved)
    await eventually(lambda: renewed_at.seen() >= 1)
    victim.pause()
    await eventually(lambda: "master" in replica.client.role())
    promoted = EveryMaster.from_url("redis://{}:{}".format(*replica.address))
    with promoted:
        renewals = Renewals(ClusterService(promoted, cluster), moved)
        await eventually(lambda: renewals.seen() >= 2)
    await nothing_comes(notes, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("work", [Producer, DeadLetters, Delayed])
async def test_nobody_waits_for_a_master_that_was_replaced(cluster, service, work):
    """It would acknowledge, once it wakes up, what is lost by then."""
    victim = cluster.master_of(service.lbs)
    (replica,) = cluster.replicas(of=victim)
    async with work(f"{url_of(cluster)}?socket_timeout=60", "svc") as client:
        service.route_to_dlq(1)
        await announces(client)
        service.route_to_dlq(1)
        victim.pause()
        announcing = asyncio.ensure_future(announces(client))
        await eventually(lambda: "master" in replica.client.role())
        with pytest.raises(ConnectionFailed):
            await asyncio.wait_for(announcing, 10)
        await announces(client)


@pytest.mark.slow
async def test_a_restarted_master_is_set_up_again(cluster, service, consumer):
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    victim = cluster.master_of(service.dlq)
    await asyncio.to_thread(victim.restart)
    await asyncio.to_thread(cluster.wait_ok, 30)
    await eventually(lambda: one_subscription_a_master(cluster), 5)
    await hears_every_master(cluster, service, notes)
    await works(service, notes, client, "s1")


@pytest.mark.slow
async def test_masters_come_and_go(cluster, service, consumer):
    announce(service, 40)
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    await take(notes, 40)
    new = await asyncio.to_thread(cluster.add_master)
    slot = cluster.slot_of(service.lbs)
    old = cluster.master_of(service.lbs)
    near = range(slot - slot % 20, slot - slot % 20 + 20)
    moving = [s for s in near if cluster.master_of(s) is old]
    await asyncio.to_thread(cluster.move_slots, moving, old, new)
    assert cluster.master_of(service.lbs) is new
    await works(service, notes, client, "moved")
    await eventually(lambda: one_subscription_a_master(cluster), 5)
    await hears_every_master(cluster, service, notes)
    await asyncio.to_thread(cluster.move_slots, moving, new, old)
    await asyncio.to_thread(cluster.remove, new)
    await works(service, notes, client, "back")
    await asyncio.gather(*(client.done_stream(f"s{i}") for i in range(40)))
    await eventually(lambda: one_subscription_a_master(cluster), 5)


def fail_over(cluster: Cluster, master: Node) -> Node:
    (replica,) = cluster.replicas(of=master)
    cluster.failover(replica)
    return replica


def fail_back(cluster: Cluster, master: Node) -> None:
    fail_over(cluster, fail_over(cluster, master))


def kill(cluster: Cluster, master: Node) -> None:
    master.kill()
    cluster.wait_ok(30)


def restart(cluster: Cluster, master: Node) -> None:
    master.restart()
    cluster.wait_ok(30)


def add(cluster: Cluster, master: Node) -> tuple[Node, list[int]]:
    new = cluster.add_master()
    some = sorted(cluster.slots_of(master))[:200]
    cluster.move_slots(some, master, new)
    cluster.wait_ok()
    return new, some


def remove(cluster: Cluster, master: Node) -> None:
    new, some = add(cluster, master)
    cluster.move_slots(some, new, master)
    cluster.remove(new)
    cluster.wait_ok()


@pytest.mark.slow
@pytest.mark.parametrize("change", [fail_over, fail_back, kill, restart, add, remove])
async def test_events_of_every_master_come_again_within_three_seconds(
    cluster, service, consumer, change
):
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    await hears_every_master(cluster, service, notes)
    await asyncio.to_thread(change, cluster, cluster.master_of(service.dlq))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 3
    wanted = one_on_every_master(cluster, service, "again")
    while wanted:
        assert loop.time() < deadline, wanted
        for name in wanted:
            service.redis.set(write_lock(service, name), "x", px=20)
        with contextlib.suppress(asyncio.TimeoutError):
            while True:
                note = await asyncio.wait_for(notes.__anext__(), 0.1)
                wanted.discard(note.payload.data_stream_name)


async def test_a_slot_that_is_moving(cluster, service, consumer, url, caplog):
    """While the balancer stream's slot moves, its key is asked for where it is already (ASK)."""
    # A read that waits takes longer than other commands may.
    client = consumer(redis=f"{url}?socket_timeout=0.5", heartbeat_interval=2.0)
    notes = await client.init()
    await works(service, notes, client, "before")
    source = cluster.master_of(service.lbs)
    target = next(node for node in cluster.masters() if node is not source)
    slot = cluster.slot_of(service.lbs)
    await asyncio.to_thread(cluster.start_move, slot, source, target)
    await works(service, notes, client, "while moving, still here")
    keys = source.call("CLUSTER", "GETKEYSINSLOT", slot, 100)
    assert service.lbs in keys
    source.call("MIGRATE", *target.address, "", 0, 5000, "KEYS", *keys)
    await works(service, notes, client, "while moving, there already")
    await asyncio.sleep(1.2)
    assert "reading failed" not in caplog.text
    announce(service, 20)
    await take(notes, 20)
    await asyncio.to_thread(cluster.finish_move, slot, source, target)
    await works(service, notes, client, "after")
    await asyncio.gather(*(client.done_stream(f"s{i}") for i in range(20)))
    assert service.pending() == []


async def test_a_node_that_does_not_let_us_in_fails_only_what_moves_there(cluster):
    """Users are not replicated: a new master may not know ours when the first slot comes."""
    source = cluster.master_of("{m}")
    target, other = (node for node in cluster.masters() if node is not source)
    slot = cluster.slot_of("{m}")
    elsewhere = next(
        key for key in map("k{}".format, range(1000)) if cluster.master_of(key) is other
    )
    other.client.set(elsewhere, "value")
    for node in (source, other):
        node.client.acl_setuser(
            "app", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all"]
        )
    await asyncio.to_thread(cluster.start_move, slot, source, target)
    seed = "redis+cluster://app:x@{}:{}".format(*source.address)
    topology = deployment_of(seed).open("test")
    replies = await topology.each(Template(b"GET", ITEM).pack, [elsewhere.encode(), b"{m}1"])
    assert replies[0] == b"value"
    assert isinstance(replies[1], ReplyError)
    assert replies[1].transient
    await topology.close()
    await asyncio.to_thread(cluster.finish_move, slot, source, target)


async def test_one_node_is_no_single_server(cluster, consumer):
    for node in cluster.masters():
        with pytest.raises(ClusterClientRequired, match=r"redis\+cluster://"):
            await consumer(redis=node.url).init()


# --- eviction -------------------------------------------------------------------------------------


async def test_a_master_that_is_down_hides_no_policy_of_others(cluster, service, consumer, caplog):
    service.redis.config_set("maxmemory-policy", "volatile-lru")
    lbs = cluster.master_of(service.lbs)
    dead, alive = (node for node in cluster.masters() if node is not lbs)
    dead.kill()
    await consumer().init()
    (said,) = [r.getMessage() for r in caplog.records if "evicted" in r.getMessage()]
    for node in (lbs, alive):
        assert f"{node.address[1]}/0 (volatile-lru)" in said
    assert f":{dead.address[1]}/" not in said


# --- reset_topology -------------------------------------------------------------------------------


async def test_reset_topology(cluster, service, consumer):
    recorder = Heard()
    client = consumer(recorder=recorder)
    notes = await client.init()
    for node in cluster.masters():
        node.client.config_set("notify-keyspace-events", "")
    await asyncio.gather(*(client.reset_topology() for _ in range(10)))
    assert ("topology_reset", True) in recorder.events
    assert one_subscription_a_master(cluster)
    await hears_every_master(cluster, service, notes)


async def test_reset_topology_wants_a_settled_cluster(cluster, consumer):
    recorder = Heard()
    client = consumer(recorder=recorder)
    await client.init()
    slot = 7
    source = cluster.master_of(slot)
    source.call("CLUSTER", "DELSLOTS", slot)  # only this node believes so
    with pytest.raises(ClusterNotSettled):
        await client.reset_topology()
    assert recorder.events[-1] == ("topology_reset", False)
    assert one_subscription_a_master(cluster)
    source.call("CLUSTER", "ADDSLOTS", slot)
    await asyncio.to_thread(cluster.wait_ok)
    await client.reset_topology()
    assert one_subscription_a_master(cluster)


# --- databases ------------------------------------------------------------------------------------


async def test_no_such_database(cluster, consumer):
    with pytest.raises(ConnectionFailed, match=r"SELECT 99, .* Valkey 9 .*cluster-databases"):
        await consumer(redis=f"{url_of(cluster)}/99").init()


@pytest.mark.slow
async def test_a_database_of_a_cluster():
    try:
        binary = find_binary("valkey-9")
    except ServerNotFound as error:
        pytest.skip(str(error))
    with Cluster(binary=binary, replicas=0, config={"cluster-databases": 4}) as made:
        url = f"{url_of(made)}/2"
        client = StreamClient(url, "svc", consumer_id="c1")
        async with client as notes, Producer(url, "svc") as producer:
            await producer.announce_many([(f"s{i}", None) for i in range(30)])
            owned = names(await take(notes, 30))
            assert not any(locks_by_master(made).values())  # of database 0
            host, port = made.master_of("svc-input").address
            with redis.Redis(host, port, db=2) as database:
                assert database.xpending("svc-input", "svc-group")["pending"] == 30
                await asyncio.gather(*(client.done_stream(name) for name in owned))
                assert database.xlen("svc-input") == 0
            # Events come of this database, and of no other.
            for db, name in (3, "elsewhere"), (2, "here"):
                key = f"{name}{SEPARATOR}1-1"
                host, port = made.master_of(key).address
                with redis.Redis(host, port, db=db) as database:
                    database.set(key, "ghost", px=1)
                    await eventually(lambda held=database, key=key: held.get(key) is None)
            assert names(await take(notes, 1, EXPIRED)) == ["here"]


# --- users and TLS --------------------------------------------------------------------------------


async def test_rights_that_a_cluster_asks_for(cluster, service, consumer):
    def allow(*commands: str) -> None:
        for node in cluster.nodes:
            node.call("ACL", "SETUSER", "joe", "reset", "on", ">pw", "~*", "&*", *commands)

    url = url_of(cluster).replace("//", "//joe:pw@")
    allow("+@all", "-cluster")  # redis 6.2 takes no rights to subcommands away
    with pytest.raises(PermissionDenied, match=r"grant \+cluster\|slots"):
        await consumer(redis=url).init()
    with pytest.raises(AuthenticationFailed, match="did not accept") as caught:
        await consumer(redis=url.replace("pw@", "hunter2@")).init()
    assert "hunter2" not in str(caught.value)
    allow("+@all")
    notes = await consumer("c2", redis=url).init()
    service.announce("s1")
    assert names(await take(notes, 1)) == ["s1"]


@pytest.mark.slow
async def test_tls_and_a_password(make: Callable[..., Cluster], tls: TLSFiles):
    made = make(Cluster, tls=tls, password="secret")
    host, port = made.nodes[0].address
    ready = redis.asyncio.RedisCluster(
        host=host, port=port, password="secret", ssl=True, ssl_ca_certs=str(tls.ca)
    )
    url = f"rediss+cluster://:secret@{host}:{port}?ssl_ca_certs={tls.ca}"
    for source in (url, ready):
        client = StreamClient(source, "svc", consumer_id="c1")
        async with client as notes, Producer(source, "svc") as producer:
            await producer.announce_many([(f"s{i}", None) for i in range(30)])
            owned = names(await take(notes, 30))
            assert one_subscription_a_master(made)
            await asyncio.gather(*(client.done_stream(name) for name in owned))
    await ready.aclose()
    with pytest.raises(AuthenticationFailed, match="asks for a password"):
        await StreamClient(url.replace(":secret@", ""), "svc", consumer_id="c1").init()
    with pytest.raises(ConnectionFailed, match="certificate was not accepted"):
        await StreamClient(url.partition("?")[0], "svc", consumer_id="c1").init()
