"""An LBS entry with the last possible id: nothing can be added behind it any more."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import pytest
from helpers import SEPARATOR, eventually, names, take

from relstream import DeadLetters, LBSInfo, Producer, RecoveryConfig, ReplyError

LAST = "18446744073709551615-18446744073709551615"
LAST_BUT_ONE = "18446744073709551615-18446744073709551614"
SCANS = RecoveryConfig(reconciliation_interval=0.3, min_idle_time=0.2, batch_size=1)
LEAVE_ALONE = RecoveryConfig(min_idle_time=3600)


@pytest.fixture(params=[True, False], ids=["scripts", "two-steps"])
def url(request, service, redis_url):
    if request.param:
        return redis_url
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-eval", "-evalsha"],
    )  # fmt: skip
    return redis_url.replace("://", "://app:x@")


@pytest.fixture
def said(caplog):
    """Warnings and errors so far that are about the last id."""
    return lambda: [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and "last possible" in r.getMessage()
    ]


def announce_at(service, entry_id, name="last"):
    value = f'{{"DataStreamName": "{name}", "Info": null}}'
    return service.redis.xadd(service.lbs, {"lbs-input": value}, id=entry_id).decode()


def orphan_at(service, entry_id):
    announce_at(service, entry_id)
    service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"})


async def test_what_a_dead_owner_leaves_stays_pending(consumer, service, url, said):
    ids = service.orphan(3)
    orphan_at(service, LAST)
    client = consumer(url=url, recovery=SCANS)
    await client.init()
    await eventually(said)
    await asyncio.sleep(2)
    lines = said()
    assert len(lines) <= 4, lines
    await asyncio.sleep(2)
    assert said() == lines
    assert service.pending("ghost") == service.entries() == [*ids, LAST]
    assert service.redis.xlen(service.dlq) == 0
    # The leader leads on: what needs no new entry is done.
    assert client.health().leader
    with pytest.raises(ReplyError, match="last possible"):
        await client.claim(LBSInfo("s0", ids[0]))
    await client.aclose()
    assert service.pending("ghost") == service.entries() == [*ids, LAST]


async def test_what_was_tried_too_often_becomes_a_dead_letter(consumer, service, url):
    service.orphan(2, _retry_count="3", _first_retry_at="1")
    orphan_at(service, LAST)
    strict = RecoveryConfig(
        reconciliation_interval=0.3, min_idle_time=0.2, max_retries=3, retry_window=None
    )
    await consumer(url=url, recovery=strict).init()
    await eventually(lambda: service.pending("ghost") == service.entries() == [LAST])
    assert service.redis.xlen(service.dlq) == 2


async def test_its_owner_keeps_what_it_can_not_hand_over(consumer, service, url, said):
    client = consumer(url=url, recovery=LEAVE_ALONE)
    notes = await client.init()
    first = service.announce("first")
    announce_at(service, LAST)
    assert names(await take(notes, 2)) == ["first", "last"]
    for name in ("first", "last"):
        with pytest.raises(ReplyError, match="last possible"):
            await client.release(name)
    assert client.is_owned("first")
    assert client.is_owned("last")
    assert service.pending("c1") == service.entries() == [first, LAST]
    await client.done_stream("last")
    assert service.entries() == [first]
    await client.aclose()  # with one left
    assert service.pending("c1") == service.entries() == [first]
    assert len(said()) == 1


async def test_what_fails_waits(consumer, service, url, said):
    """Until it can be added to the stream again."""
    client = consumer(url=url, recovery=LEAVE_ALONE)
    notes = await client.init()
    service.announce("first")
    announce_at(service, LAST)
    await take(notes, 2)
    await client.fail("first", "no", delay=0)
    await eventually(said)
    lines = said()
    await asyncio.sleep(2)
    assert said() == lines
    assert len(lines) <= 2
    assert service.redis.zcard("{svc-input}-delayed") == 1
    await client.done_stream("last")
    service.redis.delete(service.lbs)
    assert names(await take(notes, 1)) == ["first"]
    assert service.redis.zcard("{svc-input}-delayed") == 0


async def test_the_last_ids_there_are_lose_nothing(consumer, service, url):
    """Between the first and the second step somebody else may take them."""
    ids = service.orphan(3)
    orphan_at(service, LAST_BUT_ONE)
    await consumer(url=url, recovery=LEAVE_ALONE, max_streams=1).init()

    def left():
        found = service.redis.xrange(service.lbs) + service.redis.xrange(service.dlq)
        return Counter(fields[b"lbs-input"] for _, fields in found)

    before = left()
    assert len(before) == 4
    await eventually(lambda: LAST in service.entries())
    await asyncio.sleep(1.5)
    assert left() == before
    letters = service.redis.xrange(service.dlq)
    assert {fields[b"_dlq_reason"] for _, fields in letters} <= {b"ids_exhausted"}
    assert len(set(ids).intersection(service.entries())) + len(letters) in (2, 3)
    # And what stays in the stream is pending for somebody, or will be read.
    stays = set(service.entries())
    assert stays.issuperset(service.pending())


async def test_an_owner_audits_pages_that_end_with_it(consumer, service, monkeypatch):
    monkeypatch.setattr("relstream.ownership.leases.AUDIT_PAGE", 1)
    client = consumer(recovery=LEAVE_ALONE)
    notes = await client.init()
    announce_at(service, LAST)
    await take(notes, 1)
    assert await client._engine.partitions[0].audit() == []
    assert client.is_owned("last")


async def test_a_stream_made_anew_gets_nothing_of_a_probe(consumer, service, redis_url):
    """Nor does one that never had an entry."""
    client = consumer(recovery=LEAVE_ALONE)
    await client.init()
    await client._engine.partitions[0]._requeuer._two_phase._check_adding()
    assert service.entries() == []
    service.redis.delete(service.lbs)
    await client._engine.partitions[0]._requeuer._two_phase._check_adding()
    assert not service.redis.exists(service.lbs) or service.entries() == []


async def test_announcing_says_what_is_wrong(service, redis_url):
    announce_at(service, LAST)
    async with Producer(redis_url, "svc") as producer:
        with pytest.raises(ReplyError, match="delete the stream"):
            await producer.announce("a")


async def test_dead_letters_are_listed_up_to_it(service, redis_url):
    service.redis.xadd(service.dlq, {"lbs-input": '{"DataStreamName": "a"}'})
    service.redis.xadd(service.dlq, {"lbs-input": '{"DataStreamName": "b"}'}, id=LAST)
    async with DeadLetters(redis_url, "svc") as letters:
        assert [letter.data_stream_name async for letter in letters] == ["a", "b"]


async def test_a_lock_of_it_is_looked_at(consumer, service):
    """It is at the end of what is sampled."""
    service.redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
    orphan_at(service, LAST)
    service.redis.set(f"last{SEPARATOR}{LAST}", "ghost", px=1000)
    client = consumer(recovery=RecoveryConfig(min_idle_time=3600))
    await client.init()
    await asyncio.sleep(3)
    assert client.health().leader
    assert service.pending("ghost") == [LAST]
