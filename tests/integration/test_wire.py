"""The wire contract, as consumers and producers in other languages rely on it."""

from __future__ import annotations

import asyncio

import pytest
import redis
from helpers import EXPIRED, QUICK, SEPARATOR, Monitor, eventually, names, nothing_comes, take

from relstream import ConfigConflict, Producer, RecoveryConfig, StreamClient
from relstream.lbs.expiry_events import merged_flags


async def test_what_a_producer_writes(redis_url, service):
    async with Producer(redis_url, "svc") as producer:
        await producer.announce("call 1")
        await producer.announce("ü", {"Port": 5060, "a": {"b": []}})
    assert [fields for _, fields in service.redis.xrange("svc-input")] == [
        {b"lbs-input": b'{"DataStreamName":"call 1","Info":null}'},
        {b"lbs-input": '{"DataStreamName":"ü","Info":{"Port":5060,"a":{"b":[]}}}'.encode()},
    ]


@pytest.mark.parametrize("given", ["my name ü", None])
async def test_names_on_the_server(service, monkeypatch, redis_url, given):
    monkeypatch.setenv("POD_NAME", "pod-7")
    expected = given or "redis-consumer-pod-7"
    async with StreamClient(redis_url, "svc", consumer_id=given) as notes:
        service.announce("a")
        await take(notes, 1)
        (group,) = service.redis.xinfo_groups("svc-input")
        (consumer,) = service.redis.xinfo_consumers("svc-input", "svc-group")
        assert (group["name"], consumer["name"].decode()) == (b"svc-group", expected)
        assert list(service.locks().values()) == [expected]


@pytest.mark.only("single", "sentinel", reason="looks at one server's commands")
async def test_commands_of_a_stream_s_life(consumer, service):
    client = consumer("c1", heartbeat_interval=60)
    with Monitor(service.redis) as monitor:
        notes = await client.init()
        entry_id = service.announce("call")
        await take(notes, 1)
        await client.done_stream("call")
        seen = monitor.seen()
    lock = f"call{SEPARATOR}{entry_id}"
    assert "XGROUP CREATE svc-input svc-group 0 MKSTREAM" in seen
    assert f"PSUBSCRIBE __keyspace@0__:*{SEPARATOR}*" in seen
    assert f"SET {lock} c1 NX PX 60000" in seen
    ack = seen.index(f"XACK svc-input svc-group {entry_id}")
    delete = seen.index(f"XDEL svc-input {entry_id}")
    assert ack < delete < seen.index(f"DEL {lock}")
    assert service.locks() == {}
    assert service.entries() == service.pending() == []


@pytest.mark.only("single", "sentinel", reason="looks at one server's commands")
async def test_a_lock_lives_two_seconds_and_is_renewed(service, redis_url):
    async with StreamClient(redis_url, "svc", consumer_id="c1") as notes:
        with Monitor(service.redis) as monitor:
            entry_id = service.announce("call")
            await take(notes, 1)
            lock = f"call{SEPARATOR}{entry_id}"
            assert f"SET {lock} c1 NX PX 2000" in monitor.seen()
            renewal = f" 1 {lock} c1 2000"
            await eventually(
                lambda: any(c.startswith("EVALSHA") and renewal in c for c in monitor.seen())
            )


@pytest.mark.parametrize(
    "name", ["call", "gespräch ☎", f"a{SEPARATOR}b", f"a{SEPARATOR}1-0", "with space\n", '"\\']
)
async def test_names_of_streams(consumer, service, redis_url, name):
    client = consumer("c1")
    notes = await client.init()
    async with Producer(redis_url, "svc") as producer:
        entry_id = await producer.announce(name)
    (note,) = await take(notes, 1)
    assert note.payload == (name, entry_id)
    assert service.locks() == {f"{name}{SEPARATOR}{entry_id}": "c1"}
    service.redis.set(f"{name}{SEPARATOR}7-7", "another", px=1)
    service.redis.set(f"{name}{SEPARATOR}no-id", "no lock at all", px=1)
    await asyncio.sleep(0.01)
    service.redis.get(f"{name}{SEPARATOR}no-id")
    service.redis.get(f"{name}{SEPARATOR}7-7")
    (note,) = await take(notes, 1, EXPIRED)
    assert note.payload == (name, "7-7")
    await client.done_stream(name)
    assert service.locks() == {}


@pytest.mark.parametrize(
    ("value", "info"),
    [
        ('{"DataStreamName":"call","Info":{"k":1}}', {"k": 1}),
        ('{"Info":{"k":1},"DataStreamName":"call"}', {"k": 1}),
        ('{"datastreamname":"call","INFO":{"k":1}}', {"k": 1}),
        ('{"dATAsTREAMnAME":"call"}', None),
        (' {"DataStreamName" : "\\u0063all", "Info": null, "More": [1], "Other": {}}\n', None),
    ],
)
async def test_what_others_write_is_read_and_requeued_as_it_was(consumer, service, value, info):
    fields = {
        b"before": b"\xff\x00",
        b"lbs-input": value.encode(),
        b"_retry_count": b"2",
        b"trace": b"00-ab",
        b"": b"",
    }
    old_id = service.redis.xadd("svc-input", fields).decode()
    client = consumer("c1", max_streams=1)
    notes = await client.init()
    (note,) = await take(notes, 1)
    assert (note.payload, note.additional_info) == (("call", old_id), info)
    await client.release("call")
    (note,) = await take(notes, 1)
    ((new_id, again),) = service.redis.xrange("svc-input")
    assert note.payload == ("call", new_id.decode())
    assert note.additional_info == info
    assert new_id.decode() != old_id
    assert list(again.items()) == list(fields.items())  # the retry count, too: it was no failure


async def test_a_group_that_others_made_is_joined(consumer, service):
    service.redis.xgroup_create("svc-input", "svc-group", "$", mkstream=True)
    service.announce("a")
    assert names(await take(await consumer().init(), 1)) == ["a"]


async def test_a_lock_of_another_consumer_is_respected(consumer, service):
    service.redis.set(f"call{SEPARATOR}5-0", "redis-consumer-go", px=60_000)
    service.redis.xadd("svc-input", {"lbs-input": '{"DataStreamName":"call"}'}, "5-0")
    notes = await consumer("c1", heartbeat_interval=QUICK).init()
    await nothing_comes(notes, 1.2)
    assert service.locks() == {f"call{SEPARATOR}5-0": "redis-consumer-go"}
    assert service.pending("c1") == ["5-0"]


async def test_dead_letters_go_where_they_are_told(consumer, service):
    service.redis.xadd("svc-input", {"a": "b"})
    await consumer(recovery=RecoveryConfig(dlq_stream="dead ☠")).init()
    await eventually(lambda: service.redis.xlen("dead ☠"))
    assert not service.redis.exists("svc-input-dlq")


@pytest.mark.parametrize(
    ("current", "merged"),
    [
        *[("", "KEx"), ("KEx", None), ("KEA", None), ("AKE", None), ("xKEm", None)],
        *[("A", "AKE"), ("gK", "gKEx"), ("KE", "KEx"), ("Ex", "ExK"), ("$lmn", "$lmnKEx")],
    ],
)
def test_merged_flags(current, merged):
    assert merged_flags(current) == merged


@pytest.mark.parametrize(
    ("before", "override", "after"),
    [
        *[("", False, "KEx"), ("", True, "KEx")],
        *[("KEA", False, "AKE"), ("KEx", False, "KEx"), ("xKEg", True, "xKEg")],
        *[("Kg", True, "KgEx"), ("Kg", False, None), ("A", True, "AKE"), ("Ex", False, None)],
    ],
)
async def test_the_server_s_setting(consumer, service, before, override, after):
    def setting():
        return set(service.redis.config_get("notify-keyspace-events")["notify-keyspace-events"])

    service.redis.config_set("notify-keyspace-events", before)
    client = consumer(force_config_override=override)
    if after is None:
        with pytest.raises(ConfigConflict, match=r"is '\w+' on redis://.*KEx.*_override=True"):
            await client.init()
        assert setting() == set(before)
        return
    notes = await client.init()
    assert setting() == set(after)
    service.redis.set(f"a{SEPARATOR}1-1", "x", px=1)
    await asyncio.sleep(0.01)
    service.redis.get(f"a{SEPARATOR}1-1")
    assert names(await take(notes, 1, EXPIRED)) == ["a"]


@pytest.mark.only("single", reason="needs a URL for another client")
async def test_another_database_is_another_world(consumer, service, redis_url):
    url = redis_url.replace("/0", "/3")
    notes = await consumer(url=url).init()
    service.announce("elsewhere")
    with redis.Redis.from_url(url) as third:
        third.xadd("svc-input", {"lbs-input": '{"DataStreamName":"here"}'})
        assert names(await take(notes, 1)) == ["here"]
        for client, name in ((service.redis, "elsewhere"), (third, "here")):
            client.set(f"{name}{SEPARATOR}1-1", "x", px=1)
            await asyncio.sleep(0.01)
            client.get(f"{name}{SEPARATOR}1-1")
        assert names(await take(notes, 1, EXPIRED)) == ["here"]
        await nothing_comes(notes, 0.05)
    assert service.locks() == {}
