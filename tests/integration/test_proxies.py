"""What stands before a server, or is spread over several, and does not do all that Redis does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis
from faults.processes import Tap
from helpers import Service, eventually, names, take
from wire import Proxy

from relstream import RecoveryConfig
from relstream.testing.server import Server

pytestmark = pytest.mark.only("single", reason="a single endpoint, whatever is behind it")

COUNT = 30


class Sharded(Proxy):
    """One endpoint before a node of a cluster, which is said to be none: keys are held apart."""

    async def _pump(self, reader: Any, writer: Any, *gates: asyncio.Event) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data.replace(b"$4\r\nmode\r\n$7\r\ncluster", b"$4\r\nmode\r\n$3\r\none"))


@pytest.fixture
async def sharded(make_server: Callable[..., Server]) -> AsyncIterator[tuple[str, Service]]:
    server = make_server(config={"cluster-enabled": "yes"})
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        await eventually(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        async with Sharded(server.port) as proxy:
            yield proxy.url, OneByOne(client)


class OneByOne(Service):
    """Looks at locks one by one."""

    def locks(self) -> dict[str, str]:
        keys = self.redis.scan_iter(match="*<MUTEX_KEY_SEP>*", count=10_000)
        found = {key.decode(): self.redis.get(key) for key in keys}
        return {key: value.decode() for key, value in found.items() if value is not None}


async def lives(consumer: Callable[..., Any], url: str, service: Service) -> None:
    """Streams are owned, renewed, finished, failed, handed over, and recovered."""
    recovery = RecoveryConfig(min_idle_time=0.2, reconciliation_interval=0.5, max_retries=1)
    first = consumer("c1", url=url, heartbeat_interval=1.0, recovery=recovery)
    notes = await first.init()
    for i in range(COUNT):
        service.announce(f"a{i}")
    await take(notes, COUNT)
    await asyncio.sleep(2.5)
    assert len(service.locks()) == COUNT, "they are renewed"
    for i in range(10):
        await first.done_stream(f"a{i}")
    await first.release("a10")
    await first.fail("a11", "broken", delay=0)
    assert set(names(await take(notes, 2))) == {"a10", "a11"}
    service.orphan(5)
    service.orphan(2, _retry_count="1")
    assert len(await take(notes, 5)) == 5
    await eventually(lambda: service.redis.xlen(service.dlq) == 2)
    await eventually(lambda: not service.pending("ghost"))
    await first.done()
    assert service.locks() == {}
    assert service.entries() == []


async def test_a_database_that_is_spread_over_shards(consumer, sharded, caplog):
    url, service = sharded
    await lives(consumer, url, service)
    assert caplog.text.count("CROSSSLOT") == 1
    assert "scripts are forbidden" not in caplog.text


class Refusing(Tap):
    """Refuses commands, in words of its own."""

    def __init__(self, beyond: redis.Redis, words: str, *commands: bytes) -> None:
        self.refuses = True

        async def gate(role: str, args: list[bytes]) -> bool:
            if self.refuses and args[0].upper() in commands:
                args[0] = b"REFUSED-" + args[0]
            return True

        super().__init__(beyond, gate)
        self._words = words.encode()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(1 << 16):
            writer.write(re.sub(rb"-ERR unknown command [^\r]*REFUSED-[^\r]*", self._words, data))


@pytest.mark.parametrize(
    "words",
    [
        "-ERR unsupported command 'evalsha'",
        "-ERR command 'EVALSHA' is not allowed",
        "-DENIED scripts are switched off",
        "-ERR unknown command 'EVALSHA'",
    ],
)
async def test_scripts_that_are_refused(consumer, service, redis_sync, words, caplog):
    async with Refusing(redis_sync, words, b"EVALSHA", b"EVAL") as tap:
        await lives(consumer, tap.url, service)
    assert caplog.text.count("entries are put back in two steps") <= 2, (
        "by its owner, and by the leader"
    )


async def test_a_subscription_refused_out_of_memory(consumer, service, redis_sync):
    """By Redis 8.10, and older ones by now: a consumer that comes back is to finish work."""
    words = "-OOM command not allowed when used memory > 'maxmemory'."
    async with Refusing(redis_sync, words, b"PSUBSCRIBE") as tap:
        client = consumer("c1", url=tap.url, heartbeat_interval=1.0)
        notes = await client.init()
        service.announce("s1")
        await take(notes, 1)
        service.orphan(1)
        await take(notes, 1)
        await client.done_stream("s1")
        assert redis_sync.pubsub_numpat() == 0
        tap.refuses = False
        await eventually(lambda: redis_sync.pubsub_numpat() == 1)
        await client.aclose()


async def test_a_command_that_can_not_be_done_without(consumer, redis_sync):
    async with Refusing(redis_sync, "-ERR unsupported command 'xpending'", b"XPENDING") as tap:
        with pytest.raises(Exception, match=r"lacks rights .*\+xpending"):
            await consumer("c1", url=tap.url).init()
