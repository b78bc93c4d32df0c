"""`recover`, `scan`: the pending entries of the dead come back, those of the living are left."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from relstream import RecoveryConfig
from relstream._core import ENTRIES, ITEM, STREAMS, Batch, Template, pack
from relstream.bench import peer
from relstream.bench.measure import (
    PEER,
    Figures,
    Job,
    Metric,
    PeakMemory,
    Scenario,
    Window,
    announce,
    link,
    throughput,
    topology,
)
from relstream.lbs.names import SEPARATOR, Names
from relstream.lbs.server_clock import ServerClock
from relstream.net.replies import raise_first
from relstream.net.topology import KeyConnection
from relstream.recovery.coordinator import Recoverer
from relstream.recovery.result import ScanResult

OWNERS = 10
"""Consumers that the pending entries belong to, in turns of PAGE entries."""
PAGE = 1000
LOCK_MS = 300_000
"""Nobody renews the locks of `scan`; they outlast it, and go by themselves if it is interrupted."""
SLOW_US = 50
"""On the private server the slow log takes commands from here on: far below what matters, and yet
not the single GETs of a pipeline, which would be millions."""
SLOW_LOG_LENGTH = 100_000


async def orphans(url: str, service: str, n: int) -> None:
    """n streams announced, and read by consumers that died before they took a lock."""
    async for _ in _read_by_ghosts(url, service, n):
        pass


async def living(url: str, service: str, n: int) -> None:
    """n streams announced, read and locked."""
    lock = Template("SET", ITEM, "owner", "PX", LOCK_MS)
    async with link(url) as connection:
        async for keys in _read_by_ghosts(url, service, n):
            raise_first(await connection.pipeline(lock.pack(keys), len(keys)))


async def _read_by_ghosts(url: str, service: str, n: int) -> AsyncIterator[list[bytes]]:
    """Announces n streams, has them read, and yields the keys of their locks, page by page."""
    await announce(url, service, n)
    lbs, group = f"{service}-input", f"{service}-group"
    reads = b"".join(
        pack("XREADGROUP", "GROUP", group, f"owner-{i}", "COUNT", PAGE, "STREAMS", lbs, ">")
        for i in range(OWNERS)
    )
    number = 0
    async with link(url, lbs) as connection:
        await connection.execute("XGROUP", "CREATE", lbs, group, "0")
        while number < n:
            for batches in raise_first(await connection.pipeline(reads, OWNERS, decode=STREAMS)):
                for batch in batches or ():
                    yield _locks(service, batch, number)
                    number += len(batch)


def _locks(service: str, batch: Batch, first: int) -> list[bytes]:
    """The keys of their locks. Entries are in the order in which `announce` numbered them."""
    return [
        b"%b:%d%b%b" % (service.encode(), i, SEPARATOR, entry_id)
        for i, entry_id in enumerate(batch.ids(), first)
    ]


Walk = Callable[[], Coroutine[Any, Any, int]]


@asynccontextmanager
async def _relstream(job: Job, counted: str) -> AsyncIterator[Walk]:
    """One pass of relstream's own recovery over all pending entries, however long idle.

    Yields what does it and returns how many were `counted`: `requeued` or `alive`.
    """
    names, logger = Names.of(job.service), logging.getLogger("relstream")
    async with topology(job.url) as servers:
        recoverer = Recoverer(
            servers,
            names,
            "bench",
            leading=servers,
            clock=ServerClock(servers.link(names.lbs), logger),
            heartbeat=2.0,
            recovery=RecoveryConfig(),
            auto_claim=False,
            recorder=None,
            logger=logger,
        )

        async def walk() -> int:
            tally = ScanResult()
            await recoverer.scanner.walk(0, tally)
            count: int = getattr(tally, counted)
            return count

        yield walk


@asynccontextmanager
async def _peer(job: Job, counted: str) -> AsyncIterator[Walk]:
    client = peer.connect(job.url)
    await client.ping()
    walk = peer.requeue_all if counted == "requeued" else peer.scan
    yield lambda: walk(client, job.service)
    await client.aclose()


async def recover(job: Job) -> Figures:
    """n orphans are put back under new ids. Connections are open before the window."""
    side = _peer if job.side == PEER else _relstream
    lbs = f"{job.service}-input"
    async with link(job.url, lbs) as control, side(job, "requeued") as walk:
        async with Window(job.url) as window:
            requeued = await walk()
        waiting = await control.execute("XLEN", lbs)
        pending = (await control.execute("XPENDING", lbs, f"{job.service}-group"))[0]
    if (requeued, waiting, pending) != (job.n, job.n, 0):
        raise RuntimeError(f"{requeued} of {job.n} put back, {waiting} there, {pending} pending")
    return {**window.figures(job.n), "n": job.n}


async def scan(job: Job) -> Figures:
    """One pass over n pending entries whose owners hold their locks."""
    side = _peer if job.side == PEER else _relstream
    async with link(job.url) as control, side(job, "alive") as walk:
        async with _slow_log(control, job) as slowest, Window(job.url) as window:
            with PeakMemory() as memory:
                alive = await walk()
        await _remove_locks(control, job.service)
    if alive != job.n:
        raise RuntimeError(f"{alive} of {job.n} were found alive")
    return {**window.figures(job.n), **slowest, "rss_mb": memory.growth_mb, "n": job.n}


@asynccontextmanager
async def _slow_log(control: KeyConnection, job: Job) -> AsyncIterator[Figures]:
    """Puts the slowest command into the figures that it yields, where the server is ours to set."""
    figures: Figures = {}
    if not job.private:
        yield figures
        return
    await control.execute("CONFIG", "SET", "slowlog-max-len", SLOW_LOG_LENGTH)
    await control.execute("CONFIG", "SET", "slowlog-log-slower-than", SLOW_US)
    await control.execute("SLOWLOG", "RESET")
    yield figures
    await control.execute("CONFIG", "SET", "slowlog-log-slower-than", -1)
    log = await control.execute("SLOWLOG", "GET", SLOW_LOG_LENGTH)
    figures["slowest_ms"] = max((row[2] for row in log), default=SLOW_US) / 1000


async def _remove_locks(control: KeyConnection, service: str) -> None:
    """Nobody else removes what `living` has locked."""
    start, number = "-", 0
    while batch := await control.execute(
        "XRANGE", f"{service}-input", start, "+", "COUNT", PAGE, decode=ENTRIES
    ):
        await control.execute("UNLINK", *_locks(service, batch, number))
        start = f"({batch.id(-1).decode()}"
        number += len(batch)


COUNT = Metric(key="n", label="entries", digits=0)
RECOVER = Scenario(
    name="recover",
    work="orphaned entries are put back; the peer goes one by one",
    n=50_000,
    peer_n=1_000,
    run=recover,
    prepare=orphans,
    metrics=(*throughput("entries"), COUNT),
)
SCAN = Scenario(
    name="scan",
    work="one pass of recovery over pending entries of living owners",
    n=50_000,
    peer_n=50_000,
    run=scan,
    prepare=living,
    metrics=(
        *throughput("entries"),
        Metric(key="slowest_ms", label="slowest command, ms", digits=2, less_is_better=True),
        Metric(key="rss_mb", label="client memory grows, MB", less_is_better=True),
        COUNT,
    ),
)
