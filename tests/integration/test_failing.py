"""Work that fails: streams come back later, once and counted, or become dead letters."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import Monitor, Service, eventually, names, nothing_comes, take

from relstream import (
    InvalidOption,
    LBSInfo,
    NotificationType,
    RecoveryConfig,
    RetryDelay,
    StreamClient,
    StreamNotOwned,
)
from relstream.lbs.delayed import packed

Consumer = Callable[..., StreamClient]


@pytest.fixture(params=["scripts", "steps"])
def consumer(
    request: pytest.FixtureRequest, consumer: Consumer, service: Service, redis_url: str
) -> Consumer:
    """Of a user who may run scripts, or may not."""
    if request.param == "scripts":
        return consumer
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-eval", "-evalsha"],
    )  # fmt: skip
    return functools.partial(consumer, url=redis_url.replace("://", "://app:x@"))


DELAYED = "{svc-input}-delayed"


def delayed(service: Service) -> list[tuple[bytes, float]]:
    return service.redis.zrange(DELAYED, 0, -1, withscores=True)


def dead(service: Service) -> list[dict[str, str]]:
    return [
        {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
        for _, fields in service.redis.xrange(service.dlq)
    ]


async def test_a_failed_stream_comes_back_once_and_no_earlier(
    consumer: Consumer, service: Service
) -> None:
    service.announce("bad", '{"k": 1}', extra="kept")
    service.announce("good")
    client = consumer()
    async with client as notifications:
        bad, _good = await take(notifications, 2)
        assert bad.retry_count == 0
        before = time.monotonic()
        await client.fail(bad.payload, KeyError("boom"), delay=0.7)
        (again,) = await take(notifications, 1)
        assert time.monotonic() - before >= 0.7
        assert (again.payload.data_stream_name, again.retry_count) == ("bad", 1)
        assert again.additional_info == {"k": 1}
        ((entry_id, fields),) = service.redis.xrange(service.lbs, min=again.payload.id_in_lbs)
        assert entry_id.decode() == again.payload.id_in_lbs > bad.payload.id_in_lbs
        failed_at = int(fields.pop(b"_failed_at"))
        assert abs(failed_at - int(bad.payload.id_in_lbs.split("-")[0])) < 20_000
        assert json.loads(fields.pop(b"lbs-input")) == {"DataStreamName": "bad", "Info": {"k": 1}}
        assert fields == {
            b"extra": b"kept",
            b"_retry_count": b"1",
            b"_error": b"'boom'",
            b"_error_type": b"KeyError",
            b"_owner": b"c1",
        }
        await nothing_comes(notifications, 0.5)
        assert service.entries() == [_good.payload.id_in_lbs, again.payload.id_in_lbs]
        await eventually(lambda: len(service.locks()) == 2)
        assert not delayed(service)


async def test_what_fails_each_time_is_a_dead_letter_with_its_error(
    consumer: Consumer, service: Service
) -> None:
    first = service.announce("bad")
    client = consumer(recovery=RecoveryConfig(max_retries=2))
    async with client as notifications:
        for retries in range(3):
            (bad,) = await take(notifications, 1)
            assert bad.retry_count == retries
            await client.fail(bad.payload, ValueError(f"no {retries}"), delay=0)
        await nothing_comes(notifications, 0.4)
        (letter,) = dead(service)
        assert letter.pop("_failed_at")
        assert letter.pop("_source_id") > first
        assert json.loads(letter.pop("lbs-input"))["DataStreamName"] == "bad"
        assert letter == {
            "_retry_count": "3",
            "_dlq_reason": "max_retries_exceeded",
            "_error": "no 2",
            "_error_type": "ValueError",
            "_owner": "c1",
        }
        assert not service.entries()
        assert not service.pending()
        assert not service.locks()


async def test_a_rejected_stream_is_a_dead_letter_at_once(
    consumer: Consumer, service: Service
) -> None:
    service.announce("bad", _retry_count="1")
    service.announce("good")
    async with (client := consumer()) as notifications:
        bad, _ = await take(notifications, 2)
        await client.reject(bad.payload, "not ours")
        (letter,) = dead(service)
        assert letter["_dlq_reason"] == "rejected"
        assert letter["_retry_count"] == "1"
        assert (letter["_error"], letter["_error_type"]) == ("not ours", "")
        assert letter["_source_id"] == bad.payload.id_in_lbs
        assert len(service.entries()) == len(service.pending()) == len(service.locks()) == 1


@pytest.mark.only("single", "sentinel", reason="MONITOR is of one server")
async def test_failures_are_batched(consumer: Consumer, service: Service, redis_sync: Any) -> None:
    for number in range(200):
        service.announce(f"s{number}")
    async with (client := consumer()) as notifications:
        got = await take(notifications, 200)
        with Monitor(redis_sync) as monitor:
            await asyncio.gather(*(client.fail(each.payload, "x", delay=60) for each in got))
            seen = monitor.seen()
        sent = [line for line in seen if line.startswith(("EVALSHA", "ZADD")) and DELAYED in line]
        assert len(sent) <= 10
        assert len(delayed(service)) == 200
        assert not service.entries()
        assert not service.pending()
        await eventually(lambda: not service.locks())


async def test_it_fails_once_for_all_its_announcements(
    consumer: Consumer, service: Service
) -> None:
    async with (client := consumer()) as notifications:
        service.announce("twice", _retry_count="1")
        (bad,) = await take(notifications, 1)
        service.announce("twice", _retry_count="2")
        await eventually(lambda: len(service.locks()) == 2)
        await client.fail("twice", delay=0.2)
        (again,) = await take(notifications, 1)
        assert again.retry_count == 3
        await nothing_comes(notifications, 0.4)
        assert service.entries() == [again.payload.id_in_lbs] != [bad.payload.id_in_lbs]
        assert len(service.locks()) == 1
        service.announce("twice")
        await eventually(lambda: len(service.locks()) == 2)
        await client.reject("twice")
        await nothing_comes(notifications, 0.3)
        assert len(dead(service)) == 1
        assert not service.entries()
        await eventually(lambda: not service.locks())


async def test_another_leader_moves_what_a_dead_one_left(
    consumer: Consumer, service: Service
) -> None:
    service.announce("bad")
    failing = consumer("c1")
    async with failing as notifications:
        (bad,) = await take(notifications, 1)
        await failing.fail(bad.payload, delay=1.5)
    assert len(delayed(service)) == 1
    async with consumer("c2") as notifications:
        (again,) = await take(notifications, 1)
        assert again.retry_count == 1
    assert not delayed(service)


@pytest.mark.parametrize("delay", [-1, -0.001, math.inf, math.nan, 30 * 86_400 + 1, True, "1"])
async def test_absurd_delays_are_refused_and_nothing_is_lost(
    consumer: Consumer, service: Service, delay: Any
) -> None:
    service.announce("s")
    async with (client := consumer()) as notifications:
        (got,) = await take(notifications, 1)
        with pytest.raises(InvalidOption, match=r"delay=.* from 0 to 2592000"):
            await client.fail(got.payload, delay=delay)
        await client.done_stream(got.payload)


async def test_only_an_owned_stream_can_fail(consumer: Consumer, service: Service) -> None:
    service.announce("s")
    async with (client := consumer()) as notifications:
        (got,) = await take(notifications, 1)
        for end in (client.fail, client.reject):
            with pytest.raises(StreamNotOwned):
                await end("another")
            with pytest.raises(StreamNotOwned):
                await end(LBSInfo("s", "1-1"))
            with pytest.raises(InvalidOption):
                await end(b"s")  # type: ignore[arg-type]
        finishing = asyncio.ensure_future(client.done_stream(got.payload))
        await asyncio.sleep(0)
        with pytest.raises(StreamNotOwned, match="being finished"):
            await client.fail(got.payload)
        await finishing
        for end in (client.fail, client.reject):
            with pytest.raises(StreamNotOwned):
                await end(got.payload)
    assert not delayed(service)
    assert not dead(service)


@pytest.mark.parametrize("ending", ["fail", "reject"])
async def test_a_stream_that_was_lost_is_its_new_owners(
    consumer: Consumer, service: Service, ending: str
) -> None:
    entry_id = service.announce("s")
    client = consumer(heartbeat_interval=60.0, renew_in_thread=False)
    async with client as notifications:
        (got,) = await take(notifications, 1)
        service.redis.delete(*service.locks())
        new_id = service.requeuer(entry_id)
        with pytest.raises(StreamNotOwned, match="was lost"):
            await getattr(client, ending)(got.payload)
        assert service.entries() == [new_id]
        assert not delayed(service)
        assert not dead(service)


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        ("x" * 1_000_000, "x" * 1024, ""),
        ("ü" * 1_000_000, "ü" * 512, ""),
        ("€" * 1000, "€" * 341, ""),
        ("a\0b", "a\ufffdb", ""),
        ("a\ud800b", "a?b", ""),
        (None, "", ""),
        (ValueError(), "", "ValueError"),
        (
            json.JSONDecodeError("bad", "x", 0),
            "bad: line 1 column 1 (char 0)",
            "json.decoder.JSONDecodeError",
        ),
    ],
    ids=repr,
)
async def test_any_error_can_be_stored(
    consumer: Consumer, service: Service, error: Any, text: str, kind: str
) -> None:
    service.announce("s")
    async with (client := consumer()) as notifications:
        (got,) = await take(notifications, 1)
        await client.reject(got.payload, error)
        (letter,) = dead(service)
        assert (letter["_error"], letter["_error_type"]) == (text, kind)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def test_an_error_without_a_text(consumer: Consumer, service: Service) -> None:
    service.announce("s")
    async with (client := consumer()) as notifications:
        (got,) = await take(notifications, 1)
        await client.reject(got.payload, Unprintable())
        assert dead(service)[0]["_error"] == "its text can't be shown: RuntimeError"


class Broken(Exception):
    pass


async def test_an_exception_fails_the_stream_that_was_notified_last(
    consumer: Consumer, service: Service
) -> None:
    for name in ("healthy", "poison", "waiting"):
        service.announce(name)
    client = consumer(recovery=RecoveryConfig(retry_delay=RetryDelay(50.0, 50.0)))
    with pytest.raises(Broken):  # noqa: PT012 - what the context manager does is tested
        async with client as notifications:
            async for notification in notifications:
                if notification.payload.data_stream_name == "poison":
                    raise Broken("it hurts")
    assert len(delayed(service)) == 1
    ((member, _),) = delayed(service)
    assert b"poison" in member
    assert b"it hurts" in member
    async with consumer("c2") as notifications:
        got = await take(notifications, 2)
        assert [(n.payload.data_stream_name, n.retry_count) for n in got] == [
            ("healthy", 0), ("waiting", 0),
        ]  # fmt: skip


@pytest.mark.parametrize("why", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
async def test_what_is_no_failure_hands_all_over(
    consumer: Consumer, service: Service, why: type[BaseException]
) -> None:
    service.announce("s")
    client = consumer()
    with pytest.raises(why):  # noqa: PT012 - what the context manager does is tested
        async with client as notifications:
            await take(notifications, 1)
            raise why
    assert not delayed(service)
    async with consumer("c2") as notifications:
        (got,) = await take(notifications, 1)
        assert got.retry_count == 0


async def test_an_exception_after_its_end_fails_nothing(
    consumer: Consumer, service: Service
) -> None:
    service.announce("healthy")
    service.announce("done")
    client = consumer()
    with pytest.raises(Broken):  # noqa: PT012 - what the context manager does is tested
        async with client as notifications:
            got = await take(notifications, 2)
            await client.done_stream(got[1].payload)
            raise Broken
    assert not delayed(service)
    assert len(service.entries()) == 1


async def test_an_exception_beyond_the_last_retry_is_a_dead_letter(
    consumer: Consumer, service: Service
) -> None:
    service.announce("poison", _retry_count="3")
    with pytest.raises(Broken):  # noqa: PT012 - what the context manager does is tested
        async with consumer() as notifications:
            await take(notifications, 1)
            raise Broken("again")
    assert dead(service)[0]["_error"] == "again"
    assert not service.entries()


async def test_retries_count_within_a_window_alone(consumer: Consumer, service: Service) -> None:
    window = RecoveryConfig(retry_window=2.0, max_retries=1)
    service.announce("s", _retry_count="1")
    async with (client := consumer(recovery=window)) as notifications:
        (got,) = await take(notifications, 1)
        await asyncio.sleep(2.2)
        await client.fail(got.payload, delay=0)
        (got,) = await take(notifications, 1)
        assert got.retry_count == 1
        await client.fail(got.payload, delay=0)
        await nothing_comes(notifications, 0.3)
        assert len(dead(service)) == 1


async def test_a_dead_owners_retries_count_within_a_window_alone(
    consumer: Consumer, service: Service
) -> None:
    service.redis.xgroup_create(service.lbs, service.group, id="0", mkstream=True)
    old = service.redis.xadd(
        service.lbs, {"lbs-input": '{"DataStreamName": "old", "Info": null}', "_retry_count": "3"},
        id="1-1",
    )  # fmt: skip
    assert old == b"1-1"
    service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"})
    service.orphan(1, _retry_count="3")
    async with consumer(recovery=RecoveryConfig(min_idle_time=0.0, max_retries=3)) as notifications:
        (got,) = await take(notifications, 1)
        assert (got.payload.data_stream_name, got.retry_count) == ("old", 1)
        await eventually(lambda: len(dead(service)) == 1)
        assert dead(service)[0]["_retry_count"] == "4"


async def test_what_is_no_delayed_entry_becomes_a_dead_letter(
    consumer: Consumer, service: Service
) -> None:
    """What somebody else put into the set blocks nothing that is due behind it."""
    junk = [b"junk", b"\xdd\0\0\0\x03\xc6", packed([b"1-1", b"odd"]), b"\x93\x01\x02\x03", b""]
    good = packed([b"1-1", b"lbs-input", b'{"DataStreamName":"good","Info":null}'])
    service.redis.zadd(DELAYED, dict.fromkeys(junk, 1) | {good: 2})
    async with consumer() as notifications:
        (got,) = await take(notifications, 1)
        assert names([got]) == ["good"]
        await eventually(lambda: len(dead(service)) == len(junk))
        assert {letter["_dlq_reason"] for letter in dead(service)} == {"unparseable"}
        assert not delayed(service)


async def test_a_set_of_another_type_keeps_the_stream_owned(
    consumer: Consumer, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.redis.set(DELAYED, "in the way")
    service.announce("s")
    async with (client := consumer()) as notifications:
        (got,) = await take(notifications, 1)
        with pytest.raises(Exception, match="WRONGTYPE"):
            await client.fail(got.payload, delay=5)
        assert len(service.pending()) == len(service.locks()) == 1
        with caplog.at_level(logging.ERROR):
            await eventually(lambda: "can't be requeued" in caplog.text)
        service.redis.delete(DELAYED)
        await client.fail(got.payload, delay=0)
        (again,) = await take(notifications, 1)
        assert again.retry_count == 1


async def test_ten_thousand_fields_fail_too(consumer: Consumer, service: Service) -> None:
    fields = {f"f{number}": "x" for number in range(5000)}
    service.announce("wide", **fields)
    async with (client := consumer()) as notifications:
        (got,) = await take(notifications, 1)
        await client.fail(got.payload, delay=0)
        (again,) = await take(notifications, 1)
        ((_, stored),) = service.redis.xrange(service.lbs)
        assert len(stored) == 5000 + 6
        await client.reject(again.payload)
        assert len(dead(service)[0]) == 5000 + 6 + 2


async def test_disowned_carries_what_was_announced(consumer: Consumer, service: Service) -> None:
    entry_id = service.announce("s", '{"k": 1}', _retry_count="2")
    async with consumer() as notifications:
        await take(notifications, 1)
        service.redis.delete(*service.locks())
        service.requeuer(entry_id)
        (lost,) = await take(notifications, 1, NotificationType.STREAM_DISOWNED)
        assert (lost.additional_info, lost.retry_count) == ({"k": 1}, 2)


async def test_healthy_streams_are_left_alone_by_a_poisonous_one(
    consumer: Consumer, service: Service
) -> None:
    """Work that raises each time is retried with the delays between, and then a dead letter."""
    delay = 0.5
    failed_at: list[float] = []
    healthy = {f"healthy{number}" for number in range(20)}
    for name in [*healthy, "poison"]:
        service.announce(name)
    client = consumer(recovery=RecoveryConfig(max_retries=2))
    async with client as notifications:
        got = await take(notifications, 21)
        tokens = {n.payload for n in got if n.payload.data_stream_name in healthy}
        (poison,) = (n for n in got if n.payload.data_stream_name == "poison")
        while True:
            try:
                raise Broken(f"for the {poison.retry_count + 1}. time")
            except Broken as error:
                now = asyncio.get_running_loop().time()
                assert not failed_at or now - failed_at[-1] >= delay
                failed_at.append(now)
                await client.fail(poison.payload, error, delay=delay)
            if len(failed_at) == 3:
                break
            (poison,) = await take(notifications, 1)
        (letter,) = dead(service)
        assert (letter["_error"], letter["_retry_count"]) == ("for the 3. time", "3")
        await nothing_comes(notifications, 0.5)
        assert {LBSInfo(each.data_stream_name, each.id_in_lbs) for each in client.owned()} == tokens


async def test_out_of_memory_nothing_is_lost(
    consumer: Consumer, service: Service, request: pytest.FixtureRequest
) -> None:
    """A script that has written may add; in steps a failure waits for room."""
    service.announce("bad")
    client = consumer()
    async with client as notifications:
        (bad,) = await take(notifications, 1)
        service.redis.config_set("maxmemory", 1)
        try:
            failing = asyncio.ensure_future(client.fail(bad.payload, "full", delay=0.3))
            if "scripts" in request.node.name:
                await asyncio.wait_for(failing, 10)
                await eventually(lambda: len(service.entries()) == 1 and not delayed(service))
            else:
                await asyncio.sleep(1.0)
                assert not failing.done()
                assert len(service.pending()) == len(service.locks()) == 1
        finally:
            service.redis.config_set("maxmemory", 0)
        await failing
        (again,) = await take(notifications, 1)
        assert again.retry_count == 1
        assert len(service.entries()) == 1


async def test_dead_letters_that_can_not_be_written_keep_nothing_else_waiting(
    consumer: Consumer, service: Service
) -> None:
    """Out of memory they wait, by many batches; other streams are finished meanwhile."""
    for number in range(700):
        service.announce(f"s{number}")
    async with (client := consumer(queue_size=1000)) as notifications:
        got = await take(notifications, 700)
        service.redis.config_set("maxmemory", 1)
        try:
            rejecting = [asyncio.ensure_future(client.reject(n.payload)) for n in got[:650]]
            await asyncio.sleep(0.5)
            assert not any(each.done() for each in rejecting)
            done = [client.done_stream(n.payload) for n in got[650:]]
            await asyncio.wait_for(asyncio.gather(*done), 10)
        finally:
            service.redis.config_set("maxmemory", 0)
        await asyncio.gather(*rejecting)
        assert len(dead(service)) == 650
        assert not service.entries()
