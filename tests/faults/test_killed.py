"""Consumers killed at once, with all that they own: the others have it in time, and once."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from faults.processes import Watch
from helpers import eventually

LEADER = "svc-input-reconciler"
TTL = 1.0
# What is allowed from death to new ownership: contract, I5.
IN_TIME = TTL + 1.0


def announce(service, prefix, count):
    stem = '{{"DataStreamName": "{}", "Info": null}}'
    pipe = service.redis.pipeline(transaction=False)
    names = [f"{prefix}{i}" for i in range(count)]
    for name in names:
        pipe.xadd(service.lbs, {"lbs-input": stem.format(name)})
    pipe.execute()
    return names


async def own(process, service, names):
    """Waits until this process, which alone has room, owns these streams."""
    await eventually(lambda: set(names) <= set(process.added))
    assert len(service.pending(process.name)) >= len(names)


def owners(processes):
    """How often each stream is owned, by all that live."""
    return sum((process.owns() for process in processes), Counter())


@pytest.mark.parametrize("count", [20, 400])
@pytest.mark.parametrize("leads", [True, False], ids=["the-leader", "a-follower"])
async def test_what_a_killed_consumer_owned_is_owned_again_in_time(start, service, leads, count):
    first = await start("c1", max_streams=count).ready()
    await eventually(lambda: (service.redis.get(LEADER) or b"").startswith(b"c1#"))
    mine = announce(service, "a", count)
    await own(first, service, mine)
    second = await start("c2", max_streams=count).ready()
    others = announce(service, "b", count)
    await own(second, service, others)
    # The victim's streams can only go to these: the other one is full.
    spare = [await start(f"c{i}", queue_size=50).ready() for i in (3, 4)]
    living = announce(service, "c", 100)
    await eventually(lambda: owners([first, second, *spare]) == Counter(mine + others + living))

    victim, lost, kept = (first, mine, second) if leads else (second, others, first)
    survivors = [kept, *spare]
    before = sum(len(process.added) for process in survivors)
    async with Watch(service):
        killed = victim.kill()
        await eventually(
            lambda: sum(len(p.added) for p in survivors) >= before + count, IN_TIME + 10
        )
        # Nothing comes late, and nothing comes twice.
        await asyncio.sleep(TTL + 0.5)
    assert owners(survivors) == Counter(mine + others + living)
    again = [
        line for p in survivors for line in p.said("stream_added") if line["stream"] in set(lost)
    ]
    assert Counter(line["stream"] for line in again) == Counter(lost)
    assert [p.lost for p in survivors] == [[], [], []]
    assert service.pending(victim.name) == []
    late = max(line["at"] for line in again) - killed
    assert late <= IN_TIME, f"{late:.3f} s"


async def test_all_but_one_killed_together(start, service):
    processes = [await start(f"c{i}", max_streams=50).ready() for i in range(4)]
    names = announce(service, "s", 200)
    await eventually(lambda: owners(processes) == Counter(names))
    survivor = await start("last").ready()
    async with Watch(service):
        killed = max([process.kill() for process in processes])
        again = await survivor.heard("stream_added", 200)
        await asyncio.sleep(TTL + 0.5)
    assert survivor.owns() == Counter(names)
    assert len(survivor.added) == 200
    assert max(line["at"] for line in again) - killed <= IN_TIME


@pytest.mark.slow
async def test_killed_again_and_again(start, service):
    """Each takes over from the one before, until the retries are used up."""
    names = announce(service, "s", 40)
    process = await start("c0").ready()
    await process.heard("stream_added", 40)
    for life in range(1, 5):
        heir = await start(f"c{life}").ready()
        process.kill()
        if life < 4:
            await heir.heard("stream_added", 40)
            assert sorted(heir.added) == sorted(names)
            assert {f[b"_retry_count"] for _, f in service.redis.xrange(service.lbs)} == {
                b"%d" % life
            }
        process = heir
    await eventually(lambda: not service.entries())
    await asyncio.sleep(0.5)
    assert process.added == []
    assert (service.entries(), service.pending()) == ([], [])
    assert service.redis.xlen(service.dlq) == 40


@pytest.mark.parametrize("rival", [True, False], ids=["with-another", "alone"])
async def test_restarted_under_the_same_name_while_its_locks_live(start, service, rival):
    names = announce(service, "s", 100)
    first = await start("c1", heartbeat_interval=2.0).ready()
    await own(first, service, names)
    others = [await start("c2", heartbeat_interval=2.0).ready()] if rival else []
    async with Watch(service):
        killed = first.kill()
        assert len(service.locks()) == 100
        again = await start("c1", heartbeat_interval=2.0).ready()
        living = [again, *others]
        await eventually(lambda: sum(len(p.added) for p in living) >= 100)
        await asyncio.sleep(2.5)
    assert owners(living) == Counter(names)
    # As in time as if nobody had come back: min_idle_time (30 s) is not waited for.
    took = max(line["at"] for p in living for line in p.said("stream_added")) - killed
    assert took <= 2.0 + 1.0
    assert sum(len(p.added) for p in living) == 100


async def test_restarted_under_the_same_name_after_its_locks_expired(start, service):
    names = announce(service, "s", 100)
    first = await start("c1").ready()
    await own(first, service, names)
    first.kill()
    await eventually(lambda: not service.locks())
    async with Watch(service):
        again = await start("c1").ready()
        ready = again.said("ready")[0]["at"]
        await again.heard("stream_added", 100)
        await asyncio.sleep(TTL + 0.5)
    assert again.owns() == Counter(names)
    assert again.lost == []
    assert max(line["at"] for line in again.said("stream_added")) - ready <= 1.0


@pytest.mark.slow
async def test_all_restarted_together_after_all_locks_expired(start, service):
    """Each finds its own entries while whoever leads puts them back."""
    names = [f"s{i}" for i in range(1500)]
    processes = [await start(f"c{i}", max_streams=500).ready() for i in range(3)]
    announce(service, "s", 1500)
    await eventually(lambda: owners(processes) == Counter(names))
    for process in processes:
        process.kill()
    await eventually(lambda: not service.locks())
    async with Watch(service):
        processes = [start(f"c{i}", queue_size=200) for i in range(3)]
        await eventually(lambda: sum(len(p.owns()) for p in processes) >= 1500)
        await asyncio.sleep(2 * TTL + 0.5)
    assert owners(processes) == Counter(names)
