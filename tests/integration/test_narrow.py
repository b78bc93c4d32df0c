"""Moments that come seldom, and are brought about on purpose: what is right in them as well."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from helpers import (
    DISOWNED,
    EXPIRED,
    QUICK,
    SEPARATOR,
    TERMINATED,
    Monitor,
    Renewals,
    eventually,
    names,
    nothing_comes,
    take,
)
from wire import Proxy

from relstream import ConnectionFailed, ConnectionLost, DeadLetters, RetryConfig, StreamNotOwned
from relstream.lbs import expiry_events
from relstream.lbs.locks import Locks
from relstream.lbs.scripts import FINISH
from relstream.ownership import fetcher, renewer
from relstream.ownership.leases import Leases

PATIENT = RetryConfig(max_retries=-1, initial_delay=0.02, max_delay=0.2)


@pytest.fixture
async def proxy(redis_url, server):
    async with Proxy(server.port) as proxy:
        yield proxy


async def test_a_lock_taken_again_is_given_back_if_the_entry_went_meanwhile(
    consumer, service, monkeypatch
):
    async def blind(*args):
        """Leaves it to the renewal to find out."""
        return [], [], []

    monkeypatch.setattr(Leases, "audit", blind)
    entry_id = service.announce("s1")
    client = consumer(heartbeat_interval=QUICK, auto_claim=False, max_streams=1)
    notes = await client.init()
    await take(notes, 1)
    acquire, new_ids = Locks.acquire, []

    async def acquire_too_late(self, keys):
        replies = await acquire(self, keys)
        # Another consumer had seen that the lock was gone.
        new_ids.append(service.requeuer(entry_id))
        service.redis.xreadgroup(service.group, "c2", {service.lbs: ">"})
        return replies

    monkeypatch.setattr(Locks, "acquire", acquire_too_late)
    service.redis.delete(f"s1{SEPARATOR}{entry_id}")
    (told,) = await take(notes, 1, DISOWNED)
    assert service.locks() == {}
    assert told.payload == ("s1", entry_id)
    assert service.pending("c2") == new_ids
    with pytest.raises(StreamNotOwned):
        await client.done_stream("s1")


async def test_what_an_earlier_try_acknowledged_is_finished_though_the_lock_expired(
    proxy, consumer, service
):
    client = consumer(url=proxy.url, retry=PATIENT, auto_claim=False)
    notes = await client.init()
    entry_id = service.announce("s1")
    await take(notes, 1)
    service.redis.script_load(FINISH.source)
    proxy.mute()
    finishing = asyncio.create_task(client.done_stream("s1"))
    await eventually(lambda: not service.pending())
    service.redis.delete(f"s1{SEPARATOR}{entry_id}")
    proxy.cut()
    proxy.resume()
    await finishing
    assert (service.entries(), service.locks()) == ([], {})
    await nothing_comes(notes, 0.2)


async def test_what_was_requeued_between_two_tries_is_the_new_owners(proxy, consumer, service):
    client = consumer(url=proxy.url, retry=PATIENT, auto_claim=False, max_streams=1)
    notes = await client.init()
    entry_id = service.announce("s1")
    await take(notes, 1)
    proxy.cut_at, proxy.refusing = b"XACK", True
    finishing = asyncio.create_task(client.done_stream("s1"))
    await eventually(lambda: not proxy.cut_at)
    service.redis.delete(f"s1{SEPARATOR}{entry_id}")
    new_id = service.requeuer(entry_id)
    service.redis.xreadgroup(service.group, "c2", {service.lbs: ">"})
    service.redis.set(f"s1{SEPARATOR}{new_id}", "c2", px=60_000)
    proxy.refusing = False
    with pytest.raises(StreamNotOwned, match="lost"):
        await finishing
    assert names(await take(notes, 1, DISOWNED)) == ["s1"]
    assert service.locks() == {f"s1{SEPARATOR}{new_id}": "c2"}
    assert service.entries() == service.pending("c2") == [new_id]


# --- connections that die without a word --------------------------------------------------------


async def expiry_is_told(service, notes):
    """Lets locks expire until the consumer hears of one."""

    async def tell():
        for number in range(10_000):
            service.redis.set(f"x{SEPARATOR}1-{number}", "somebody", px=1)
            await asyncio.sleep(0.05)
            service.redis.get(f"x{SEPARATOR}1-{number}")

    telling = asyncio.create_task(tell())
    try:
        await take(notes, 1, EXPIRED)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def test_a_subscription_whose_connection_is_dead_is_made_anew(
    proxy, consumer, service, monkeypatch
):
    monkeypatch.setattr(expiry_events, "PROOF_EVERY", 0.2)
    client = consumer(url=f"{proxy.url}?socket_timeout=0.5", retry=PATIENT, auto_claim=False)
    notes = await client.init()
    proxy.lose()
    proxy.resume()
    await expiry_is_told(service, notes)


async def test_leases_are_renewed_over_another_connection_when_theirs_is_dead(
    proxy, consumer, service
):
    """For all the patience that was asked for: what takes longer than they live is of no use."""
    entry_id = service.announce("s1")
    patience = "?socket_timeout=60&socket_connect_timeout=60"
    client = consumer(url=proxy.url + patience, heartbeat_interval=1.0, auto_claim=False)
    notes = await client.init()
    await take(notes, 1)
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() == 1)
    before = proxy.connections
    proxy.lose()
    await eventually(lambda: proxy.connections > before)
    proxy.resume()  # that one is as dead
    await eventually(lambda: service.locks() == {f"s1{SEPARATOR}{entry_id}": "c1"})
    await nothing_comes(notes, 0.2)
    proxy.cut()
    await client.aclose()
    assert service.locks() == {}


async def test_a_connection_lost_while_subscribing(proxy, consumer, service):
    url = f"{proxy.url}?socket_timeout=60"
    proxy.cut_at = b"PSUBSCRIBE"
    with pytest.raises(ConnectionLost, match="while subscribing"):
        await asyncio.wait_for(consumer(url=url).init(), 20)
    notes = await consumer(url=url, auto_claim=False).init()
    proxy.cut_at = b"PSUBSCRIBE"
    service.redis.client_kill_filter(_type="pubsub")
    await eventually(lambda: not proxy.cut_at)
    await expiry_is_told(service, notes)


# --- reading ------------------------------------------------------------------------------------


async def test_closing_does_not_wait_until_the_read_ends(consumer, service, monkeypatch, caplog):
    monkeypatch.setattr(fetcher, "BLOCK", 60.0)
    client = consumer()
    notes = await client.init()
    await eventually(lambda: service.reads("c1"))
    await client.aclose()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert [n.type async for n in notes] == [TERMINATED]


@pytest.mark.only("single", "sentinel", reason="looks at one server's commands")
async def test_after_a_reply_that_can_not_be_read_less_is_asked_for(proxy, consumer, service):
    with Monitor(service.redis) as monitor:
        client = consumer(url=proxy.url, retry=PATIENT, auto_claim=False)
        notes = await client.init()
        await eventually(lambda: service.reads("c1"))
        for i in range(200):
            service.announce(f"s{i}")
        await take(notes, 200)
        proxy.garble = b"lbs-input"
        service.announce("s200")
        assert names(await take(notes, 1)) == ["s200"]
        service.announce("s201")
        assert names(await take(notes, 1)) == ["s201"]
        asked = [
            c.split()[5] for c in monitor.seen() if c.startswith("XREADGROUP") and "BLOCK" in c
        ]
    most = max(map(int, asked))
    assert most > 8
    assert str(most // 8) in asked[asked.index(str(most)) :]


async def test_the_audit_leaves_alone_what_may_be_on_its_way(consumer, service, monkeypatch):
    (entry_id,) = service.orphan(1)
    client = consumer(heartbeat_interval=2.0, auto_claim=False)
    notes = await client.init()
    await eventually(lambda: service.reads("c1"))  # before that it looks at all there is
    audit, found = Leases.audit, []

    async def audit_just_after_a_read(self, min_idle):
        if not found:
            service.redis.xclaim(service.lbs, service.group, "c1", 0, [entry_id])
        lost, strays, former = await audit(self, min_idle)
        found.append(strays)
        return lost, strays, former

    monkeypatch.setattr(Leases, "audit", audit_just_after_a_read)
    assert names(await take(notes, 1)) == ["s0"]
    assert found == [[], [entry_id.encode()]]


# --- renewing -----------------------------------------------------------------------------------


@pytest.mark.only("single", "sentinel", reason="looks at one server's commands")
async def test_renewals_leave_the_server_time_for_others(consumer, service, monkeypatch):
    """The windows of a round are spread over half of the time between two rounds, here 1 s."""
    monkeypatch.setattr(renewer, "RENEWAL_WINDOW", 10)
    for i in range(50):
        service.announce(f"s{i}")
    notes = await consumer(auto_claim=False).init()
    await take(notes, 50)
    began = took = 0.0
    with Monitor(service.redis) as monitor:

        def spread():
            nonlocal began, took
            for at, command in monitor.timed():
                if command.startswith("EVALSHA") and f" s0{SEPARATOR}" in command:
                    began = at
                if command.startswith("EVALSHA") and f" s49{SEPARATOR}" in command and began:
                    took = at - began
            return took > 0.6

        await eventually(spread)


async def test_a_connection_cut_between_adding_and_deleting_loses_none(proxy, service):
    service.route_to_dlq(250)
    async with DeadLetters(proxy.url, "svc") as letters:
        assert await letters.replay(["1-1"]) == 0  # it is connected
        proxy.cut_at, proxy.refusing = b"XDEL", True
        with pytest.raises(ConnectionFailed):
            await letters.replay()
        proxy.refusing = False
        assert service.redis.xlen(service.dlq) == 250
        assert service.redis.xlen(service.lbs) > 0
        assert await letters.replay() == 250
    assert service.redis.xlen(service.dlq) == 0
    rows = service.redis.xrange(service.lbs)
    told = {json.loads(fields[b"lbs-input"])["DataStreamName"] for _, fields in rows}
    assert told == {f"s{i}" for i in range(250)}
