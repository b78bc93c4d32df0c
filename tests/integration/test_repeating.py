"""What fails again and again: it is tried ever more seldom, and logged once, then by count."""

from __future__ import annotations

import asyncio
import logging

import pytest
from helpers import Monitor, eventually, names, take
from wire import GREETING, Proxy, command, listening

from relstream import ClientTerminated, RecoveryConfig, RetryConfig, repeats
from relstream.lbs.expiry_events import ExpiryEvents
from relstream.net.connection import Connection
from relstream.net.endpoint import Endpoint
from relstream.recovery import scanner

RETRY = RetryConfig(initial_delay=0.1, max_delay=0.4)
# The server is asked for another group than the one that was created.
OTHER_GROUP = b"GROUP\r\n$9\r\nsvc-group", b"GROUP\r\n$9\r\nsvc-other"


@pytest.fixture
async def proxy(redis_url, server):
    async with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def said(caplog):
    """The warnings and errors so far that contain this text."""
    caplog.set_level(logging.DEBUG)
    return lambda text: [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and text in r.getMessage()
    ]


def reads(monitor):
    return sum(seen.startswith("XREADGROUP GROUP") for seen in monitor.seen())


@pytest.mark.parametrize("when", ["at start", "later"])
async def test_a_group_that_is_never_found_is_asked_for_ever_more_seldom(
    proxy, consumer, service, said, caplog, when
):
    client = consumer(url=proxy.url, retry=RETRY)
    if when == "at start":
        # The rights are asked for by a read, too.
        proxy.swap = OTHER_GROUP
    notes = await client.init()
    with Monitor(service.redis) as monitor:
        if when == "later":
            service.announce("s0")
            await take(notes, 1)
            proxy.swap = OTHER_GROUP
        await eventually(lambda: said("the consumer group was gone"))
        reads(monitor)
        await asyncio.sleep(1.5)
        assert 0 < reads(monitor) < 20
    assert len(said("NOGROUP")) == 1
    assert not client._engine.reason
    assert not client.health().ready
    proxy.swap = None
    service.announce("s1")
    assert names(await take(notes, 1)) == ["s1"]
    await eventually(lambda: "reading works again after" in caplog.text)
    await client.aclose()
    assert service.pending() == []


async def test_closing_does_not_wait_for_a_group_that_is_never_found(proxy, consumer, said):
    client = consumer(url=proxy.url, retry=RETRY)
    await client.init()
    proxy.swap = OTHER_GROUP
    await eventually(lambda: said("NOGROUP"))
    await asyncio.wait_for(client.aclose(), 5)


async def test_a_bound_holds_for_a_group_that_is_never_found(proxy, consumer, service):
    client = consumer(url=proxy.url, retry=RetryConfig(max_retries=2, initial_delay=0.01))
    await client.init()
    proxy.swap = OTHER_GROUP
    await eventually(lambda: client._engine.reason)
    with pytest.raises(ClientTerminated, match="NOGROUP"):
        await client.__aexit__(None, None, None)


async def test_a_group_that_was_destroyed_once_is_back_at_once(consumer, service, said):
    client = consumer(retry=RetryConfig(max_retries=0))
    notes = await client.init()
    for i in range(2):
        await eventually(lambda: service.reads("c1"))
        service.redis.xgroup_destroy(service.lbs, service.group)
        service.announce(f"s{i}")
        assert names(await take(notes, 1)) == [f"s{i}"]
        await client.done_stream(f"s{i}")
        await eventually(lambda: service.reads("c1"))
    assert len(said("the consumer group was gone")) == 2


async def test_reads_that_fail_are_logged_once_then_by_count(
    proxy, consumer, service, said, caplog, monkeypatch
):
    monkeypatch.setattr(repeats, "REMIND_EVERY", 1.0)
    client = consumer(url=proxy.url, retry=RetryConfig(initial_delay=0.02, max_delay=0.05))
    notes = await client.init()
    proxy.refusing = True
    proxy.cut()
    await eventually(lambda: len(said("reading failed, trying again in")) == 2)
    first, second = said("reading failed, trying again in")
    assert "times so far" not in first
    assert "reading has failed for 1 s," in second
    proxy.refusing = False
    service.announce("s1")
    await take(notes, 1)
    await eventually(lambda: "reading works again after" in caplog.text)


@pytest.mark.parametrize("outage", [False, True])
async def test_a_recovery_that_fails_is_logged_once(consumer, service, said, monkeypatch, outage):
    """Though several lead in turn, or wait for the end of an outage."""
    monkeypatch.setattr(scanner, "SCAN_AGAIN", 0.05)
    scans = RecoveryConfig(reconciliation_interval=0.2)
    clients = [consumer(f"c{i}", recovery=scans, max_streams=1) for i in range(2)]
    for client in clients:
        await client.init()
    blockers = [service.announce(f"s{i}") for i in range(2)]
    await eventually(lambda: len(service.pending()) == len(blockers))
    # Nobody reads, so nobody creates it again.
    service.redis.xgroup_destroy(service.lbs, service.group)
    for client in clients if outage else []:
        client._engine.partitions[0].recoverer._term.outage = True
    await eventually(lambda: said("recovery failed"))
    await asyncio.sleep(5)
    # One may begin in either way.
    assert len(said("recovery failed")) <= 2 * len(clients)
    assert len(said("a scan broke off")) <= len(clients)


async def test_a_subscription_that_ends_at_once_is_made_anew_with_pauses(said):
    subscribed = 0

    async def serve(reader, writer):
        nonlocal subscribed
        answers = {b"HELLO": GREETING, b"CONFIG": b"*2\r\n$1\r\nn\r\n$3\r\nKEx\r\n"}
        answers[b"PSUBSCRIBE"] = b">3\r\n$10\r\npsubscribe\r\n$1\r\np\r\n:1\r\n"
        while (what := (await command(reader))[0]) in answers:
            writer.write(answers[what])
            if what == b"PSUBSCRIBE":
                subscribed += 1
                await writer.drain()
                return

    async with listening(serve) as port:
        events = ExpiryEvents(
            lambda on_push: Connection(Endpoint(host="127.0.0.1", port=port), on_push=on_push),
            force_config_override=True,
            on_expired=lambda info: None,
            on_forbidden=lambda reply: None,
            recorder=None,
            logger=logging.getLogger("relstream"),
        )
        running = asyncio.ensure_future(events.run())
        await eventually(lambda: subscribed)
        before = subscribed
        await asyncio.sleep(2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await events.close()
    assert before < subscribed < before + 15
    assert len(said("no expiry events")) == 1
