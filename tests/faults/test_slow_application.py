"""An application that is slower than what is announced to it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from helpers import eventually

COUNT = 5000


@pytest.mark.slow
async def test_a_full_queue_loses_no_lease_and_gets_nothing_twice(start, service):
    """What waits in the queue does so for longer than a lock lives, and than `min_idle_time`."""
    recovery = {"min_idle_time": 2.0, "reconciliation_interval": 0.5}
    options = {"queue_size": 2000, "work": 0.002, "recovery": recovery}
    processes = [await start(f"c{i}", **options).ready() for i in range(2)]
    pipe = service.redis.pipeline(transaction=False)
    for i in range(COUNT):
        pipe.xadd(service.lbs, {"lbs-input": f'{{"DataStreamName": "s{i}", "Info": null}}'})
    pipe.execute()

    def done():
        return [line for process in processes for line in process.said("done")]

    await eventually(lambda: len(done()) >= COUNT, 50)
    await asyncio.sleep(2.0)
    added = Counter(name for process in processes for name in process.added)
    assert added == Counter(f"s{i}" for i in range(COUNT))
    assert {line["error"] for line in done()} == {None}
    assert len(done()) == COUNT
    assert [process.lost for process in processes] == [[], []]
    assert all(process.added for process in processes)
    assert (service.entries(), service.pending()) == ([], [])
    # The queue was what it is about: the last of it waited for longer than min_idle_time.
    for process in processes:
        times = [line["at"] for line in process.said("stream_added")]
        assert max(times) - min(times) > 4.0
