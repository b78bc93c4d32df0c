"""Who is in the consumer group: those that live, and no others."""

from __future__ import annotations

import asyncio
import logging

import pytest
from helpers import eventually, names, take

from relstream import RecoveryConfig

LAST = "18446744073709551615-18446744073709551615"
LEAVE_ALONE = RecoveryConfig(min_idle_time=3600)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_AFTER", 0.3)
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_EVERY", 0.05)


@pytest.fixture
def limited(service, redis_url):
    """A user who may do all but this; returns its URL."""

    def make(*commands, keys=("*",)):
        service.redis.acl_setuser(
            "app", enabled=True, nopass=True, keys=list(keys), channels=["*"],
            commands=["+@all", *commands],
        )  # fmt: skip
        return redis_url.replace("://", "://app:x@")

    return make


def rows(service):
    return service.redis.xinfo_consumers(service.lbs, service.group)


def group(service):
    return {row["name"].decode() for row in rows(service)}


async def seen(service, *clients):
    """Each of them, which own one stream at most, is given one, and finishes it."""
    notes = [await client.init() for client in clients]
    for i in range(len(clients)):
        service.announce(f"s{i}")
    added = [(await take(its_notes, 1))[0] for its_notes in notes]
    for client, notification in zip(clients, added, strict=True):
        await client.done_stream(notification.payload)
    assert group(service) >= {client.id for client in clients}
    return notes


async def stays(service, *expected):
    """For many times as long as dead ones do."""
    for _ in range(60):
        assert group(service).issuperset(expected)
        await asyncio.sleep(0.05)


async def test_living_ones_stay_however_long_they_get_nothing(consumer, service):
    clients = [consumer(f"c{i}", max_streams=1, recovery=LEAVE_ALONE) for i in range(3)]
    await seen(service, *clients)
    await clients[1].pause()
    service.redis.xgroup_createconsumer(service.lbs, service.group, "dead")
    await stays(service, "c0", "c1", "c2")
    await eventually(lambda: group(service) == {"c0", "c1", "c2"})


async def test_of_those_not_known_to_be_dead_none_is_removed(consumer, service, limited):
    """Where instances may not be read, and a server before 7.2 does not tell of empty reads."""
    url = limited(keys=["svc-*", "*<MUTEX*", "{svc-input}-finished-*", "{svc-input}-delayed"])
    leader = consumer("c0", url=url, recovery=LEAVE_ALONE)
    await seen(service, leader)
    service.redis.xgroup_createconsumer(service.lbs, service.group, "silent")
    if any("inactive" in row for row in rows(service)):
        await eventually(lambda: group(service) == {"c0"})
    else:
        await stays(service, "c0", "silent")


@pytest.mark.parametrize("end", ["aclose", "done"])
async def test_one_that_closes_leaves(consumer, service, end):
    client, other = consumer("c0", max_streams=1), consumer("c1", max_streams=1)
    await seen(service, client, other)
    service.announce("owned")
    await getattr(client, end)()
    assert group(service) == {"c1"}
    await other.aclose()
    assert group(service) == set()


async def test_one_that_was_never_given_anything_leaves(consumer, service):
    client = consumer("c0")
    await client.init()
    await eventually(lambda: service.reads("c0"))
    await client.aclose()
    assert group(service) == set()


async def test_one_for_which_something_is_pending_stays(consumer, service):
    client = consumer("c0", recovery=LEAVE_ALONE)
    notes = await client.init()
    value = '{"DataStreamName": "last", "Info": null}'
    service.redis.xadd(service.lbs, {"lbs-input": value}, id=LAST)
    assert names(await take(notes, 1)) == ["last"]
    await client.aclose()  # it can't be handed over: nothing can be added behind it
    assert service.pending("c0") == [LAST]
    assert group(service) == {"c0"}


async def test_one_whose_name_lives_on_stays(consumer, service):
    client, other = (consumer("c0", recovery=LEAVE_ALONE) for _ in range(2))
    await client.init()
    await other.init()
    await eventually(lambda: client.health().reasons)
    service.announce("s0")
    await eventually(lambda: service.pending("c0") != [])
    await asyncio.gather(*[c.done_stream("s0") for c in (client, other)], return_exceptions=True)
    await client.aclose()
    assert group(service) == {"c0"}


@pytest.mark.parametrize("denied", [("-eval", "-evalsha"), ("-xgroup|delconsumer",)])
async def test_one_that_may_not_remove_itself_closes_as_ever(
    consumer, service, limited, denied, caplog, binary
):
    if "|" in denied[0] and binary.flavour == "redis" and binary.version < (7, 0):
        pytest.skip("a right to one of the subcommands can't be taken away")
    client = consumer("c0", url=limited(*denied), recovery=LEAVE_ALONE)
    await seen(service, client)
    caplog.clear()
    await client.aclose()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert group(service) == {"c0"}
