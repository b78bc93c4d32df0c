"""What is logged because it goes wrong later: eviction, a shared database, odd settings."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from core.resp import batch_of
from core.resp import entry as resp_entry
from helpers import HEARTBEAT, SEPARATOR, eventually, names, nothing_comes, take

from relstream import StreamClient
from relstream._core import announcements


@pytest.fixture
def logged(caplog):
    """The warnings and errors so far, as text."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- eviction ---------------------------------------------------------------------------------


@pytest.fixture
def masters(deployment, redis_url, request):
    """Addresses of all masters."""
    if deployment == "cluster":
        found = request.getfixturevalue("cluster").masters()
        return [f"redis://{host}:{port}/0" for host, port in (node.address for node in found)]
    if deployment == "sentinel":
        host, port = request.getfixturevalue("sentinels").master().address
        return [f"redis://{host}:{port}/0"]
    return [redis_url]


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_policy_that_evicts(consumer, redis_sync, masters, logged, policy):
    redis_sync.config_set("maxmemory-policy", policy)
    await consumer().init()
    (said,) = logged()
    for master in masters:
        assert f"{master} ({policy})" in said
    assert "gets a second owner" in said
    assert said.endswith("set maxmemory-policy to noeviction, or use a Redis of its own")


async def test_a_policy_that_does_not_evict(consumer, redis_sync, logged):
    redis_sync.config_set("maxmemory-policy", "noeviction")
    await consumer().init()
    assert logged() == []


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(
    ("forbidden", "warned"), [("-config", True), ("-info", True), ("-config -info", False)]
)
async def test_of_config_and_info_one_is_enough(
    consumer, redis_sync, redis_url, logged, forbidden, warned, protocol
):
    redis_sync.config_set("notify-keyspace-events", "KEx")
    redis_sync.config_set("maxmemory-policy", "allkeys-lfu")
    rules = ["on", ">pw", "~*", "&*", "+@all", *forbidden.split()]
    redis_sync.execute_command("ACL", "SETUSER", "joe", *rules)
    url = redis_url.replace("//", "//joe:pw@") + f"?protocol={protocol}"
    await consumer(url=url).init()
    assert any("(allkeys-lfu)" in line for line in logged()) == warned


async def test_opening_can_be_cancelled_while_masters_are_asked(consumer, monkeypatch):
    async def hang(*args, **options):
        await asyncio.sleep(60)

    monkeypatch.setattr("relstream.lbs.eviction._policy", hang)
    opening = asyncio.ensure_future(consumer().init())
    await asyncio.sleep(0.5)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening  # and no task is left behind


# --- two services in one database -------------------------------------------------------------


def announce(service, *ids):
    """A stream for each id of an LBS entry, named after it."""
    for entry_id in ids:
        value = f'{{"DataStreamName": "call {entry_id}", "Info": null}}'
        service.redis.xadd(service.lbs, {"lbs-input": value}, entry_id)


async def test_a_fresh_entry_whose_lock_another_service_holds(consumer, service, redis_url, logged):
    """Both services announced a stream of this name in the same millisecond."""
    theirs = StreamClient(redis_url, "other", consumer_id="theirs", heartbeat_interval=HEARTBEAT)
    async with theirs as their_notes:
        announce(service.other("other"), "5-1", "5-2")
        await take(their_notes, 2)
        notes = await consumer("ours").init()
        announce(service, "5-1")
        await eventually(logged)
        announce(service, "5-2")
        service.announce("mine")
        assert names(await take(notes, 1)) == ["mine"]
    (said,) = [line for line in logged() if "locked by" in line]
    assert said.startswith("LBS entry 5-1 of data stream 'call 5-1', read just now, is locked by ")
    assert "locked by 'theirs' already" in said
    assert "a database of its own, or names that differ" in said


async def test_a_lock_of_our_own_is_no_other_services(consumer, service, logged):
    service.redis.set(f"call 5-1{SEPARATOR}5-1", "c1")
    notes = await consumer("c1").init()
    announce(service, "5-1")
    service.announce("mine")
    assert names(await take(notes, 1)) == ["mine"]
    await nothing_comes(notes, 0.2)
    assert logged() == []


@pytest.mark.parametrize("how", ["fresh", "again", "late"])
async def test_only_fresh_entries_tell_of_another_service(consumer, service, logged, how):
    """What was read long ago, or is tried once more, may have got another owner by recovery."""
    client = consumer("c1", max_streams=1)
    await client.init()
    service.redis.set(f"s0{SEPARATOR}1-1", "somebody")
    read = batch_of(resp_entry(b"1-1", b"lbs-input", b'{"DataStreamName":"s0"}'))
    separator = SEPARATOR.encode()
    entries, _, _ = announcements(read, b"lbs-input", b"_retry_count", separator, json.loads)
    now = asyncio.get_running_loop().time()
    leases = client._engine.partitions[0].leases
    taken = await leases.acquire(entries, now - 60 * (how == "late"), again=how == "again")
    assert taken == ([], [])
    assert len(logged()) == (how == "fresh")
