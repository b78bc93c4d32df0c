"""Consumers that stand still for longer than their locks live, and then go on."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter

import pytest
from faults.processes import Tap, Watch
from helpers import SEPARATOR, eventually, names, nothing_comes, take

from relstream import StreamNotOwned
from relstream.ownership.renewer import LeaseRenewer

TTL = 1.0
COUNT = 10


class AtTheLock:
    """A gate that holds back a client's first lock, until `go`."""

    def __init__(self):
        self.held = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, role, args):
        # What is tried at start, to see whether it is allowed, is the lock of no entry.
        if args[0] == b"SET" and re.search(SEPARATOR.encode() + rb"\d{9,}-", args[1]):
            self.held.set()
            await self.go.wait()
        return True


@pytest.mark.parametrize("ttl", [TTL, 0.4])
async def test_a_zombie_is_told_and_harms_nothing(start, service, ttl):
    # A TTL below the time a read waits on the server lets entries be delivered to the frozen one.
    zombie = await start("zombie", heartbeat_interval=ttl, max_streams=2 * COUNT).ready()
    streams = [f"s{i}" for i in range(COUNT)]
    for name in streams:
        service.announce(name)
    await zombie.heard("stream_added", COUNT)
    heir = await start("heir", heartbeat_interval=ttl).ready()
    async with Watch(service):
        zombie.freeze()
        # Done too late: it reads this as soon as it runs again.
        zombie.tell("done s0")
        await heir.heard("stream_added", COUNT)
        assert sorted(heir.added) == sorted(streams)
        state = service.locks(), service.pending("heir")
        assert set(state[0].values()) == {"heir"}
        woken = zombie.thaw()
        told = await zombie.heard("stream_disowned", COUNT)
        for name in streams[:5]:
            zombie.tell(f"done {name}")
        answers = await zombie.heard("done", 6)
        await asyncio.sleep(2.5 * ttl)
    assert {line["error"] for line in answers} == {"StreamNotOwned"}
    assert Counter(zombie.lost) == Counter(streams)
    assert len(zombie.added) == COUNT
    assert max(line["at"] for line in told) - woken <= ttl
    # Nothing of the new owner's was touched: it has the same entries and locks, and can finish.
    assert heir.lost == []
    assert len(heir.added) == COUNT
    assert (service.locks(), service.pending("heir")) == state
    for name in streams:
        heir.tell(f"done {name}")
    assert {line["error"] for line in await heir.heard("done", COUNT)} == {None}
    await eventually(lambda: not service.entries() and not service.pending())
    await eventually(lambda: not service.locks())


async def test_frozen_but_not_taken_over_it_stays_the_owner(start, service):
    lonely = await start("c1").ready()
    for i in range(COUNT):
        service.announce(f"s{i}")
    await lonely.heard("stream_added", COUNT)
    ids = service.pending("c1")
    lonely.freeze()
    await eventually(lambda: not service.locks())
    lonely.thaw()
    await eventually(lambda: len(service.locks()) == COUNT)
    await asyncio.sleep(1.5 * TTL)
    assert lonely.owns() == Counter(f"s{i}" for i in range(COUNT))
    # It may have recovered them itself before it had taken the locks again; then it was told so.
    assert len(lonely.lost) == len([i for i in ids if i not in service.pending("c1")])


@pytest.mark.slow
async def test_frozen_between_reading_and_locking(start, service):
    """The entries are pending for it, and were put back, when it gets to lock them."""
    gate = AtTheLock()
    async with Tap(service.redis, gate) as tap:
        for i in range(COUNT):
            service.announce(f"s{i}")
        zombie = await start("zombie", url=tap.url).ready()
        await asyncio.wait_for(gate.held.wait(), 10)
        await eventually(lambda: len(service.pending("zombie")) == COUNT)
        zombie.freeze()
        heir = await start("heir").ready()
        await heir.heard("stream_added", COUNT)
        state = service.pending("heir")
        woken = zombie.thaw()
        gate.go.set()
        await asyncio.sleep(2.5 * TTL)
        # It owns none of them, and if it ever thought so it was told within a heartbeat.
        assert zombie.owns() == Counter()
        assert all(line["at"] - woken <= TTL + 0.5 for line in zombie.said("stream_disowned"))
        assert Counter(heir.added) == Counter(f"s{i}" for i in range(COUNT))
        assert heir.lost == []
        assert service.pending("heir") == state
        assert set(service.locks().values()) == {"heir"}
        zombie.kill()


async def test_what_was_requeued_before_it_was_locked_is_not_told(consumer, service):
    """The strict side of the above: ownership is not announced where somebody else has it."""
    gate = AtTheLock()
    async with Tap(service.redis, gate) as tap:
        late = consumer("late", url=tap.url, heartbeat_interval=0.4, auto_claim=False)
        notes = await late.init()
        entry_id = service.announce("s1")
        await asyncio.wait_for(gate.held.wait(), 10)
        other = await consumer("other", auto_claim=False).init()
        await asyncio.sleep(0.5)  # longer than the lock would have lived
        service.requeuer(entry_id)
        assert names(await take(other, 1)) == ["s1"]
        gate.go.set()
        await nothing_comes(notes, 1.0)
        await late.aclose()


async def test_a_late_done_leaves_what_was_requeued_and_read_again(consumer, service, monkeypatch):
    """A zombie may be the one who reads the entry that was put back after its death."""

    async def nothing(*args: object) -> None:
        pass

    monkeypatch.setattr(LeaseRenewer, "_renew_all", nothing)  # or it may find out first
    client = consumer("c1", heartbeat_interval=5.0, auto_claim=False)
    notes = await client.init()
    entry_id = service.announce("s1")
    await take(notes, 1)
    service.redis.delete(f"s1{SEPARATOR}{entry_id}")
    new_id = service.requeuer(entry_id)
    await eventually(lambda: service.pending("c1") == [new_id])
    await eventually(lambda: f"s1{SEPARATOR}{new_id}" in service.locks())
    try:
        await client.done_stream("s1")
    except StreamNotOwned:
        # Nothing was finished, so the stream must still be there for somebody.
        assert len(service.entries()) == 1
    else:
        assert service.entries() == service.pending() == []


async def test_thousands_frozen_are_told_in_time(start, service):
    zombie = await start("zombie", max_streams=3000, queue_size=4000).ready()
    pipe = service.redis.pipeline(transaction=False)
    for i in range(3000):
        pipe.xadd(service.lbs, {"lbs-input": f'{{"DataStreamName": "s{i}", "Info": null}}'})
    pipe.execute()
    await zombie.heard("stream_added", 3000)
    heir = await start("heir", queue_size=4000).ready()
    zombie.freeze()
    await heir.heard("stream_added", 3000)
    woken = zombie.thaw()
    told = await zombie.heard("stream_disowned", 3000)
    assert max(line["at"] for line in told) - woken <= TTL
    await asyncio.sleep(max(0.0, woken + 2 * TTL - time.monotonic()))
    assert Counter(zombie.lost) == Counter(heir.added) == Counter(f"s{i}" for i in range(3000))
    assert zombie.owns() == Counter()
    assert heir.lost == []


async def test_a_frozen_one_and_its_successor_of_the_same_name_share_no_id(start, service):
    old = await start("c1").ready()
    streams = [f"s{i}" for i in range(COUNT)]
    for name in streams:
        service.announce(name)
    await old.heard("stream_added", COUNT)
    old_ids = {line["id"] for line in old.said("stream_added")}
    old.freeze()
    await eventually(lambda: not service.locks())
    new = await start("c1", auto_claim=False).ready()
    told = await new.heard("stream_added", COUNT)
    assert sorted(new.added) == sorted(streams)
    assert old_ids.isdisjoint(line["id"] for line in told)
    counts = {fields.get(b"_retry_count") for _, fields in service.redis.xrange(service.lbs)}
    assert counts == {b"1"}
    old.tell("done s0")  # too late: it reads this as soon as it runs again
    old.thaw()
    await old.heard("stream_disowned", COUNT)
    old.tell("done s1")
    assert {line["error"] for line in await old.heard("done", 2)} == {"StreamNotOwned"}
    assert Counter(old.lost) == Counter(streams)
    assert new.lost == []
    for name in streams:
        new.tell(f"done {name}")
    assert {line["error"] for line in await new.heard("done", COUNT)} == {None}
    await eventually(lambda: not service.entries() and not service.locks())


async def test_a_successor_started_at_once_resumes_when_the_locks_expire(start, service):
    old = await start("c1", heartbeat_interval=2.0).ready()
    for i in range(COUNT):
        service.announce(f"s{i}")
    await old.heard("stream_added", COUNT)
    old.kill()
    new = await start("c1", heartbeat_interval=2.0, auto_claim=False).ready()
    # The scan would come after `min_idle_time`, 30 s, alone.
    await new.heard("stream_added", COUNT, timeout=15.0)
    counts = {fields.get(b"_retry_count") for _, fields in service.redis.xrange(service.lbs)}
    assert counts == {b"1"}
