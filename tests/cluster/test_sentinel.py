"""The contract where Sentinels replace a master that fails."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis
import redis.asyncio.sentinel
from cluster.observing import SentinelService, announces, subscriptions
from helpers import (
    ADDED,
    DISOWNED,
    EXPIRED,
    SEPARATOR,
    Renewals,
    engine_connections,
    eventually,
    names,
    nothing_comes,
    take,
)

from relstream import (
    AuthenticationFailed,
    ClusterClientRequired,
    ClusterMode,
    ConnectionFailed,
    DeadLetters,
    Delayed,
    InvalidOption,
    Producer,
    RecoveryConfig,
    RelstreamError,
    StreamClient,
)
from relstream.ownership.renewer import LeaseRenewer
from relstream.testing import Node, Sentinels
from relstream.testing.server import Server, TLSFiles

# No lock expires while a master is replaced.
HEARTBEAT = 30.0


@pytest.fixture
def service(sentinels: Sentinels) -> Iterator[SentinelService]:
    """The state of service `svc`."""
    service = SentinelService(sentinels)
    yield service
    service.redis.close()


@pytest.fixture
async def consumer(sentinels: Sentinels) -> AsyncIterator[Callable[..., StreamClient]]:
    made: list[StreamClient] = []

    def make(name: str = "c1", **options: Any) -> StreamClient:
        options = {"heartbeat_interval": HEARTBEAT, "consumer_id": name, **options}
        made.append(StreamClient(options.pop("redis", sentinels.url), "svc", **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


@pytest.fixture
async def finder(sentinels: Sentinels) -> AsyncIterator[redis.asyncio.sentinel.Sentinel]:
    finder = redis.asyncio.sentinel.Sentinel(sentinels.addresses)
    yield finder
    for sentinel in finder.sentinels:
        await sentinel.aclose()


def announce(service: SentinelService, count: int, prefix: str = "s") -> list[str]:
    wanted = [f"{prefix}{i}" for i in range(count)]
    for name in wanted:
        service.announce(name)
    return wanted


def replace_master(sentinels: Sentinels, how: str) -> Node:
    """Returns the new one."""
    if how == "command":
        return sentinels.failover()
    former = sentinels.master()
    former.kill() if how == "kill" else former.pause()
    return sentinels.wait_master(40)


async def hears(service: SentinelService, notes) -> None:
    """Locks that expire are told of."""
    service.redis.set(f"probe{SEPARATOR}1-1", "x", px=1)
    await asyncio.sleep(0.01)
    service.redis.get(f"probe{SEPARATOR}1-1")
    assert names(await take(notes, 1, EXPIRED)) == ["probe"]


# --- at rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True], ids=["url", "client"])
async def test_owning_and_finishing(service, consumer, sentinels, finder, ready):
    made = finder.master_for(sentinels.service_name) if ready else sentinels.url
    client = consumer(redis=made)
    notes = await client.init()
    async with Producer(made, "svc") as producer:
        await producer.announce_many([(f"s{i}", None) for i in range(50)])
    assert len(await take(notes, 50)) == 50
    assert set(service.locks().values()) == {"c1"}
    await hears(service, notes)
    await client.reset_topology()
    await client.done_stream("s0")
    async with DeadLetters(made, "svc") as letters:
        assert [letter async for letter in letters] == []
    await client.done()
    assert (service.locks(), service.entries()) == ({}, [])
    if ready:
        await made.aclose()


async def test_the_database_that_was_asked_for(sentinels, consumer):
    notes = await consumer(redis=sentinels.url.replace("/0", "/3")).init()
    with redis.Redis(*sentinels.master().address, db=3) as third:
        third.xadd("svc-input", {"lbs-input": '{"DataStreamName":"here"}'})
        assert names(await take(notes, 1)) == ["here"]


# --- the master is replaced -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["command", "kill", "pause"])
async def test_a_new_master_is_followed(service, consumer, sentinels, how):
    at_once = RecoveryConfig(min_idle_time=0.5, reconciliation_interval=0.5)
    # A master that is silent is not left because of its silence, but because there is another.
    # For one heartbeat after an outage nobody is taken for dead.
    client = consumer(
        redis=f"{sentinels.url}?socket_timeout=60", recovery=at_once, heartbeat_interval=15.0
    )
    notes = await client.init()
    async with Producer(sentinels.url, "svc") as producer:
        wanted = announce(service, 60, "owned")
        await take(notes, 60)
        await producer.announce("known")
        await take(notes, 1)
        await client.done_stream("known")
        await eventually(lambda: len(service.locks()) == 60)
        assert service.redis.wait(2, 4000) == 2
        former = sentinels.master()
        promoted = await asyncio.to_thread(replace_master, sentinels, how)
        # Reading goes on, and so does the subscription, wherever the old one was.
        service.follow()
        (name,) = announce(service, 1, "later")
        assert names(await take(notes, 1, timeout=10)) == [name]
        await eventually(lambda: list(subscriptions(promoted).values()) == [1], 5)
        await hears(service, notes)
        # What was replicated is there, and owned as before.
        assert len(service.locks()) == 61
        assert len(service.pending("c1")) == 61
        # So does recovery ...
        (orphan,) = service.orphan(1)
        (got,) = await take(notes, 1, timeout=30)
        assert got.payload.data_stream_name == "s0"
        assert got.payload.id_in_lbs > orphan
        # ... and announcing, which may fail once. A former master that lives takes it, and loses
        # it, until it is told.
        if how == "command":
            await asyncio.to_thread(sentinels.wait_ok, 40)
        for _ in range(3):
            with suppress(RelstreamError):
                await producer.announce("announced")
                break
        assert names(await take(notes, 1)) == ["announced"]
        await asyncio.gather(*(client.done_stream(name) for name in wanted))
        assert len(service.entries()) == len(service.locks()) == 3
    if how == "pause":
        await asyncio.to_thread(former.resume)
    elif how == "kill":
        await asyncio.to_thread(former.start)
    await asyncio.to_thread(sentinels.wait_ok, 40)

    def all_at_the_master() -> bool:
        master = sentinels.master()  # a busy machine may have brought about yet another
        others = [node for node in sentinels.nodes if node is not master]
        left = [engine_connections(node.client) for node in others]
        return left == [[], []] and list(subscriptions(master).values()) == [1]

    await eventually(all_at_the_master)


@pytest.mark.slow
@pytest.mark.parametrize("work", [Producer, DeadLetters, Delayed])
async def test_nobody_waits_for_a_master_that_was_replaced(service, sentinels, work):
    """It would acknowledge, once it wakes up, what is lost by then."""
    async with work(f"{sentinels.url}?socket_timeout=60", "svc") as client:
        service.route_to_dlq(1)
        await announces(client)
        service.route_to_dlq(1)
        assert service.redis.wait(2, 4000) == 2
        sentinels.master().pause()
        announcing = asyncio.ensure_future(announces(client))
        await asyncio.to_thread(sentinels.wait_master, 40)
        with pytest.raises(ConnectionFailed):
            await asyncio.wait_for(announcing, 10)
        await announces(client)


@pytest.mark.slow
async def test_finishing_waits_for_a_new_master(service, consumer, sentinels, caplog):
    client = consumer()
    notes = await client.init()
    wanted = announce(service, 20)
    await take(notes, 20)
    await eventually(lambda: len(service.pending("c1")) == 20)
    assert service.redis.wait(2, 4000) == 2
    sentinels.master().kill()
    finishing = asyncio.gather(*(client.done_stream(name) for name in wanted))
    await asyncio.to_thread(sentinels.wait_master, 40)
    await finishing
    service.follow()
    assert (service.entries(), service.locks()) == ([], {})
    assert caplog.text.count("ending ownership failed") == 1


@pytest.mark.slow
async def test_locks_that_expired_meanwhile(service, consumer, sentinels):
    """Each of two consumers is told what it has lost, and all is owned in the end, once."""
    clients = [consumer(f"c{i}", heartbeat_interval=0.5, max_streams=40) for i in range(2)]
    owned: list[set[str]] = [set(), set()]

    async def follow(i: int, notes) -> None:
        async for notification in notes:
            name = notification.payload.data_stream_name
            if notification.type is ADDED:
                assert name not in owned[i]
                owned[i].add(name)
            elif notification.type is DISOWNED:
                owned[i].remove(name)

    following = [asyncio.ensure_future(follow(i, await c.init())) for i, c in enumerate(clients)]
    wanted = announce(service, 60)
    await eventually(lambda: len(service.locks()) == 60)
    assert service.redis.wait(2, 4000) == 2
    await asyncio.to_thread(replace_master, sentinels, "kill")
    service.follow()
    await eventually(lambda: sorted([*owned[0], *owned[1]]) == sorted(wanted))
    await eventually(lambda: len(service.locks()) == 60)
    for client in clients:
        await client.aclose()
    await asyncio.gather(*following)
    assert (service.locks(), len(service.entries())) == ({}, 60)


@pytest.mark.slow
async def test_sentinels_that_fail_cost_nothing_while_one_is_left(service, consumer, sentinels):
    sentinels.sentinels[0].kill()
    sentinels.sentinels[1].pause()
    client = consumer()
    notes = await client.init()
    announce(service, 5)
    await take(notes, 5)
    sentinels.sentinels[2].kill()  # nobody to ask, but the master is where it was
    service.announce("later")
    assert names(await take(notes, 1)) == ["later"]
    await client.done()


# --- what goes wrong ------------------------------------------------------------------------------


async def refusal(redis: Any, kind: type[RelstreamError]) -> str:
    with pytest.raises(kind) as caught:
        await StreamClient(redis, "svc", consumer_id="c1").init()
    assert type(caught.value) is kind
    return str(caught.value)


async def test_sentinels_that_can_not_be_reached(sentinels):
    for sentinel in sentinels.sentinels:
        sentinel.kill()
    said = await refusal(sentinels.url, ConnectionFailed)
    assert said.startswith("no Sentinel says where the master is: ")
    assert all(f"127.0.0.1:{port}" in said for _, port in sentinels.addresses)


async def test_a_master_that_no_sentinel_knows(sentinels):
    said = await refusal(sentinels.url.replace("/relstream/", "/other/"), ConnectionFailed)
    assert "knows no master 'other'" in said


async def test_a_server_in_place_of_a_sentinel(sentinels):
    host, port = sentinels.master().address
    said = await refusal(f"redis+sentinel://{host}:{port}/relstream", ConnectionFailed)
    assert f"{host}:{port}" in said
    assert "unknown command" in said


async def test_a_master_that_is_gone(sentinels):
    for node in sentinels.nodes:
        node.kill()
    said = await refusal(sentinels.url, ConnectionFailed)
    assert said.startswith("can't connect to redis://127.0.0.1:")


async def test_a_client_for_replicas(sentinels, finder):
    client = finder.slave_for(sentinels.service_name)
    with pytest.raises(InvalidOption, match="master_for, not slave_for"):
        StreamClient(client, "svc", consumer_id="c1")
    await client.aclose()


def test_it_is_no_cluster(sentinels):
    with pytest.raises(ClusterClientRequired):
        StreamClient(sentinels.url, "svc", consumer_id="c1", cluster_mode=ClusterMode.OSS)


# --- passwords and TLS ----------------------------------------------------------------------------


async def test_users_of_the_master_and_of_the_sentinels(sentinels, service, consumer):
    for node in [*sentinels.nodes, *sentinels.sentinels]:
        secret = "of-sentinels" if node in sentinels.sentinels else "of-master"
        node.call("ACL", "SETUSER", "joe", "on", f">{secret}", "~*", "&*", "+@all")
    try:
        url = sentinels.url.replace("//", "//joe:of-master@")
        good = f"{url}?sentinel_username=joe&sentinel_password=of-sentinels"
        notes = await consumer(redis=good).init()
        service.announce("s1")
        assert names(await take(notes, 1)) == ["s1"]
        assert {c["user"] for c in engine_connections(service.redis)} == {"joe"}
        for bad in (good.replace("of-master", "hunter2"), good.replace("of-sentinels", "hunter2")):
            said = await refusal(bad, AuthenticationFailed)
            assert "did not accept user name and password" in said
            assert "hunter2" not in said
    finally:
        for node in sentinels.sentinels:
            node.call("ACL", "DELUSER", "joe")


@pytest.mark.slow
async def test_tls_and_passwords(make: Callable[..., Sentinels], tls: TLSFiles, consumer):
    made = make(Sentinels, tls=tls, password="secret")
    hosts = made.url.partition("//")[2]
    trusts = f"ssl_ca_certs={tls.ca}&sentinel_ssl_ca_certs={tls.ca}"
    finder = redis.asyncio.sentinel.Sentinel(
        made.addresses, sentinel_kwargs={"ssl": True, "ssl_ca_certs": str(tls.ca)}
    )
    ready = finder.master_for(
        made.service_name, password="secret", ssl=True, ssl_ca_certs=str(tls.ca)
    )
    given = {"c1": f"rediss+sentinel://:secret@{hosts}?{trusts}", "c2": ready}
    clients = [consumer(name, redis=source, max_streams=1) for name, source in given.items()]
    notes = [await client.init() for client in clients]
    async with Producer(ready, "svc") as producer:
        await producer.announce_many([("s1", None), ("s2", None)])
        for its_notes in notes:
            await take(its_notes, 1)
        made.master().call("WAIT", 2, 5000)
        await asyncio.to_thread(made.failover)
        for client in clients:
            await client.done()
    await ready.aclose()
    for sentinel in finder.sentinels:
        await sentinel.aclose()
    with pytest.raises(AuthenticationFailed, match="asks for a password"):
        await consumer("c3", redis=f"rediss+sentinel://{hosts}?{trusts}").init()
    with pytest.raises(ConnectionFailed, match="certificate was not accepted"):
        await consumer("c4", redis=f"rediss+sentinel://:secret@{hosts}").init()


# --- a former master that lives on ----------------------------------------------------------------


def connections_by_role(node: Server) -> dict[str, str]:
    """The ids of the engine's connections, by what their names end with."""
    with redis.Redis.from_url(node.url, decode_responses=True) as admin:
        return {c["name"].rpartition(":")[2]: c["id"] for c in engine_connections(admin)}


@pytest.mark.slow
async def test_a_graceful_failover_costs_nobody_a_stream(service, consumer, sentinels):
    """The former master is told seconds later, and serves whoever stays with it until then.

    One period renewed in vain, a second until Sentinels say so, and one until they are asked: locks
    may lapse, and are taken again.
    """
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    wanted = announce(service, 30)
    await take(notes, 30)
    assert service.redis.wait(2, 4000) == 2
    promoted = await asyncio.to_thread(sentinels.failover)
    await eventually(lambda: "renew" in connections_by_role(promoted), 5)
    service.follow()
    await eventually(lambda: len(service.locks()) == 30, 5)
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() >= 2)
    await nothing_comes(notes, 0.1)
    assert [e for _, e in service.redis.xrange(service.lbs) if b"_retry_count" in e] == []
    await asyncio.gather(*(client.done_stream(name) for name in wanted))
    assert (service.locks(), service.entries()) == ({}, [])


@pytest.mark.slow
@pytest.mark.parametrize("leads", ["as before", "anew"])
async def test_who_follows_to_another_master_gives_owners_the_time_to(
    service, consumer, sentinels, monkeypatch, leads
):
    """Owners may be behind, and go on renewing on the former one, which serves them still."""
    key = "svc-input-reconciler"
    first = consumer(consumer_id="c0", heartbeat_interval=6.0, max_streams=1)
    announce(service, 1, "first")
    await take(await first.init(), 1)
    await eventually(lambda: (service.redis.get(key) or b"").startswith(b"c0#"))
    owner = consumer(consumer_id="c1", heartbeat_interval=6.0)
    notes = await owner.init()
    announce(service, 5)
    await take(notes, 5)
    await asyncio.sleep(6.1)  # entries younger than a lease are not looked at
    entries = service.entries()
    locks = [lock for lock in service.locks() if not lock.startswith("first")]
    assert service.redis.wait(2, 4000) == 2
    renew_all = LeaseRenewer._renew_all
    late = True

    async def renew_late(renewer: LeaseRenewer, *args: Any) -> None:
        if not late:
            await renew_all(renewer, *args)

    monkeypatch.setattr(LeaseRenewer, "_renew_all", renew_late)
    promoted = await asyncio.to_thread(sentinels.failover)
    if leads == "anew":
        promoted.client.delete(key)
    promoted.client.delete(*locks)
    await eventually(lambda: {"recover", "lead"} <= connections_by_role(promoted).keys(), 5)
    await asyncio.sleep(1.0)
    late = False
    service.follow()
    await eventually(lambda: set(locks) <= set(service.locks()), 10)
    await nothing_comes(notes, 0.5)
    assert service.entries() == entries


@pytest.mark.slow
async def test_leases_are_renewed_at_once_on_another_master(service, consumer, sentinels):
    """What the former one has renewed since it was replaced was renewed in vain."""
    client = consumer(heartbeat_interval=20.0)
    notes = await client.init()
    announce(service, 3)
    await take(notes, 3)
    locked = time.monotonic()
    locks = list(service.locks())
    assert service.redis.wait(2, 4000) == 2
    await asyncio.to_thread(sentinels.failover)
    service.follow()

    def renewed() -> bool:
        left = 20_000 - 1000 * (time.monotonic() - locked)
        return min(service.ttls(locks)) > left + 500

    await eventually(lambda: time.monotonic() - locked > 1, 5)
    await eventually(renewed, 5)  # long before it is due
    await client.done()


@pytest.mark.slow
async def test_what_is_announced_after_a_graceful_failover_is_not_lost(service, sentinels):
    async with Producer(sentinels.url, "svc") as producer:
        await producer.announce("before")
        assert service.redis.wait(2, 4000) == 2
        promoted = await asyncio.to_thread(sentinels.failover)
        await asyncio.sleep(3)
        after = await producer.announce("after")
        assert after in [entry_id for entry_id, _ in promoted.client.xrange(service.lbs)]


# --- Sentinels that are wrong, or gone ------------------------------------------------------------


@contextlib.asynccontextmanager
async def sentinel_naming(master: Server) -> AsyncIterator[str]:
    """The address of what answers as a Sentinel does which knows this master only."""
    port = str(master.port).encode()
    answer = b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while said := await reader.read(4096):
                if b"GET-MASTER-ADDR-BY-NAME" in said:
                    writer.write(answer)
                elif b"HELLO" in said:
                    writer.write(b"-ERR unknown command\r\n")
                elif b"INFO" in said:
                    writer.write(b"$20\r\nredis_version:7.0.15\r\n")
                else:
                    writer.write(b":1\r\n" if b"ID" in said else b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.slow
async def test_a_sentinel_that_is_behind_is_outvoted(service, consumer, sentinels, make_server):
    former = make_server()  # cut off, with one Sentinel: both believe that it is the master
    async with sentinel_naming(former) as stale:
        hosts = ",".join([stale, *(f"{host}:{port}" for host, port in sentinels.addresses[:2])])
        url = f"redis+sentinel://{hosts}/{sentinels.service_name}"
        client = consumer(redis=url)
        notes = await client.init()
        async with Producer(url, "svc") as producer:
            await eventually(lambda: len(connections_by_role(sentinels.nodes[0])) >= 5)
            opened = connections_by_role(sentinels.nodes[0])
            for i in range(8):
                await producer.announce(f"s{i}")
                assert names(await take(notes, 1)) == [f"s{i}"]
                await asyncio.sleep(1)
                now = connections_by_role(sentinels.nodes[0])
                assert {role: now.get(role) for role in opened} == opened
                assert connections_by_role(former) == {}
        await client.done()


@pytest.mark.slow
async def test_without_any_sentinel_the_master_is_where_it_was(service, consumer, sentinels):
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    announce(service, 5)
    await take(notes, 5)
    master = sentinels.master()
    async with Producer(sentinels.url, "svc") as producer:
        await producer.announce("known")
        await take(notes, 1)
        for sentinel in sentinels.sentinels:
            sentinel.kill()
        killed = engine_connections(master.client)
        for connection in killed:
            master.client.client_kill_filter(_id=connection["id"])
        await eventually(lambda: list(subscriptions(master).values()) == [1])
        await producer.announce("later")
        assert names(await take(notes, 1)) == ["later"]
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() >= 4)
    await hears(service, notes)
    await client.done()
    assert (service.locks(), service.entries()) == ({}, [])
