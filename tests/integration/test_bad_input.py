"""What new users do wrong, and what strangers write: one clear answer each; all else goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket

import pytest
import redis
import redis.asyncio
from helpers import (
    QUICK,
    SEPARATOR,
    TERMINATED,
    Renewals,
    Service,
    eventually,
    names,
    nothing_comes,
    take,
)
from redis.credentials import UsernamePasswordCredentialProvider

from relstream import (
    AuthenticationFailed,
    ConnectionFailed,
    KeyspaceSetupFailed,
    NotificationType,
    PermissionDenied,
    Producer,
    ProtocolError,
    RecoveryConfig,
    RelstreamError,
    ReplyError,
    ServerTooOld,
    StreamClient,
)


@pytest.fixture
def logged(caplog):
    """The warnings and errors so far, as text."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


async def refusal(url, kind=RelstreamError, **options):
    """Why a client can't be opened there."""
    with pytest.raises(kind) as caught:
        await StreamClient(url, "svc", consumer_id="c1", **options).init()
    assert type(caught.value) is kind
    return str(caught.value)


# --- the server -------------------------------------------------------------------------------


async def test_no_server(tmp_path):
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        for address in (f"redis://127.0.0.1:{port}/0", f"unix://{tmp_path}/no.sock?db=0"):
            said = await refusal(address, ConnectionFailed)
            assert said.startswith(f"can't connect to {address}: ")
    said = await refusal("redis://no-such-host.invalid", ConnectionFailed)
    assert "redis://no-such-host.invalid:6379/0" in said


@pytest.mark.only("single", reason="other deployments have other URLs")
async def test_a_server_that_does_not_speak_tls(redis_url):
    url = redis_url.replace("redis://", "rediss://")
    said = await refusal(f"{url}?socket_connect_timeout=0.3", ConnectionFailed)
    assert url in said


@contextlib.asynccontextmanager
async def fake_server(answers, default=b"-ERR unknown command\r\n"):
    """Says these things to these commands."""

    serving = set()

    async def serve(reader, writer):
        serving.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):
            while True:
                arguments = []
                for _ in range(int((await reader.readuntil())[1:])):
                    size = int((await reader.readuntil())[1:])
                    arguments.append((await reader.readexactly(size + 2))[:-2])
                writer.write(answers.get(arguments[0].upper(), default))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*serving), 5)


async def test_something_else_than_redis():
    async with fake_server({}, b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        said = await refusal(url, ProtocolError)
        assert url in said
        assert "HTTP/1.1" in said


def bulk(text):
    return b"$%d\r\n%s\r\n" % (len(text), text)


@pytest.mark.parametrize("version", [b"2.8.0", b"5.0.14", b"6.0.20", b"6.1.240"])
async def test_a_server_older_than_6_2(version):
    hello = b"%2\r\n" + bulk(b"server") + bulk(b"redis") + bulk(b"version") + bulk(version)
    info = bulk(b"# Server\r\nredis_version:" + version + b"\r\nredis_mode:standalone\r\n")
    known = {b"INFO": info, b"CLIENT": b"+OK\r\n"}
    for answers in (known, known | {b"HELLO": hello}):
        async with fake_server(answers) as url:
            said = await refusal(url, ServerTooOld)
        assert said.startswith(f"{url} runs Redis {version.decode()}: ")
        assert "6.2 or later" in said


async def test_passwords(redis_url, redis_sync):
    redis_sync.execute_command("ACL", "SETUSER", "joe", "on", ">secret", "~*", "&*", "+@all")
    for who in ("joe:hunter2", "jim:hunter2"):
        said = await refusal(redis_url.replace("//", f"//{who}@"), AuthenticationFailed)
        assert re.match(r"redis://127.0.0.1:\d+/0 did not accept user name and password", said)
        assert "hunter2" not in said


async def test_passwords_of_a_server_that_asks_everybody(make_server):
    server = make_server()
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("requirepass", "secret")
    said = await refusal(server.url, AuthenticationFailed)
    assert said.startswith(f"{server.url} asks for a password and none was given")
    said = await refusal(server.url.replace("//", "//:hunter2@"), AuthenticationFailed)
    assert "did not accept" in said
    assert "hunter2" not in said
    async with StreamClient(server.url.replace("//", "//:secret@"), "svc", consumer_id="c1"):
        pass


@pytest.mark.only("single", "sentinel", reason="a cluster has one database")
async def test_a_database_that_the_server_does_not_have(redis_url):
    said = await refusal(redis_url.replace("/0", "/99"), ReplyError)
    assert "DB index is out of range" in said
    assert "/99" in said


# --- rights -----------------------------------------------------------------------------------

KEYS = ["~svc-input", "~svc-input-dlq", "~svc-input-reconciler", f"~*{SEPARATOR}*"]
KEYS += ["~{svc-input}-finished-*", "~{svc-input}-delayed", "~{svc-input}-instance-*"]
CHANNEL = f"&__keyspace@0__:*{SEPARATOR}*"
NEEDED = ["xgroup", "xreadgroup", "xadd", "xack", "xdel", "xrange", "xpending"]
NEEDED += ["set", "get", "pexpire", "del", "psubscribe"]
# Without these it works as well: less atomic (scripts), later (CONFIG: unless somebody else has
# switched expiry events on), with a slower end (CLIENT), and without delays (TIME, Z…).
USEFUL = ["evalsha", "eval", "mget", "config|get", "config|set"]
IN_A_CLUSTER = ["cluster|slots", "asking"]
USEFUL += ["client|setname", "client|id", "client|unblock", "ping", "select", "xinfo"]
DELAYING = ["time", "zadd", "zrem", "zcount", "zrangebyscore"]
USEFUL += DELAYING


@pytest.fixture
def user(redis_sync, redis_url, deployment):
    """Makes a user with these rights alone; returns its URL."""
    always = IN_A_CLUSTER if deployment == "cluster" else []

    def make(commands, keys=KEYS, channel=CHANNEL):
        rules = ["reset", "on", ">pw", "resetchannels", *([channel] if channel else []), *keys]
        rules += [f"+{command}" for command in [*commands, *always]]
        redis_sync.execute_command("ACL", "SETUSER", "joe", *rules)
        return redis_url.replace("//", "//joe:pw@")

    return make


async def whole_life(client, service, url):
    """Everything that a consumer can come to do."""
    async with client as notes:
        async with Producer(url, "svc") as producer:
            await producer.announce_many([("a", None), ("b", None)])
        service.redis.xadd(service.lbs, {"no": "announcement"})
        await take(notes, 2)
        await eventually(lambda: service.redis.xlen(service.dlq) == 1)
        renewals = Renewals(service)
        await eventually(lambda: renewals.seen() == 1)
        assert len(service.locks()) == 2
        await client.done_stream("a")
        await client.release("b")
        assert names(await take(notes, 1)) == ["b"]
        service.redis.set(f"x{SEPARATOR}1-1", "", px=1)
        await asyncio.sleep(0.01)
        service.redis.get(f"x{SEPARATOR}1-1")
        expired = await asyncio.wait_for(notes.__anext__(), 5)
        assert expired.type is NotificationType.STREAM_EXPIRED
    assert service.locks() == {}
    assert service.pending() == []
    assert len(service.entries()) == 1  # b, handed over


async def test_the_useful_rights_are_enough_and_nothing_is_missed(consumer, service, user, logged):
    url = user(NEEDED + USEFUL)
    await whole_life(consumer(url=url, heartbeat_interval=2.0), service, url)
    assert [text for text in logged() if "announce no stream" not in text] == []


async def failing(client, service, url):
    """A failure that is delayed, and comes back."""
    async with client as notes:
        service.announce("bad")
        (bad,) = await take(notes, 1)
        await client.fail(bad.payload, delay=0.3)
        (bad,) = await take(notes, 1)
        assert bad.retry_count == 1
        await client.done_stream(bad.payload)


@pytest.mark.parametrize("scripts", [True, False])
async def test_the_useful_rights_are_enough_to_fail(consumer, service, user, logged, scripts):
    allowed = USEFUL if scripts else [c for c in USEFUL if c not in ("eval", "evalsha")]
    url = user(NEEDED + allowed)
    await failing(consumer(url=url, heartbeat_interval=2.0), service, url)
    assert not scripts or logged() == []


@pytest.mark.parametrize("missing", [*DELAYING, "~"])
async def test_without_rights_to_delay_the_stream_stays_owned(
    consumer, service, user, logged, missing
):
    keys = [key for key in KEYS if missing != "~" or not key.endswith("-delayed")]
    url = user([c for c in NEEDED + USEFUL if c != missing], keys)
    client = consumer(url=url, heartbeat_interval=2.0)
    async with client as notes:
        service.announce("bad")
        (bad,) = await take(notes, 1)
        if missing in ("zadd", "~"):
            with pytest.raises(ReplyError, match=r"NOPERM|permission"):
                await client.fail(bad.payload, delay=0.3)
            await client.done_stream(bad.payload)
        else:
            await client.fail(bad.payload, delay=0.3)
            assert service.redis.zcard("{svc-input}-delayed") == 1
            assert client.id  # its own clock serves
        await eventually(lambda: "grant +time" in "".join(logged()) or missing != "time")
        if missing != "zadd":
            await eventually(lambda: "can't be requeued" in "".join(logged()))


async def test_the_needed_rights_are_enough(consumer, service, user, logged):
    service.redis.config_set("notify-keyspace-events", "KEx")
    url = user(NEEDED)
    await whole_life(consumer(url=url, heartbeat_interval=2.0), service, url)
    said = "\n".join(logged())
    assert "config" in said
    assert "+evalsha, +eval and +mget" in said


@pytest.mark.parametrize("missing", ["evalsha", "eval", "mget", "config", "client", "ping"])
async def test_without_useful_rights_it_works_as_well(consumer, service, user, missing):
    service.redis.config_set("notify-keyspace-events", "KEx")
    url = user(NEEDED + [c for c in USEFUL if c.split("|")[0] != missing])
    await whole_life(consumer(url=url, heartbeat_interval=2.0), service, url)


@pytest.mark.parametrize("missing", NEEDED)
async def test_each_missing_command_is_named(user, missing):
    url = user([c for c in NEEDED + USEFUL if c != missing])
    kind = KeyspaceSetupFailed if missing == "psubscribe" else PermissionDenied
    said = await refusal(url, kind)
    assert f"+{missing}" in said
    for other in NEEDED:
        assert other == missing or f"+{other} " not in f"{said} "


async def test_all_missing_rights_are_named_at_once(user):
    said = await refusal(user([], KEYS[:1]), PermissionDenied)
    assert "'joe'" in said
    commands = " ".join(f"+{command}" for command in NEEDED if command != "psubscribe")
    listed = said.partition("ACL SETUSER joe ")[2].split()
    assert sorted(listed) == sorted(commands.split())


async def test_the_remedy_works(user, redis_sync):
    url = user(["psubscribe"], [])
    for _ in range(2):  # whoever may not run a command hears nothing about its keys
        said = await refusal(url, PermissionDenied)
        remedy = said[said.index("ACL SETUSER ") :]
        redis_sync.execute_command(*remedy.split())
    async with StreamClient(url, "svc", consumer_id="c1"):
        pass


@pytest.mark.parametrize("missing", KEYS[:2])
async def test_each_missing_key_is_named(user, missing):
    said = await refusal(user(NEEDED, [k for k in KEYS if k != missing]), PermissionDenied)
    assert said.endswith(f" {missing}")


async def test_the_remedy_for_a_missing_channel_works(user, redis_sync):
    url = user([c for c in NEEDED if c != "psubscribe"], channel=None)
    said = await refusal(url, KeyspaceSetupFailed)
    redis_sync.execute_command(*said[said.index("ACL SETUSER ") :].split())
    async with StreamClient(url, "svc", consumer_id="c1"):
        pass
    assert f"__keyspace@0__:*{SEPARATOR}*" in said
    assert "+psubscribe" in said


@pytest.mark.only("single", reason="needs a URL for another client")
async def test_no_other_user_is_named_than_the_one_that_lacks_rights(user, redis_url):
    user(["psubscribe"])
    provider = UsernamePasswordCredentialProvider("joe", "pw")
    client = redis.asyncio.Redis.from_url(redis_url, credential_provider=provider)
    said = await refusal(client, PermissionDenied)
    assert "ACL SETUSER <user> +" in said


@pytest.mark.only("single", "sentinel", reason="a cluster has one database")
async def test_another_database_needs_select(user, redis_url):
    url = user(NEEDED).replace("/0", "/1")
    assert "'select'" in await refusal(url, PermissionDenied)


async def test_streams_whose_locks_are_out_of_bounds_stay_pending(consumer, service, user, logged):
    url = user(NEEDED + USEFUL, [*KEYS[:3], f"~good*{SEPARATOR}*"])
    ids = {name: service.announce(name) for name in ("good1", "bad", "good2")}
    client = consumer(url=url)
    notes = await client.init()
    assert names(await take(notes, 2)) == ["good1", "good2"]
    await eventually(lambda: any("locks were refused" in text for text in logged()))
    assert set(service.pending("c1")) == set(ids.values())
    for name in ("good1", "good2"):
        await client.done_stream(name)
    assert service.pending("c1") == [ids["bad"]]


# --- entries ----------------------------------------------------------------------------------

BAD = {
    "no lbs-input": (None, "no field lbs-input"),
    "nothing": (b"", "not JSON"),
    "broken JSON": (b'{"DataStreamName":"x"', "not JSON"),
    "more than JSON": (b'{"DataStreamName":"x"} {}', "not JSON"),
    "text": (b"call", "not JSON"),
    "not UTF-8": (b'{"DataStreamName":"\xff","Info":null}', "not JSON"),
    "UTF-16": ('{"DataStreamName":"x"}'.encode("utf-16"), "not JSON"),
    "half a character": (b'{"DataStreamName":"\\ud800"}', "not JSON"),
    "nested": (b'{"DataStreamName":"x","Info":' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "not JSON"),
    "NaN": (b'{"DataStreamName":"x","Info":{"a":NaN}}', "not JSON"),
    "null": (b"null", "expected a JSON object"),
    "a list": (b'[{"DataStreamName":"x"}]', "expected a JSON object, got list"),
    "a string": (b'"x"', "expected a JSON object, got str"),
    "no name": (b'{"Info":{}}', "DataStreamName is of type NoneType"),
    "no keys": (b"{}", "DataStreamName is of type NoneType"),
    "empty name": (b'{"DataStreamName":"","Info":{}}', "DataStreamName is empty"),
    "name null": (b'{"DataStreamName":null,"Info":{}}', "DataStreamName is of type NoneType"),
    "name number": (b'{"DataStreamName":5,"Info":{}}', "DataStreamName is of type int"),
    "name list": (b'{"DataStreamName":["x"]}', "DataStreamName is of type list"),
    "info list": (b'{"DataStreamName":"x","Info":[1]}', "Info is of type list"),
    "info string": (b'{"DataStreamName":"x","Info":"y"}', "Info is of type str"),
    "info number": (b'{"DataStreamName":"x","info":0}', "Info is of type int"),
    "10 MB": (b'{"DataStreamName":"x","Info":"%s"}' % (b"y" * 10_000_000), "Info is of type str"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_what_announces_nothing_becomes_one_dead_letter(consumer, service, logged, kind):
    value, reason = BAD[kind]
    fields = {b"before": b"\xff\x00", b"_retry_count": b"2", b"": b"empty"}
    if value is not None:
        fields[b"lbs-input"] = value
    good = [service.announce("good1")]
    bad = service.redis.xadd(service.lbs, fields)
    good.append(service.announce("good2"))
    notes = await consumer("c1").init()
    assert names(await take(notes, 2)) == ["good1", "good2"]
    await eventually(lambda: service.entries() == good)
    ((_, letter),) = service.redis.xrange(service.dlq)
    del fields[b"_retry_count"]
    added = {b"_retry_count": b"2", b"_dlq_reason": b"unparseable", b"_source_id": bad}
    assert reason in letter.pop(b"_error").decode()
    assert list(letter.items()) == list((fields | added).items())
    assert service.pending() == good
    assert len(service.locks()) == 2
    await eventually(logged)
    (said,) = logged()
    assert bad.decode() in said
    assert reason in said
    assert len(said) < 300
    good.append(service.announce("good3"))
    assert names(await take(notes, 1)) == ["good3"]


@pytest.mark.parametrize(
    ("given", "written"), [(None, "0"), ("-1", "0"), ("many", "0"), ("007", "7"), ("3", "3")]
)
async def test_the_retry_count_of_a_dead_letter(consumer, service, given, written):
    count = {} if given is None else {"_retry_count": given}
    service.redis.xadd(service.lbs, {"x": "y", "_source_id": "forged", **count})
    async with consumer():
        await eventually(lambda: service.redis.xlen(service.dlq))
    ((_, letter),) = service.redis.xrange(service.dlq)
    assert letter[b"_retry_count"] == written.encode()
    assert letter[b"_source_id"] != b"forged"


@pytest.mark.parametrize(("cap", "least", "most"), [(100, 100, 250), (0, 500, 500)])
async def test_how_many_dead_letters_are_kept(consumer, service, logged, cap, least, most):
    with service.redis.pipeline(transaction=False) as pipeline:
        for i in range(500):
            pipeline.xadd(service.lbs, {"bad": i})
        pipeline.execute()
    service.announce("good")
    notes = await consumer(recovery=RecoveryConfig(dlq_max_len=cap)).init()
    await take(notes, 1)
    await eventually(lambda: len(service.entries()) == 1)
    letters = [fields[b"bad"] for _, fields in service.redis.xrange(service.dlq)]
    assert least <= len(letters) <= most
    assert len(logged()) < 20  # one a batch
    assert letters == [b"%d" % i for i in range(500 - len(letters), 500)]


async def test_ten_megabytes_of_info_are_delivered(consumer, service, redis_url):
    info = {"text": "ü" * 4_000_000, "list": list(range(300_000))}
    async with Producer(redis_url, "svc") as producer:
        await producer.announce_many([("small", None), ("large", info), ("last", None)])
    client = consumer()
    notes = await client.init()
    got = await take(notes, 3)
    assert names(got) == ["small", "large", "last"]
    assert got[1].additional_info == info
    await client.release("large")
    (again,) = await take(notes, 1)
    assert again.additional_info == info


async def test_entries_deleted_while_they_were_pending(consumer, service):
    kept, *gone = service.orphan(3, "c1")
    service.redis.xdel(service.lbs, *gone)
    notes = await consumer("c1").init()
    assert names(await take(notes, 1)) == ["s0"]
    assert kept not in service.entries()  # put back: the former life may only be frozen
    await eventually(lambda: len(service.pending()) == 1 and service.pending() == service.entries())
    assert not service.redis.exists(service.dlq)
    service.announce("next")
    assert names(await take(notes, 1)) == ["next"]


async def test_a_server_without_memory_for_the_group(redis_url, redis_sync):
    redis_sync.config_set("maxmemory", 1)
    said = await refusal(redis_url, ReplyError)
    assert said.startswith("OOM ")
    assert "the consumer group of 'svc-input'" in said


async def test_a_server_without_scripts(consumer, make_server, logged):
    """All that uses them takes steps instead."""
    server = make_server(config={"rename-command": 'EVALSHA ""'})
    with redis.Redis.from_url(server.url) as admin:
        service = Service(admin)
        (orphan,) = service.orphan(1)
        client = consumer(url=server.url, heartbeat_interval=0.5)
        notes = await client.init()
        (got,) = await take(notes, 1)
        assert got.payload.id_in_lbs != orphan
        renewals = Renewals(service, list(service.locks()))
        await eventually(lambda: renewals.seen() >= 2)
        await client.release("s0")
        assert names(await take(notes, 1)) == ["s0"]
        await client.done_stream("s0")
        assert (service.entries(), service.pending(), service.locks()) == ([], [], {})
    assert any("a script is forbidden" in line for line in logged())


# --- keys of the wrong type -------------------------------------------------------------------


async def test_a_load_balancer_stream_that_is_no_stream(consumer, service, redis_url):
    service.redis.set(service.lbs, "text")
    said = await refusal(redis_url, ReplyError)
    assert said.startswith("WRONGTYPE ")
    assert "'svc-input'" in said
    service.redis.delete(service.lbs)
    notes = await consumer().init()
    service.redis.set(service.lbs, "text")
    (last,) = await take(notes, 1, TERMINATED)
    assert "WRONGTYPE" in last.additional_info["info"]
    assert "'svc-input'" in last.additional_info["info"]
    assert [n async for n in notes] == []


@pytest.mark.parametrize("when", ["before", "while-it-leads"])
@pytest.mark.parametrize("kind", ["list", "text"])
async def test_a_leader_key_that_is_none(consumer, service, logged, kind, when):
    key = "svc-input-reconciler"

    def it_is_said():
        # Again and again: who has just seen that it leads may yet prolong whatever is there.
        pipe = service.redis.pipeline(transaction=True)
        pipe.delete(key)
        (pipe.set if kind == "text" else pipe.rpush)(key, "x")
        pipe.execute()
        return "the key 'svc-input-reconciler' is in use" in "".join(logged())

    if when == "before":
        assert not it_is_said()
    notes = await consumer(heartbeat_interval=0.5).init()
    if when == "while-it-leads":
        await eventually(lambda: (service.redis.get(key) or b"").startswith(b"c1#"))
    await eventually(it_is_said)
    (entry_id,) = service.orphan(1)
    assert service.pending("ghost") == service.entries() == [entry_id]
    service.redis.delete(key)
    (got,) = await take(notes, 1)
    assert got.payload.data_stream_name == "s0"
    assert got.payload.id_in_lbs > entry_id


async def test_a_dead_letter_stream_that_is_no_stream(consumer, service, logged):
    service.redis.set(service.dlq, "text")
    service.announce("good1")
    bad = service.redis.xadd(service.lbs, {"bad": "entry"}).decode()
    service.announce("good2")
    client = consumer("c1", heartbeat_interval=1.0)
    notes = await client.init()
    assert names(await take(notes, 2)) == ["good1", "good2"]
    await client.done_stream("good1")
    await client.done_stream("good2")
    await eventually(logged)
    assert service.entries() == service.pending("c1") == [bad]
    service.announce("good3")
    assert names(await take(notes, 1)) == ["good3"]
    await client.done_stream("good3")
    await asyncio.sleep(2.2)  # it was tried again by now
    # Once when it was read, once when it was found to stay.
    said, *again = [text for text in logged() if "dead-letter stream" in text]
    assert said.startswith("the dead-letter stream 'svc-input-dlq' can't be written (WRONGTYPE ")
    assert bad in said
    assert len(again) <= 1
    service.redis.delete(service.dlq)
    await eventually(lambda: service.entries() == service.pending() == [])
    ((_, letter),) = service.redis.xrange(service.dlq)
    assert letter[b"_source_id"] == bad.encode()


async def test_locks_that_are_no_strings(consumer, service):
    """What is announced where a key of another type is in the lock's place gets another place."""
    odd = f"odd{SEPARATOR}5-0"
    service.redis.rpush(odd, "x")
    service.redis.xadd(service.lbs, {"lbs-input": json.dumps({"DataStreamName": "odd"})}, "5-0")
    service.announce("good")
    client = consumer("c1", heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    assert names(await take(notes, 2)) == ["good", "odd"]
    assert "5-0" not in service.entries()
    assert (
        b"_retry_count"
        not in dict(service.redis.xrange(service.lbs))[service.pending()[-1].encode()]
    )
    await client.done_stream("good")
    await client.done_stream("odd")
    assert service.entries() == []
    assert service.redis.lrange(odd, 0, -1) == [b"x"]


@pytest.mark.only("single", reason="makes one server answer late")
async def test_late_answers_make_nothing_a_former_lifes(consumer, service):
    """What a consumer has read itself costs no retry, though it seems to have idled for longer."""
    client = consumer("c1", heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    for number in range(1, 5):
        entry_id = f"{9_000_000_000_000 + number}-0"
        lock = f"odd{SEPARATOR}{entry_id}"
        service.redis.set(lock, "other")
        announced = {"lbs-input": json.dumps({"DataStreamName": "odd"})}
        service.redis.xadd(service.lbs, announced, entry_id)
        await eventually(lambda i=entry_id: service.pending("c1") == [i])
        await nothing_comes(notes, QUICK / 2 * number)
        pipe = service.redis.pipeline(transaction=False)
        pipe.delete(lock).client_pause(400).execute()
        assert names(await take(notes, 1)) == ["odd"]
        ((_, fields),) = service.redis.xrange(service.lbs)
        assert list(fields) == [b"lbs-input"]
        await client.done_stream("odd")
