"""A scan of all that is pending: its commands are bounded, and others have their turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from helpers import SEPARATOR, Heard, Monitor, Renewals, eventually

from relstream import RecoveryConfig
from relstream.errors import ReplyError
from relstream.recovery import scanner, steps

ONCE = RecoveryConfig(reconciliation_interval=3600, min_idle_time=0.05, batch_size=500)


def own(service, count):
    """Streams of a consumer that lives, however long it has been busy with them."""
    pipe = service.redis.pipeline(transaction=False)
    for i, entry_id in enumerate(service.orphan(count, "slow")):
        pipe.set(f"s{i}{SEPARATOR}{entry_id}", "slow")
    pipe.execute()


def scans(heard):
    return [event[1:4] for event in heard.events if event[0] == "reconciliation_scan"]


@pytest.mark.only("single", reason="looks at one server's commands")
async def test_every_command_is_bounded(consumer, service):
    own(service, 3000)
    service.orphan(250)
    await asyncio.sleep(0.06)
    heard = Heard()
    client = consumer(auto_claim=False, max_streams=1, recovery=ONCE, recorder=heard)
    with Monitor(service.redis) as monitor:
        await client.init()
        await eventually(lambda: scans(heard))
        sent = [command.split(" ") for command in monitor.seen()]
    assert scans(heard) == [(250, 3000, 0)]
    # A cursor over all of it: each page begins behind the last one.
    pages = [words[3:] for words in sent if words[0] == "XPENDING" and len(words) == 6]
    starts = [start for start, _, count in pages if int(count) == 500]
    assert starts[0] == "-"
    assert [start[0] for start in starts[1:]] == ["("] * 6
    assert len(set(starts)) == 7
    bounded = {
        "XPENDING": lambda words: "IDLE" not in words and int(words[5]) <= 1000,
        "XRANGE": lambda words: words[2] == words[3] or int(words[5]) <= 500,
        "MGET": lambda words: len(words) <= 501,
        "EVALSHA": lambda words: int(words[2]) <= 102,
    }
    for name, holds in bounded.items():
        commands = [words for words in sent if words[0] == name]
        assert commands, name
        assert [words for words in commands if not holds(words)] == []


async def test_others_have_their_turns(consumer, service, monkeypatch):
    own(service, 50_000)
    await asyncio.sleep(0.06)
    turn = 0
    parts = Counter()
    recover = steps.Steps._recover

    async def turns():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def counted(recoverer, *args, **how):
        parts[turn] += 1
        return await recover(recoverer, *args, **how)

    monkeypatch.setattr(steps.Steps, "_recover", counted)
    heard = Heard()
    client = consumer(auto_claim=False, max_streams=1, recovery=ONCE, recorder=heard)
    others = asyncio.ensure_future(turns())
    await client.init()
    await eventually(lambda: scans(heard))
    others.cancel()
    assert scans(heard) == [(0, 50_000, 0)]
    assert max(parts.values()) <= steps.PAGES
    assert len(parts) >= 50_000 / 500 / steps.PAGES


@pytest.mark.parametrize(
    ("auto_claim", "most"),
    [(False, scanner.PAGES_AHEAD + 1), (True, steps.PAGES)],
    ids=["scan", "scan-and-dead-consumers"],
)
async def test_pages_under_way_are_bounded(consumer, service, monkeypatch, auto_claim, most):
    """Or all that is pending would be in memory, when the server is slow to put it back."""
    for ghost in range(4):
        service.orphan(100, f"ghost{ghost}")
    await asyncio.sleep(0.06)
    stuck, goes_on = 0, asyncio.Event()
    recover = steps.Steps._recover

    async def get_stuck(recoverer, *args, **how):
        nonlocal stuck
        stuck += 1
        try:
            await goes_on.wait()
        finally:
            stuck -= 1
        return await recover(recoverer, *args, **how)

    monkeypatch.setattr(steps.Steps, "_recover", get_stuck)
    client = consumer(
        heartbeat_interval=1.0,
        auto_claim=auto_claim,
        max_streams=1,
        recovery=replace(ONCE, batch_size=10),
    )
    await client.init()
    await eventually(lambda: stuck == most)
    # Whoever leads does so while the pages wait: there was time enough for more.
    renewals = Renewals(service, ["svc-input-reconciler"])
    await eventually(lambda: renewals.seen() == 4)
    assert stuck == most
    goes_on.set()
    await eventually(lambda: not any(service.pending(f"ghost{i}") for i in range(4)))
    assert len(service.entries()) == 400


async def test_a_first_scan_that_breaks_off_is_recorded(consumer, service, monkeypatch):
    monkeypatch.setattr(scanner, "SCAN_AGAIN", 0.1)
    own(service, 3)
    await asyncio.sleep(0.06)
    broken = []
    walk = scanner.Scanner.walk

    async def breaking_off(recoverer, *args):
        if not broken:
            broken.append(args)
            raise ReplyError("BUSY Redis is busy running a script")
        await walk(recoverer, *args)

    monkeypatch.setattr(scanner.Scanner, "walk", breaking_off)
    heard = Heard()
    await consumer(auto_claim=False, max_streams=1, recovery=ONCE, recorder=heard).init()
    await eventually(lambda: len(scans(heard)) == 2)
    started = [event[1:3] for event in heard.events if event[0] == "startup_recovery"]
    assert started == [(False, 0), (True, 0)]
    assert scans(heard) == [(0, 0, 0), (0, 3, 0)]
