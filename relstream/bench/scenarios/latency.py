"""`latency`: how long an announcement takes to the application of an idle consumer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relstream import NotificationType, StreamClient
from relstream.bench import peer
from relstream.bench.measure import (
    PEER,
    Figures,
    Job,
    Metric,
    Scenario,
    Window,
    hear,
    percentile,
    tell,
)

SETTLE = 0.3
"""Seconds after opening; then the consumer has nothing to do but wait."""


async def latency(job: Job) -> Figures:
    """n announcements, a few ms apart, made by another process; from just before XADD to delivery.

    Both processes read the same monotonic clock. The moment of the XADD travels in `Info`.
    """
    side = _peer if job.side == PEER else _relstream
    async with side(job) as delays, announcer(job) as process:
        await asyncio.sleep(SETTLE)
        async with Window(job.url) as window:
            await tell(process, "go")
            delivered = sorted([await delays.__anext__() for _ in range(job.n)])
        announced = json.loads(await hear(process))
    return {
        **window.figures(job.n),
        "p50_ms": percentile(delivered, 0.50) / 1e6,
        "p99_ms": percentile(delivered, 0.99) / 1e6,
        "max_ms": delivered[-1] / 1e6,
        "xadd_p50_ms": percentile(sorted(announced), 0.50) / 1e6,
    }


@asynccontextmanager
async def _relstream(job: Job) -> AsyncIterator[AsyncIterator[int]]:
    client = StreamClient(job.url, job.service, consumer_id="bench")
    async with client as notifications:

        async def delays() -> AsyncIterator[int]:
            async for note in notifications:
                now = time.monotonic_ns()
                if note.type is NotificationType.STREAM_ADDED and note.additional_info:
                    yield now - note.additional_info["sent"]
                elif note.type is NotificationType.STREAM_TERMINATED:
                    raise RuntimeError(f"the client ended: {note.additional_info}")

        yield delays()


@asynccontextmanager
async def _peer(job: Job) -> AsyncIterator[AsyncIterator[int]]:
    consumer = peer.Consumer(job.url, job.service, consumer_id="bench")
    streams = await consumer.init()

    async def delays() -> AsyncIterator[int]:
        async for added in streams:
            now = time.monotonic_ns()
            if added.info:
                yield now - added.info["sent"]

    try:
        yield delays()
    finally:
        await consumer.aclose()


@asynccontextmanager
async def announcer(job: Job) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that announces, ready to begin."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "relstream.bench.announcer"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,  # its list of round trips is one line
    )
    try:
        await tell(process, json.dumps({"url": job.url, "service": job.service, "n": job.n}))
        await hear(process)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()  # this ends it, whatever it is doing
        await process.wait()


LATENCY = Scenario(
    name="latency",
    work="an announcement every few ms to an idle consumer, from just before XADD to delivery",
    n=400,
    rounds=1,
    run=latency,
    prepare=None,
    metrics=(
        Metric(key="p50_ms", label="p50, ms", digits=3, less_is_better=True),
        Metric(key="p99_ms", label="p99, ms", digits=3, less_is_better=True),
        Metric(key="max_ms", label="max, ms", digits=3, less_is_better=True),
        Metric(key="xadd_p50_ms", label="XADD itself, p50, ms", digits=3),
        Metric(key="client_cpu_us", label="client CPU each, µs", digits=0, less_is_better=True),
    ),
)
