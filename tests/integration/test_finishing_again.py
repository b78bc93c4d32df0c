"""The end of ownership where an entry has another owner, or a first try came to nothing."""

from __future__ import annotations

import asyncio

import pytest
from helpers import SEPARATOR, take

from relstream import ConnectionLost, RecoveryConfig, StreamNotOwned
from relstream.errors import ReplyError

LEAVE_ALONE = RecoveryConfig(reconciliation_interval=3600, min_idle_time=3600)


@pytest.fixture
async def owner(consumer, service):
    client = consumer(auto_claim=False, recovery=LEAVE_ALONE)
    notes = await client.init()
    service.announce("s1")
    await take(notes, 1)
    return client


@pytest.mark.parametrize("end", ["done_stream", "release"])
async def test_the_same_entry_of_another_owner_is_left_alone(owner, service, end):
    """Its lock is another's, and so is what is pending: as after a failover that lost ours."""
    (entry_id,) = service.entries()
    lock = f"s1{SEPARATOR}{entry_id}"
    service.redis.xclaim(service.lbs, service.group, "other", 0, [entry_id])
    service.redis.set(lock, "other")
    with pytest.raises(StreamNotOwned):
        await getattr(owner, end)("s1")
    assert (service.entries(), service.pending("other")) == ([entry_id], [entry_id])
    assert service.redis.get(lock) == b"other"


@pytest.mark.parametrize("step", [1, 2, 9])
async def test_what_is_ours_is_found_whatever_else_is_pending(consumer, service, step):
    """All at once where little is pending in between, one by one where much is; in any order."""
    client = consumer(auto_claim=False, heartbeat_interval=60, recovery=LEAVE_ALONE)
    notes = await client.init()
    ids = {f"s{i}": service.announce(f"s{i}") for i in range(60)}
    await take(notes, 60)
    ended = sorted(list(ids)[::step], key=lambda name: name[::-1])
    lost = [name for i, name in enumerate(ended) if i % 3 == 0]
    others = [ids[name] for name in lost]
    service.redis.xclaim(service.lbs, service.group, "other", 0, others, justid=True)
    for name in ended:  # one server looks at what is pending only where no lock is
        service.redis.delete(f"{name}{SEPARATOR}{ids[name]}")
    outcomes = await asyncio.gather(
        *(client.done_stream(name) for name in ended), return_exceptions=True
    )
    told = [name for name, how in zip(ended, outcomes, strict=True) if how is not None]
    assert told == lost
    assert all(isinstance(how, StreamNotOwned) for how in outcomes if how is not None)
    left = [ids[name] for name in ids if name not in ended or name in lost]
    assert service.entries() == left
    assert sorted(service.pending("other")) == sorted(others)


async def test_a_try_in_steps_is_repeated_in_steps(owner, service):
    """What it acknowledged is not pending any more, and would look lost to the script."""
    completer = owner._engine.partitions[0].completer
    at_once, link = completer._completion._finish_at_once, completer._completion._link
    asked = []

    async def not_at_first(*args):
        asked.append(args)
        return None if len(asked) == 1 else await at_once(*args)

    class Cut:
        """The connection is cut at the first XDEL."""

        def __init__(self):
            self.cut = False

        def __getattr__(self, name):
            return getattr(link, name)

        async def execute(self, *args, **options):
            if args[0] == b"XDEL" and not self.cut:
                self.cut = True
                raise ConnectionLost("just now")
            return await link.execute(*args, **options)

    completer._completion._finish_at_once = not_at_first
    completer._completion._link = Cut()
    await owner.done_stream("s1")
    assert completer._completion._link.cut
    assert (service.entries(), service.pending(), service.locks()) == ([], [], {})


async def test_a_slot_in_flight_is_waited_for(owner, service):
    """Two masters that point at each other, until both know who has it."""
    completer = owner._engine.partitions[0].completer
    at_once = completer._completion._finish_at_once
    asked = []

    async def moved_at_first(*args):
        asked.append(args)
        if len(asked) == 1:
            raise ReplyError("MOVED 1 127.0.0.1:1")
        return await at_once(*args)

    completer._completion._finish_at_once = moved_at_first
    await owner.done_stream("s1")
    assert service.entries() == []
