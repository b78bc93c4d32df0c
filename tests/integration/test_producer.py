"""Announcing data streams."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys

import pytest
import redis
import redis.asyncio
from helpers import engine_connections, eventually, weigh

from relstream import (
    ClientClosed,
    ConnectionFailed,
    ConnectionLost,
    InvalidOption,
    Producer,
    ReplyError,
    UsageError,
)


@pytest.fixture
async def producer(redis_url):
    async with Producer(redis_url, "svc") as producer:
        yield producer


def announced(service):
    return [
        (entry_id.decode(), json.loads(fields[b"lbs-input"]))
        for entry_id, fields in service.redis.xrange(service.lbs)
    ]


async def test_one(producer, service):
    first = await producer.announce("a", {"k": [1, None, "ü"]})
    second = await producer.announce("b")
    assert announced(service) == [
        (first, {"DataStreamName": "a", "Info": {"k": [1, None, "ü"]}}),
        (second, {"DataStreamName": "b", "Info": None}),
    ]


async def test_a_hundred_thousand(producer, service):
    ids = await producer.announce_many([(f"s{i}", {"i": i}) for i in range(100_000)])
    got = announced(service)
    assert [entry_id for entry_id, _ in got] == ids
    assert [value["DataStreamName"] for _, value in got] == [f"s{i}" for i in range(100_000)]
    assert got[77_777][1]["Info"] == {"i": 77_777}


async def test_much_is_sent_in_parts_that_a_slow_line_carries_in_time(producer, service):
    link = producer._topology.link(service.lbs.encode())
    sizes = weigh(link)
    large = {"k": "x" * 10_000}
    ids = await producer.announce_many([(f"s{i}", large) for i in range(1000)])
    assert [entry_id for entry_id, _ in announced(service)] == ids
    assert max(sizes) < 300_000


MANY = """
import asyncio, re, sys
from pathlib import Path
from relstream import Producer

def most():  # KB; what getrusage tells is the parent's at first
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

async def main():
    async with Producer(sys.argv[1], "svc") as producer:
        await producer.announce("first")
        before = most()
        await producer.announce_many((f"s{i}", {"i": i}) for i in range(50_000))
        print(most() - before)

asyncio.run(main())
"""


async def test_many_take_little_memory(redis_url, service):
    arguments = [sys.executable, "-c", MANY, redis_url]
    run = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    out, _ = await run.communicate()
    assert len(announced(service)) == 50_001
    assert int(out) < 50_000  # KB, that is 1 KB each


def test_a_producer_belongs_to_one_event_loop(redis_url):
    producer = Producer(redis_url, "svc")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(producer.announce("a"))
    for call in (
        lambda: producer.announce("b"),
        lambda: producer.announce_many([("b", None)]),
        producer.aclose,
    ):
        with pytest.raises(UsageError, match=r"another event loop.*each asyncio\.run"):
            asyncio.run(call())
    loop.run_until_complete(producer.aclose())
    loop.close()


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001])
async def test_any_iterable(producer, service, count):
    ids = await producer.announce_many((f"s{i}", None) for i in range(count))
    assert len(ids) == count
    assert ids == [entry_id for entry_id, _ in announced(service)]


async def test_calls_at_the_same_time(producer, service):
    ids = await asyncio.gather(*[producer.announce(f"s{i}") for i in range(50)])
    assert {(i, v["DataStreamName"]) for i, v in announced(service)} == {
        (entry_id, f"s{i}") for i, entry_id in enumerate(ids)
    }
    assert len(engine_connections(service.redis)) == 1


@pytest.mark.parametrize("bad", [("", None), (None, None), ("a", [1]), ("a", {"k": object()})])
async def test_nothing_is_announced_when_one_is_bad(producer, service, bad):
    with pytest.raises(InvalidOption, match=r"^(data_stream_name|info)="):
        await producer.announce_many([("good", None)] * 2000 + [bad])
    with pytest.raises(InvalidOption):
        await producer.announce(*bad)
    assert not service.redis.exists(service.lbs)
    await producer.announce("good")


async def test_nothing_is_announced_when_the_iterable_fails(producer, service):
    def failing():
        yield ("a", None)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await producer.announce_many(failing())
    assert not service.redis.exists(service.lbs)


@pytest.mark.parametrize("name", ["", None, "a<MUTEX_KEY_SEP>b"])
def test_bad_services(name):
    with pytest.raises(InvalidOption, match=r"^service_name="):
        Producer("redis://localhost", name)


@pytest.mark.only("single", reason="other deployments have other clients: tests/cluster")
async def test_a_ready_client_is_taken_as_an_address(redis_url, service):
    client = redis.asyncio.Redis.from_url(redis_url)
    async with Producer(client, "svc") as producer:
        entry_id = await producer.announce("a")
        assert [c["name"] for c in engine_connections(service.redis)] == ["relstream:producer"]
    await client.aclose()
    assert [got for got, _ in announced(service)] == [entry_id]


async def test_refusals_are_told_and_over_when_they_are_over(producer, service):
    service.redis.config_set("maxmemory", 1)
    with pytest.raises(ReplyError, match=r"^OOM ") as caught:
        await producer.announce_many([("a", None), ("b", None)])
    assert caught.value.transient
    service.redis.config_set("maxmemory", 0)
    service.redis.set(service.lbs, "text")
    with pytest.raises(ReplyError, match=r"^WRONGTYPE "):
        await producer.announce("a")
    service.redis.delete(service.lbs)
    assert await producer.announce("a")


async def test_a_server_that_comes_and_goes(make_server):
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        async with Producer(f"redis://127.0.0.1:{port}", "svc") as producer:
            with pytest.raises(ConnectionFailed, match=f"127.0.0.1:{port}"):
                await producer.announce("a")
    server = make_server()
    with redis.Redis.from_url(server.url) as admin:
        async with Producer(server.url, "svc") as producer:
            await producer.announce("a")
            server.restart()
            await asyncio.sleep(0.05)  # to hear that the connection ended
            entry_id = await producer.announce("b")
            assert admin.xrange("svc-input")[-1][0].decode() == entry_id
            server.pause()
            waiting = asyncio.create_task(producer.announce("c"))
            await asyncio.sleep(0.05)
            server.kill()
            with pytest.raises(ConnectionLost):
                await waiting


async def test_a_cancelled_call_confuses_no_later_one(make_server):
    server = make_server()
    with redis.Redis.from_url(server.url) as admin:
        async with Producer(server.url, "svc") as producer:
            await producer.announce("a")
            server.pause()
            call = asyncio.create_task(producer.announce_many([(f"s{i}", None) for i in range(5)]))
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.resume()
            entry_id = await producer.announce("z")
            last_id, last = admin.xrange("svc-input")[-1]
            assert last_id.decode() == entry_id
            assert json.loads(last[b"lbs-input"])["DataStreamName"] == "z"


async def test_closing(redis_url, service):
    producer = Producer(redis_url, "svc")
    await producer.announce("a")
    await producer.aclose()
    await producer.aclose()
    await eventually(lambda: not engine_connections(service.redis))
    for call in (producer.announce("b"), producer.announce_many([])):
        with pytest.raises(ClientClosed, match="make a new one"):
            await call
    await Producer(redis_url, "svc").aclose()  # never used
    assert len(announced(service)) == 1
