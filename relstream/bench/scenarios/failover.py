"""`failover`: consumers are killed; how long until others own all of their streams."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from relstream.bench.measure import (
    RELSTREAM,
    Figures,
    Job,
    Metric,
    Scenario,
    announce,
    hear,
    percentile,
    tell,
)

SURVIVORS = 3
LIVING_EACH = 4
"""Streams that the survivors hold, for each of the victim's: 20,000 for 5,000."""
FEW = 20
"""Streams of the other victim."""
TTL = 2.0
"""That of locks at the default heartbeat interval, in seconds."""
SETTLE = (1.0, 2.0)
"""Seconds before a kill, drawn anew each time, so that it comes anywhere between two renewals."""
PATIENCE = 15.0
"""Seconds after which a stream that nobody has taken over counts as lost."""
AFTERMATH = 0.5
"""Seconds after the last takeover in which a second one would show."""
LOOK_EVERY = 0.1


class Consumer:
    """A consumer in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, stack: AsyncExitStack, job: Job, max_streams: int | None) -> Consumer:
        """It ends with the stack, and with this process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "relstream.bench.owner"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 26,  # a report is one line
        )
        consumer = cls(process)
        stack.push_async_callback(consumer.end)
        settings = {
            "url": job.url,
            "service": job.service,
            "max_streams": max_streams,
        }
        await tell(process, json.dumps(settings))
        return consumer

    async def added(self) -> list[tuple[str, int]]:
        """The streams it was told of since it was last asked, and when (monotonic, ns)."""
        await tell(self.process, "report")
        report: list[tuple[str, int]] = json.loads(await hear(self.process))
        return report

    async def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        await self.process.wait()

    async def end(self) -> None:
        """However it is: its standard input closes, which ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()


class Told:
    """What consumers were told: when each stream became theirs, once or more."""

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self._consumers = consumers
        self.when: dict[str, list[int]] = {}

    async def ask(self) -> None:
        """Takes in what they were told meanwhile."""
        for report in await asyncio.gather(*(each.added() for each in self._consumers)):
            for name, at in report:
                self.when.setdefault(name, []).append(at)

    async def reach(self, n: int) -> bool:
        """Waits until they were told of n streams; False: they were not in time."""
        deadline = time.monotonic() + PATIENCE
        while True:
            await self.ask()
            if len(self.when) >= n:
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_EVERY)


async def failover(job: Job) -> Figures:
    """A victim that owns few streams is killed, then one of n, which leads until then."""
    few = min(FEW, job.n)
    living = job.n * LIVING_EACH
    async with AsyncExitStack() as stack:

        async def start(n: int, *limits: int | None) -> tuple[list[Consumer], Told]:
            """Consumers with limits of what they own, owning n streams together."""
            consumers = [await Consumer.start(stack, job, limit) for limit in limits]
            told = Told(consumers)
            if not await told.reach(n):
                raise RuntimeError(f"{len(told.when)} of {n} streams became owned")
            return consumers, told

        await announce(job.url, job.service, job.n + few + living)
        # Who comes first leads. The victims leave to others what they may not own.
        (first,), of_first = await start(job.n, job.n)
        (second,), of_second = await start(few, few)
        survivors, told = await start(living, *[None] * SURVIVORS)
        after_few = await _takeover(second, of_second, told)
        after_many = await _takeover(first, of_first, told)
        for survivor in survivors:
            await tell(survivor.process, "close")
        await asyncio.gather(*(survivor.process.wait() for survivor in survivors))
    lost = few + job.n - len(after_few) - len(after_many)
    return {
        **_figures(after_many, ""),
        **_figures(after_few, "few_"),
        "lost": lost,
        "twice": sum(len(times) - 1 for times in told.when.values()),
    }


async def _takeover(victim: Consumer, of_victim: Told, told: Told) -> list[int]:
    """Kills the victim; returns how long, in ns, each of its streams took to become another's."""
    await asyncio.sleep(random.uniform(*SETTLE))
    killed = time.monotonic_ns()
    await victim.kill()
    await told.reach(len(told.when) + len(of_victim.when))
    await asyncio.sleep(AFTERMATH)
    await told.ask()
    taken = sorted(told.when[name][0] - killed for name in of_victim.when if name in told.when)
    if not taken:
        raise RuntimeError(f"nothing was taken over within {PATIENCE:.0f} s")
    return taken


def _figures(taken: list[int], prefix: str) -> Figures:
    last_ms = taken[-1] / 1e6
    return {
        f"{prefix}p50_ms": percentile(taken, 0.50) / 1e6,
        f"{prefix}p99_ms": percentile(taken, 0.99) / 1e6,
        f"{prefix}last_ms": last_ms,
        f"{prefix}last_after_ttl_ms": last_ms - TTL * 1000,
    }


FAILOVER = Scenario(
    name="failover",
    work="a consumer is killed, others take its streams over; relstream alone",
    n=5_000,
    rounds=1,
    run=failover,
    prepare=None,
    sides=(RELSTREAM,),
    metrics=(
        Metric(key="p50_ms", label="p50, ms", digits=0),
        Metric(key="p99_ms", label="p99, ms", digits=0),
        Metric(key="last_ms", label="last, ms", digits=0),
        Metric(key="last_after_ttl_ms", label="last - TTL, ms", digits=0),
        Metric(key="few_p50_ms", label="few: p50, ms", digits=0),
        Metric(key="few_p99_ms", label="few: p99, ms", digits=0),
        Metric(key="few_last_ms", label="few: last, ms", digits=0),
        Metric(key="few_last_after_ttl_ms", label="few: last - TTL, ms", digits=0),
        Metric(key="lost", label="lost", digits=0),
        Metric(key="twice", label="twice", digits=0),
    ),
)
