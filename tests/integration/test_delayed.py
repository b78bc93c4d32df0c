"""Delayed entries: looked at, requeued, dropped."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import Service, engine_connections, names, nothing_comes, take

from relstream import (
    ClientClosed,
    ConnectionFailed,
    Delayed,
    DelayedEntry,
    InvalidOption,
    ReplyError,
    StreamClient,
    UsageError,
)
from relstream.base_client import BaseClient
from relstream.lbs.delayed import packed
from relstream.lbs.names import Names

Consumer = Callable[..., StreamClient]
KEY = "{svc-input}-delayed"
# ms since 1970 when none is due yet.
LATER = int(time.time() * 1000) + 3_600_000


def member(number: int, name: str = "", info: Any = None, retries: int = 2) -> bytes:
    """A delayed entry, as `fail` leaves it."""
    announced = json.dumps({"DataStreamName": name or f"s{number}", "Info": info})
    return packed(
        [
            f"5-{number}".encode(),
            *(b"lbs-input", announced.encode(), b"other", b"kept"),
            *(b"_retry_count", b"%d" % retries, b"_error", b"boom", b"_error_type", b"KeyError"),
            *(b"_failed_at", b"1700000000123", b"_owner", b"c1"),
        ]
    )


def delay(service: Service, count: int, due: Callable[[int], float], key: str = KEY) -> None:
    """Delayed entries of the streams `s0`, `s1`, …"""
    with service.redis.pipeline(transaction=False) as pipe:
        for number in range(count):
            pipe.zadd(key, {member(number): due(number)})
        pipe.execute()


@pytest.fixture(params=["", "?protocol=2"], ids=["RESP3", "RESP2"])
def url(redis_url: str, request: pytest.FixtureRequest) -> str:
    """Scores are doubles in RESP3 and texts in RESP2."""
    if request.param and "?" in redis_url:
        return redis_url + request.param.replace("?", "&")
    return redis_url + str(request.param)


async def listed(delayed: Delayed) -> list[DelayedEntry]:
    return [entry async for entry in delayed]


async def ids(delayed: Delayed) -> list[str]:
    return [entry.source_id async for entry in delayed]


async def test_entries_are_listed_in_order_of_due_time(service: Service, url: str) -> None:
    delay(service, 250, lambda number: LATER - 3 * number)
    service.redis.zadd(KEY, {member(1000, "with info", {"k": [1]}): LATER + 0.5})
    async with Delayed(url, "svc") as delayed:
        entries = await listed(delayed)
    assert [entry.source_id for entry in entries] == [f"5-{i}" for i in range(249, -1, -1)] + [
        "5-1000"
    ]
    fields = entries[-1].fields
    assert json.loads(fields.pop(b"lbs-input"))["DataStreamName"] == "with info"
    assert fields == {
        b"other": b"kept",
        b"_retry_count": b"2",
        b"_error": b"boom",
        b"_error_type": b"KeyError",
        b"_failed_at": b"1700000000123",
        b"_owner": b"c1",
    }
    assert entries[-1] == DelayedEntry(
        "with info", {"k": [1]}, 2, LATER, "boom", "KeyError", 1700000000123, "c1", "5-1000", fields
    )
    assert [entry.due for entry in entries[:2]] == [LATER - 747, LATER - 744]


async def test_what_a_consumer_failed_is_listed(
    consumer: Consumer, service: Service, url: str
) -> None:
    service.announce("bad", '{"k": 1}', _retry_count="1")
    async with (client := consumer()) as notifications, Delayed(url, "svc") as delayed:
        (got,) = await take(notifications, 1)
        before = time.time() * 1000
        await client.fail(got.payload, KeyError("boom"), delay=100)
        (entry,) = await listed(delayed)
        assert entry[:3] == ("bad", {"k": 1}, 2)
        assert (entry.error, entry.error_type, entry.owner) == ("'boom'", "KeyError", "c1")
        assert entry.source_id == got.payload.id_in_lbs
        assert entry.failed_at is not None
        assert abs(entry.failed_at - before) < 20_000
        assert entry.due == entry.failed_at + 100_000


async def test_there_may_be_none(service: Service, redis_url: str) -> None:
    async with Delayed(redis_url, "svc") as delayed:
        assert await listed(delayed) == []
        assert await delayed.requeue() == await delayed.drop() == 0
        assert await delayed.requeue([]) == await delayed.drop(["5-1"]) == 0


async def test_entries_that_are_due_at_the_same_time_are_all_listed(
    service: Service, url: str
) -> None:
    delay(service, 123, lambda number: LATER + number // 50)
    async with Delayed(url, "svc") as delayed:
        assert sorted(await ids(delayed)) == sorted(f"5-{i}" for i in range(123))
        assert await delayed.drop([f"5-{i}" for i in range(0, 123, 2)]) == 62
        assert sorted(await ids(delayed)) == sorted(f"5-{i}" for i in range(1, 123, 2))
        assert await delayed.requeue([f"5-{i}" for i in range(1, 123, 4)]) == 31
        assert service.redis.zcount(KEY, LATER, "+inf") == 30
        assert await delayed.drop() == 61


@pytest.mark.parametrize("small", [0, 40])
async def test_large_entries_are_read_a_few_at_a_time(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    """However many small ones there are in front of them."""
    delay(service, small, lambda number: LATER - 1)
    for number in range(50, 70):
        service.redis.zadd(KEY, {member(number, info={"a": "x" * 1_000_000}): LATER})
    pipeline, sizes = BaseClient._pipeline, []

    async def weighed(client: Delayed, key: bytes, packed: bytes, *rest: Any) -> list[Any]:
        received = await pipeline(client, key, packed, *rest)
        rows = received[0] if isinstance(received[0], list) else []
        parts = [part for row in rows for part in (row if isinstance(row, list) else [row])]
        came = sum(len(part) for part in parts if isinstance(part, bytes))
        sizes.append(len(packed) + came)
        return received

    monkeypatch.setattr(BaseClient, "_pipeline", weighed)
    async with Delayed(redis_url, "svc") as delayed:
        assert len(await listed(delayed)) == small + 20
        assert await delayed.requeue() == small + 20
        assert await delayed.drop() == small + 20
    assert 1_000_000 < max(sizes) < (10_500_000 if small else 2_500_000)


async def test_what_comes_in_meanwhile_does_not_prolong_the_listing(
    service: Service, redis_url: str
) -> None:
    delay(service, 30, lambda number: LATER + 10_000 * number)
    seen: list[DelayedEntry] = []
    async with Delayed(redis_url, "svc") as delayed:
        async for entry in delayed:
            seen.append(entry)
            number = 100 + len(seen)
            service.redis.zadd(KEY, {member(number): entry.due + 1 if number % 2 else LATER * 2})
            assert len(seen) <= 30
    assert len(seen) == 30
    assert sorted(seen, key=lambda entry: entry.due) == seen


async def test_what_goes_meanwhile_hides_nothing_that_stays(
    service: Service, redis_url: str
) -> None:
    delay(service, 60, lambda number: LATER + number)
    seen: list[str] = []
    async with Delayed(redis_url, "svc") as delayed:
        async for entry in delayed:
            seen.append(entry.source_id)
            service.redis.zrem(KEY, member(len(seen) - 1))  # as the leader does
    assert seen == [f"5-{i}" for i in range(60)]


async def test_nothing_due_after_the_last_of_the_beginning_is_listed(
    service: Service, redis_url: str
) -> None:
    delay(service, 30, lambda number: LATER + number)
    seen: list[str] = []
    async with Delayed(redis_url, "svc") as delayed:
        async for entry in delayed:
            if not seen:
                service.redis.zrem(KEY, member(20))
                service.redis.zadd(KEY, {member(100): LATER + 1000})
            seen.append(entry.source_id)
    assert seen == [f"5-{i}" for i in range(30) if i != 20]


async def test_entries_that_go_hide_none_that_is_due_later(
    service: Service, redis_url: str
) -> None:
    """Those of one time are moved together, in parts."""
    delay(service, 60, lambda number: LATER + number // 15)
    seen: list[str] = []
    async with Delayed(redis_url, "svc") as delayed:
        async for entry in delayed:
            seen.append(entry.source_id)
            if entry.due == LATER:
                service.redis.zremrangebyrank(KEY, 0, 0)
    assert set(seen) >= {f"5-{i}" for i in range(15, 60)}
    assert len(set(seen)) == len(seen)


async def test_requeued_entries_are_delivered_at_once_with_their_retries(
    consumer: Consumer, service: Service, url: str
) -> None:
    delay(service, 60, lambda number: LATER + number)
    async with Delayed(url, "svc") as delayed:
        async with consumer() as notifications:
            await nothing_comes(notifications, 0.3)
            assert await delayed.requeue(["5-7", "5-07", "9-9", "5-31"]) == 2
            got = await take(notifications, 2)
            assert sorted(names(got)) == ["s31", "s7"]
            assert {notification.retry_count for notification in got} == {2}
            ((_, fields), _) = service.redis.xrange(service.lbs)
            assert (fields[b"other"], fields[b"_error"]) == (b"kept", b"boom")
            assert await delayed.requeue() == 58
            assert len(set(names(await take(notifications, 58)))) == 58
            assert await listed(delayed) == []
        assert await delayed.requeue() == 0


async def test_an_entry_that_is_gone_by_then_does_not_come_back(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader moved it between the look at it and its requeueing, or another operator did."""
    delay(service, 2, lambda number: LATER + number)
    pipeline = BaseClient._pipeline

    async def too_late(client: Delayed, key: bytes, packed: bytes, *rest: Any) -> list[Any]:
        if b"ZADD" in packed or b"ZREM" in packed:
            service.redis.zrem(KEY, member(0))
        return await pipeline(client, key, packed, *rest)

    monkeypatch.setattr(BaseClient, "_pipeline", too_late)
    async with Delayed(redis_url, "svc") as delayed:
        assert await delayed.requeue() == 1
        assert await ids(delayed) == ["5-1"]
        delay(service, 2, lambda number: LATER + number)
        assert await delayed.drop() == 1


async def test_what_another_made_due_earlier_stays_so(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay(service, 2, lambda number: LATER + number)
    pipeline = BaseClient._pipeline

    async def after_another(client: Delayed, key: bytes, packed: bytes, *rest: Any) -> list[Any]:
        if b"ZADD" in packed:
            service.redis.zadd(KEY, {member(0): 1000}, xx=True)
        return await pipeline(client, key, packed, *rest)

    monkeypatch.setattr(BaseClient, "_pipeline", after_another)
    async with Delayed(redis_url, "svc") as delayed:
        assert await delayed.requeue() == 1
        assert (await listed(delayed))[0].due == 1000


async def test_without_a_consumer_requeued_entries_wait(
    consumer: Consumer, service: Service, url: str
) -> None:
    delay(service, 3, lambda number: LATER + number)
    async with Delayed(url, "svc") as delayed:
        before = time.time() * 1000
        assert await delayed.requeue(["5-2"]) == 1
        first, *rest = await listed(delayed)
        assert (first.source_id, first.retry_count) == ("5-2", 2)
        assert abs(first.due - before) < 20_000
        assert [entry.due for entry in rest] == [LATER, LATER + 1]
        due = first.due
        assert await delayed.requeue(["5-2"]) == 0  # it is due already
        assert (await listed(delayed))[0].due == due
    async with consumer() as notifications:
        assert names(await take(notifications, 1)) == ["s2"]


async def test_dropped_entries_are_gone(consumer: Consumer, service: Service, url: str) -> None:
    delay(service, 60, lambda number: 1 if number < 3 else LATER + number)
    async with Delayed(url, "svc") as delayed:
        assert await delayed.drop(iter(["5-1", "5-59", "5-59", "9-9"])) == 2
        assert "5-1" not in await ids(delayed)
        assert await delayed.drop() == 58
        assert await delayed.drop() == 0
    async with consumer() as notifications:
        await nothing_comes(notifications, 0.3)
    assert not service.redis.exists(KEY)
    assert not service.entries()


async def test_of_each_partition_all_are_seen(service: Service, redis_url: str) -> None:
    keys = [each.delayed.decode() for each in Names.all_of("svc", partitions=3)]
    assert len(set(keys)) == 3
    for place, key in enumerate(keys):
        service.redis.zadd(key, {member(i): LATER + i for i in range(place, 20)})
    async with Delayed(redis_url, "svc", partitions=3) as delayed:
        assert await ids(delayed) == [f"5-{i}" for place in range(3) for i in range(place, 20)]
        assert await delayed.requeue(["5-0", "5-1"]) == 3  # each partition has ids of its own
        assert await delayed.drop(["5-19"]) == 3
        assert await delayed.requeue() == 57 - 6
        assert await delayed.drop() == 54


JUNK = {
    b"junk": 1.5,
    b"": LATER,
    b"\xdd\0\0\0\x03\xc6": "-inf",
    packed([b"1-1", b"odd"]): "+inf",
    packed([b"\xff", b"x", b"y"]): 2,
    packed([b"7-7", b"lbs-input", b"[]", b"_retry_count", b"x", b"_failed_at", b"-1"]): 3,
    packed([b"7-8", b"lbs-input", b'{"DataStreamName":"\\ud800"}', b"_failed_at", b"9" * 30]): 4,
}


async def test_junk_is_shown_and_can_be_dropped(service: Service, url: str) -> None:
    service.redis.zadd(KEY, {**JUNK, member(1): 5})
    async with Delayed(url, "svc") as delayed:
        entries = await listed(delayed)
        assert [entry.data_stream_name for entry in entries] == [
            None, None, None, None, None, "s1", None, None,
        ]  # fmt: skip
        assert [entry.source_id for entry in entries] == [
            "", "", "\ufffd", "7-7", "7-8", "5-1", "", "",
        ]  # fmt: skip
        assert [entry.due for entry in entries] == [
            -(2**63), 1, 2, 3, 4, 5, LATER, 2**63,
        ]  # fmt: skip
        assert entries[1].fields == {b"lbs-input": b"junk"}
        assert entries[3][1:8] == (None, 0, 3, "", "", None, "")
        assert await delayed.drop(["7-7"]) == 1
        assert await delayed.requeue() == 2  # what is not due yet
        assert await delayed.drop() == len(JUNK)
    assert not service.redis.exists(KEY)


@pytest.mark.parametrize("commands", ["-eval -evalsha", "-eval -evalsha -time"])
async def test_no_more_rights_than_for_the_set_are_needed(
    service: Service, redis_url: str, commands: str
) -> None:
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["{svc-input}*"], channels=["*"],
        commands=["+@all", *commands.split()],
    )  # fmt: skip
    delay(service, 30, lambda number: LATER + number)
    url = redis_url.replace("://", "://app:x@")
    async with Delayed(url, "svc") as delayed:
        assert len(await listed(delayed)) == 30
        assert await delayed.requeue(["5-3"]) == 1
        assert (await ids(delayed))[0] == "5-3"
        assert await delayed.requeue() == 29
        assert await delayed.drop(["5-4"]) == 1
        assert await delayed.drop() == 29


async def test_requeued_entries_are_moved_without_scripts_too(
    consumer: Consumer, service: Service, redis_url: str
) -> None:
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-eval", "-evalsha"],
    )  # fmt: skip
    delay(service, 25, lambda number: LATER + number)
    url = redis_url.replace("://", "://app:x@")
    async with Delayed(url, "svc") as delayed, consumer("c1", url=url) as notifications:
        assert await delayed.requeue() == 25
        assert sorted(names(await take(notifications, 25))) == sorted(f"s{i}" for i in range(25))
        await nothing_comes(notifications, 0.3)


@pytest.mark.parametrize("command", range(1, 12))
@pytest.mark.parametrize("what", ["requeue", "drop"])
async def test_interrupted_at_any_command_it_loses_none(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch, what: str, command: int
) -> None:
    """And is finished by another go."""
    delay(service, 35, lambda number: LATER + number // 9)
    sent = 0
    pipeline = BaseClient._pipeline

    async def interrupted(client: Delayed, *args: Any) -> list[Any]:
        nonlocal sent
        sent += 1
        if sent == command:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
        return await pipeline(client, *args)

    monkeypatch.setattr(BaseClient, "_pipeline", interrupted)
    async with Delayed(redis_url, "svc") as delayed:
        going = asyncio.create_task(getattr(delayed, what)())
        await asyncio.wait({going})
        assert going.cancelled() == (sent == command)
        due = service.redis.zcount(KEY, "-inf", LATER - 1)
        if what == "requeue":
            assert service.redis.zcard(KEY) == 35
        sent = 1000
        left = service.redis.zcard(KEY) - due
        assert await getattr(delayed, what)() == left
    assert service.redis.zcount(KEY, LATER, "+inf") == 0
    assert service.redis.zcard(KEY) == (35 if what == "requeue" else 0)


async def test_a_set_of_another_type_is_an_error(service: Service, redis_url: str) -> None:
    service.redis.set(KEY, "in the way")
    async with Delayed(redis_url, "svc") as delayed:
        for call in (listed(delayed), delayed.requeue(), delayed.drop()):
            with pytest.raises(ReplyError, match="WRONGTYPE"):
                await call


async def test_bad_input_is_refused(service: Service, redis_url: str) -> None:
    delay(service, 3, lambda number: LATER)
    async with Delayed(redis_url, "svc") as delayed:
        bad_ids: list[Any] = [
            "5-1",
            b"5-1",
            ["5-1", "nonsense"],
            [b"5-1"],
            [None],
            5,
            [5],
            ["5-1\0"],
        ]
        for bad in bad_ids:
            for call in (delayed.requeue, delayed.drop):
                with pytest.raises(InvalidOption, match=r"source_ids=.*<ms>-<seq>"):
                    await call(bad)
    assert service.redis.zcount(KEY, LATER, LATER) == 3
    bad_names: list[Any] = ["", "a<MUTEX_KEY_SEP>b", 5]
    for name in bad_names:
        with pytest.raises(InvalidOption, match="service_name"):
            Delayed(redis_url, name)
    with pytest.raises(InvalidOption, match="partitions"):
        Delayed(redis_url, "svc", partitions=0)


async def test_closed_it_is_of_no_use(service: Service, redis_url: str) -> None:
    delay(service, 3, lambda number: LATER)
    async with Delayed(redis_url, "svc") as delayed:
        assert len(await listed(delayed)) == 3
        roles = {connection["name"] for connection in engine_connections(service.redis)}
        assert "relstream:delayed" in roles
    await delayed.aclose()
    for call in (listed(delayed), delayed.requeue(), delayed.drop(), delayed.requeue([])):
        with pytest.raises(ClientClosed, match="this Delayed is closed"):
            await call
    assert service.redis.zcount(KEY, LATER, LATER) == 3


def test_it_belongs_to_one_event_loop(service: Service, redis_url: str) -> None:
    delay(service, 1, lambda number: LATER)
    delayed = Delayed(redis_url, "svc")
    loop = asyncio.new_event_loop()
    assert len(loop.run_until_complete(listed(delayed))) == 1
    for call in (delayed.drop, delayed.requeue, delayed.aclose, lambda: listed(delayed)):
        with pytest.raises(UsageError, match=r"another event loop.*each asyncio\.run"):
            asyncio.run(call())
    loop.run_until_complete(delayed.aclose())
    loop.close()
    assert service.redis.zcard(KEY) == 1


async def test_a_server_that_can_not_be_reached_is_an_error() -> None:
    async with Delayed("redis://127.0.0.1:1", "svc") as delayed:
        for call in (listed(delayed), delayed.requeue(), delayed.drop()):
            with pytest.raises(ConnectionFailed):
                await call
