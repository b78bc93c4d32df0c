"""Another server takes over behind the same address, and nobody is told but by refusals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
import redis
from helpers import ADDED, EXPIRED, SEPARATOR, Service, engine_connections, eventually, names, take
from wire import GREETING, Proxy, command, listening

from relstream import Producer, ReplyError
from relstream._core import pack
from relstream.net.deployment import deployment_of
from relstream.testing.server import Server

pytestmark = pytest.mark.only("single", reason="Sentinel and clusters say who took over")


class Failover:
    """A master with a replica behind one address."""

    def __init__(self, former: Server, new: Server, address: Proxy) -> None:
        self.former = redis.Redis.from_url(former.url)
        self.new = redis.Redis.from_url(new.url)
        self._ports = former.port, new.port
        self.url = address.url
        self._address = address

    async def replicated(self) -> None:
        self.new.replicaof("127.0.0.1", self._ports[0])
        await eventually(lambda: self.new.info("replication")["master_link_status"] == "up")

    def switch(self) -> None:
        """What an operator does, or a service: new connections lead to the new master."""
        self.former.wait(1, 1000)
        self._address.server_port = self._ports[1]
        self.new.replicaof("no", "one")
        self.former.replicaof("127.0.0.1", self._ports[1])

    def close(self) -> None:
        self.former.close()
        self.new.close()


@pytest.fixture
async def failover(make_server: Callable[..., Server]) -> AsyncIterator[Failover]:
    former, new = make_server(), make_server()
    async with Proxy(former.port) as address:
        failover = Failover(former, new, address)
        await failover.replicated()
        with contextlib.closing(failover):
            yield failover


async def test_all_connections_follow(failover, consumer):
    """Also those that only read, or only listen."""
    before, after = Service(failover.former), Service(failover.new)
    client = consumer(url=failover.url)
    async with client as notes:
        before.announce("one")
        await take(notes, 1)
        failover.switch()
        await eventually(lambda: not engine_connections(failover.former))
        after.announce("two")
        assert names(await take(notes, 1, ADDED)) == ["two"]
        await client.done_stream("one")
        await client.done_stream("two")
        assert not after.entries()
        await eventually(lambda: failover.new.pubsub_numpat())
        failover.new.set(f"probe{SEPARATOR}1-1", "x", px=1)
        await asyncio.sleep(0.01)
        failover.new.get(f"probe{SEPARATOR}1-1")
        assert names(await take(notes, 1, EXPIRED)) == ["probe"]
    assert not engine_connections(failover.former)


async def test_nothing_owned_is_lost_or_counted(failover, consumer):
    before, after = Service(failover.former), Service(failover.new)
    async with consumer("c1", url=failover.url) as notes, consumer("c2", url=failover.url):
        for i in range(50):
            before.announce(f"s{i}")
        await eventually(lambda: len(before.locks()) == 50)
        ids = set(before.entries())
        failover.switch()
        await eventually(lambda: not engine_connections(failover.former))
        await asyncio.sleep(2.5)  # two heartbeats and more
        assert set(after.entries()) == ids, "none was put back"
        assert len(after.locks()) == 50
        assert notes is not None


async def test_a_producer_follows(failover):
    async with Producer(failover.url, "svc") as producer:
        await producer.announce("one")
        failover.switch()
        assert (await producer.announce("two")).endswith("-0")
        assert failover.new.xlen("svc-input") == 2
    assert not engine_connections(failover.former)


async def test_a_name_that_leads_to_the_former_master_still(failover):
    async with Producer(failover.url, "svc") as producer:
        await producer.announce("one")
        failover.former.replicaof("127.0.0.1", 1)
        with pytest.raises(ReplyError, match="READONLY"):
            await producer.announce("two")
        failover.former.replicaof("no", "one")
        await producer.announce("three")
        assert failover.former.xlen("svc-input") == 2


@pytest.mark.parametrize("refusal", ["MOVED 5 127.0.0.1:{port}", "READONLY You can't write"])
async def test_a_node_of_a_cluster_behind_the_same_name(refusal):
    """A replica was promoted there; what is connected to the former master is told so for ever."""
    former: list[asyncio.StreamWriter] = []
    switched = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not switched.is_set():
            former.append(writer)
        while True:
            match await command(reader):
                case [b"HELLO", *_]:
                    writer.write(GREETING)
                case [b"CLUSTER", *_]:
                    host = b"$9\r\n127.0.0.1\r\n"
                    node = b"*3\r\n%b:%d\r\n$2\r\nid\r\n" % (host, port)
                    writer.write(b"*1\r\n*3\r\n:0\r\n:16383\r\n" + node)
                case [b"XADD", *_] if switched.is_set() and writer in former:
                    writer.write(b"-%b\r\n" % refusal.format(port=port).encode())
                case _:
                    writer.write(b"$3\r\n1-0\r\n")

    async with (
        listening(serve) as port,
        Producer(f"redis+cluster://127.0.0.1:{port}", "svc") as producer,
    ):
        assert await producer.announce("one") == "1-0"
        switched.set()
        assert await producer.announce("two") == "1-0"


async def test_sentinels_that_name_one_server_in_two_ways(server, redis_sync, consumer):
    """By turns, as where only some of them resolve names; nobody has to be connected anew."""
    hosts = [b"127.0.0.1", b"localhost"]
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while True:
            if (await command(reader))[0] == b"HELLO":
                writer.write(GREETING)
                continue
            asked += 1
            port, host = b"%d" % server.port, hosts[asked % 2]
            writer.write(b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(host), host, len(port), port))

    service = Service(redis_sync)
    async with listening(serve) as port:
        client = consumer(url=f"redis+sentinel://127.0.0.1:{port}/svc")
        async with client as notes:
            service.announce("one")
            await take(notes, 1)
            before = {each["id"] for each in engine_connections(redis_sync)}
            opened = redis_sync.info("stats")["total_connections_received"]
            looked = asked
            await eventually(lambda: asked > looked + 8)
            assert {each["id"] for each in engine_connections(redis_sync)} >= before
            # The other name is looked at now and then, by each of two event loops.
            assert redis_sync.info("stats")["total_connections_received"] - opened <= 4
            await client.done_stream("one")


@pytest.mark.parametrize(
    "refusal",
    [
        "NOAUTH Authentication required.",
        "READONLY You can't write against a read only replica.",
        "UNBLOCKED force unblock from blocking operation, instance state changed (master -> rep?)",
    ],
)
async def test_a_connection_of_no_use_is_left_and_what_it_refused_sent_again(refusal):
    """In its place: what was carried out beside it is not sent twice."""
    useless: list[asyncio.StreamWriter] = []
    signed_in = 0
    carried_out = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal signed_in
        while True:
            args = await command(reader)
            if args[0] == b"HELLO":
                signed_in += b"AUTH" in args
                writer.write(GREETING)
            elif writer in useless and args[1] == b"b":
                writer.write(b"-%b\r\n" % refusal.encode())
            else:
                carried_out.append(args[1])
                writer.write(b"+%b\r\n" % args[1])
            if not useless:
                useless.append(writer)

    async with listening(serve) as port:
        link = deployment_of(f"redis://:pw@127.0.0.1:{port}").link("test")
        try:
            packed = pack(b"GET", b"a") + pack(b"GET", b"b") + pack(b"GET", b"c")
            assert await link.pipeline(packed, 3) == [b"a", b"b", b"c"]
        finally:
            await link.close()
    assert carried_out == [b"a", b"c", b"b"]
    assert signed_in == 2
