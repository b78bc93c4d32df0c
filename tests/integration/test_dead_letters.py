"""Dead letters: looked at, replayed, purged."""

from __future__ import annotations

import asyncio
import json

import pytest
from helpers import SEPARATOR, Heard, eventually, names, take

from relstream import (
    ClientClosed,
    DeadLetters,
    InvalidOption,
    RecoveryConfig,
    ReplyError,
    UsageError,
)
from relstream._core import Batch
from relstream.net.connection import Connection


async def test_letters_are_listed_with_all_that_is_known(service, redis_url):
    ids = service.route_to_dlq(250)
    odd = service.redis.xadd(service.dlq, {"x": b"\xff", "_dlq_reason": "unparseable"}).decode()
    async with DeadLetters(redis_url, "svc") as letters:
        listed = [letter async for letter in letters]
    assert [letter.id for letter in listed] == [*ids, odd]
    assert listed[7][1:6] == ("1-7", "max_retries_exceeded", 4, "s7", {"n": 7})
    assert listed[7].fields[b"other"] == b"kept"
    assert listed[-1][1:6] == ("", "unparseable", 0, None, None)


FAILURE = {
    "_error": "boom \u20ac",
    "_error_type": "KeyError",
    "_failed_at": "1700000000123",
    "_owner": "c1",
}


async def test_letters_tell_of_their_failure_and_keep_it_when_replayed(service, redis_url):
    announced = {"lbs-input": '{"DataStreamName":"s"}', "_retry_count": "4"}
    service.redis.xadd(service.dlq, {**announced, **FAILURE, "_dlq_reason": "rejected"})
    service.redis.xadd(
        service.dlq, {"_error": b"\xff", "_failed_at": "-1", "_dlq_reason": "unparseable"}
    )
    service.route_to_dlq(1)
    async with DeadLetters(redis_url, "svc") as letters:
        failed, odd, never = [letter async for letter in letters]
        assert failed[7:] == ("boom \u20ac", "KeyError", 1700000000123, "c1")
        assert (failed.error, failed.error_type) == ("boom \u20ac", "KeyError")
        assert (failed.failed_at, failed.owner) == (1700000000123, "c1")
        assert odd[7:] == ("\ufffd", "", None, "")
        assert never[7:] == ("", "", None, "")
        assert await letters.replay([failed.id]) == 1
    ((_, fields),) = service.redis.xrange(service.lbs)
    stored = {name.decode(): value.decode() for name, value in fields.items()}
    assert stored == {**announced, **FAILURE, "_retry_count": "0"}


async def test_large_letters_are_read_a_few_at_a_time(service, redis_url, monkeypatch):
    value = json.dumps({"DataStreamName": "s", "Info": {"a": "x" * 1_000_000}})
    for _ in range(20):
        service.redis.xadd(service.dlq, {"lbs-input": value})
    pipeline, sizes = Connection.pipeline, []

    async def weighed(self, packed, replies, **options):
        received = await pipeline(self, packed, replies, **options)
        sizes.append(len(packed) + sum(part.nbytes for part in received if isinstance(part, Batch)))
        return received

    monkeypatch.setattr(Connection, "pipeline", weighed)
    async with DeadLetters(redis_url, "svc") as letters:
        assert len([letter async for letter in letters]) == 20
        assert await letters.replay() == 20
    assert 0 < max(sizes) < 3_000_000
    assert (service.redis.xlen(service.dlq), len(service.entries())) == (0, 20)


async def test_replay_announces_anew_with_no_retries(consumer, service, redis_url):
    service.route_to_dlq(250)
    async with DeadLetters(redis_url, "svc") as letters:
        assert await letters.replay() == 250
        assert await letters.replay() == 0
    assert service.redis.xlen(service.dlq) == 0
    ((_, fields), *_) = service.redis.xrange(service.lbs)
    assert fields == {
        b"lbs-input": b'{"DataStreamName":"s0","Info":{"n":0}}',
        b"other": b"kept",
        b"_retry_count": b"0",
    }
    notes = await consumer().init()
    assert sorted(names(await take(notes, 250))) == sorted(f"s{i}" for i in range(250))


async def test_some_are_replayed_and_some_purged(service, redis_url):
    ids = service.route_to_dlq(4)
    async with DeadLetters(redis_url, "svc") as letters:
        assert await letters.replay([ids[1], "9-9"]) == 1
        assert await letters.purge([ids[0]]) == 1
        assert [letter.id async for letter in letters] == ids[2:]
        for bad in [ids[2], "nonsense"], 5, ids[2]:
            with pytest.raises(InvalidOption, match="<ms>-<seq>"):
                await letters.purge(bad)
        assert await letters.purge() == 2
    assert len(service.entries()) == 1
    with pytest.raises(ClientClosed):
        await letters.purge()


def test_they_belong_to_one_event_loop(service, redis_url):
    service.route_to_dlq(1)
    letters = DeadLetters(redis_url, "svc")
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(letters.purge(["9-9"])) == 0
    for call in letters.purge, letters.replay, letters.aclose:
        with pytest.raises(UsageError, match=r"another event loop.*each asyncio\.run"):
            asyncio.run(call())
    loop.run_until_complete(letters.aclose())
    loop.close()
    assert service.redis.xlen(service.dlq) == 1


async def test_a_replay_that_is_refused_loses_nothing(service, redis_url):
    service.route_to_dlq(3)
    service.redis.set(service.lbs, "in the way")
    async with DeadLetters(redis_url, "svc") as letters:
        with pytest.raises(Exception, match="WRONGTYPE"):
            await letters.replay()
    assert service.redis.xlen(service.dlq) == 3


async def test_a_replay_that_is_partly_refused_keeps_the_rest(service, redis_url):
    service.route_to_dlq(3)
    service.redis.xadd(service.lbs, {"x": "y"}, f"{2**64 - 1}-{2**64 - 2}")  # one more can be added
    async with DeadLetters(redis_url, "svc") as letters:
        with pytest.raises(ReplyError, match="ID"):
            await letters.replay()
    assert service.redis.xlen(service.dlq) == 2
    assert len(service.entries()) == 2


async def test_what_comes_in_meanwhile_is_left_for_the_next_time(service, redis_url):
    service.route_to_dlq(3)
    seen = []
    async with DeadLetters(redis_url, "svc") as letters:
        async for letter in letters:
            seen.append(letter.id)
            service.redis.xadd(service.dlq, {"lbs-input": "routed again"})
            assert len(seen) <= 3
    assert service.redis.xlen(service.dlq) == 6


async def test_another_stream_may_be_named(service, redis_url):
    service.redis.xadd("elsewhere", {"x": "y"})
    async with DeadLetters(redis_url, "svc", dlq_stream="elsewhere") as letters:
        assert len([letter async for letter in letters]) == 1


@pytest.mark.parametrize("command", range(1, 8))
@pytest.mark.parametrize("what", ["replay", "purge"])
async def test_interrupted_at_any_command_it_loses_none(
    service, redis_url, monkeypatch, what, command
):
    """And is finished by another go."""
    service.route_to_dlq(250)
    wanted = {f"s{i}" for i in range(250)}
    sent = 0
    pipeline = Connection.pipeline

    async def interrupted(link, *args, **options):
        nonlocal sent
        sent += 1
        if sent == command:
            asyncio.current_task().cancel()
        return await pipeline(link, *args, **options)

    def there() -> set[str]:
        rows = [*service.redis.xrange(service.dlq), *service.redis.xrange(service.lbs)]
        return {json.loads(fields[b"lbs-input"])["DataStreamName"] for _, fields in rows}

    monkeypatch.setattr(Connection, "pipeline", interrupted)
    async with DeadLetters(redis_url, "svc") as letters:
        going = asyncio.create_task(getattr(letters, what)())
        await asyncio.wait({going})
        assert going.cancelled() == (sent == command)
        if what == "replay":
            assert there() == wanted
        sent = 1000
        await getattr(letters, what)()
    assert service.redis.xlen(service.dlq) == 0
    assert there() == (wanted if what == "replay" else set())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b'{"DataStreamName":"a\xff","Info":null}', "a\ufffd"),
        (b'{"DataStreamName":"a\\ud800","Info":null}', "a\ufffd"),
        (b'{"DataStreamName":"a","Info":' + b"[" * 2000 + b"]" * 2000 + b"}", "a"),
    ],
    ids=["not UTF-8", "lone surrogate", "nested deeply"],
)
async def test_what_a_consumer_in_go_works_on_is_left_to_it(consumer, service, value, name):
    """It reads more than we do; its lock has the name as it reads it."""
    service.redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
    entry_id = service.redis.xadd(service.lbs, {"lbs-input": value}).decode()
    service.redis.xreadgroup(service.group, "go", {service.lbs: ">"})
    lock = f"{name}{SEPARATOR}{entry_id}"
    service.redis.set(lock, "go")
    recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=0.2)
    heard = Heard()
    client = consumer("c1", heartbeat_interval=0.5, recovery=recovery, recorder=heard)
    await client.init()
    await eventually(lambda: len(heard.calls("reconciliation_scan")) > 2)
    assert service.redis.xlen(service.dlq) == 0
    assert service.pending("go") == [entry_id]
    service.redis.delete(lock)
    await eventually(lambda: service.redis.xlen(service.dlq) == 1)
    ((_, fields),) = service.redis.xrange(service.dlq)
    assert fields[b"lbs-input"] == value
    assert fields[b"_dlq_reason"] == b"unparseable"
    assert fields[b"_error"]


async def test_a_cap_that_is_near_is_said(consumer, service, caplog):
    service.route_to_dlq(85)
    heard = Heard()
    recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=0.2, dlq_max_len=100)
    client = consumer("c1", heartbeat_interval=0.5, recovery=recovery, recorder=heard)
    notes = await client.init()
    for i in range(110):
        service.announce(f"s{i}")
    await take(notes, 110)
    await asyncio.gather(*(client.reject(f"s{i}", "bad") for i in range(110)))
    assert caplog.text.count("holds") == 1
    assert "of 100 entries at most (dlq_max_len)" in caplog.text
    left = service.redis.xlen(service.dlq)
    trimmed = sum(count for (count,) in heard.calls("dead_letters_trimmed"))
    assert trimmed == 85 + 110 - left > 0


async def test_what_can_not_be_read_is_not_replayed(redis_url, service, caplog):
    service.route_to_dlq(2)
    bad = service.redis.xadd(service.dlq, {"lbs-input": "no JSON", "_dlq_reason": "unparseable"})
    async with DeadLetters(redis_url, "svc") as letters:
        assert await letters.replay() == 2
        assert await letters.replay([bad.decode()]) == 0
        assert [letter.id async for letter in letters] == [bad.decode()]
    assert len(service.entries()) == 2
    assert caplog.text.count(bad.decode()) == 2
