"""What a scenario is, and what is measured of it.

Units: seconds, microseconds (`_us`), milliseconds (`_ms`) and megabytes of 10^6 bytes (`_mb`).
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import psutil

from relstream import Producer
from relstream.net.cluster.router import ClusterTopology
from relstream.net.deployment import deployment_of
from relstream.net.topology import KeyConnection, Topology

RELSTREAM = "relstream"
PEER = "redis-py"
SIDES = (RELSTREAM, PEER)
ONE_SERVER = "one server"
"""relstream itself, where `relstream` is what it does on a cluster."""

Figures = dict[str, float]

ANNOUNCED_AT_ONCE = 10_000
SAMPLE_EVERY = 0.01
"""Seconds between two looks at memory."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement: a scenario, by one side, once. It travels to a fresh process as JSON."""

    scenario: str
    side: str
    url: str
    service: str
    n: int
    private: bool
    """Nobody else uses the server."""
    seconds: float = 3.0
    """How long `hold` holds. A multiple of the renewal period, so that every round has as many."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One line of the table."""

    key: str
    label: str
    digits: int = 1
    less_is_better: bool | None = None
    """None: neither is better, so there is nothing to compare."""


async def announce(url: str, service: str, n: int, partitions: int = 1) -> None:
    """Announces n data streams, named `<service>:<number>`."""
    async with Producer(url, service, partitions=partitions) as producer:
        for start in range(0, n, ANNOUNCED_AT_ONCE):
            numbers = range(start, min(start + ANNOUNCED_AT_ONCE, n))
            await producer.announce_many((f"{service}:{i}", {"number": i}) for i in numbers)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of work. `run` does it in a process of its own and returns its figures."""

    name: str
    work: str
    n: int
    """How many, unless the command line says so: a size that takes few seconds."""
    run: Callable[[Job], Coroutine[Any, Any, Figures]]
    metrics: tuple[Metric, ...]
    """The first is the one whose ratio decides who wins."""
    prepare: Callable[[str, str, int], Coroutine[Any, Any, None]] | None = announce
    """Makes what is worked on, by URL, service and n: before the measurement, in another process,
    so that it leaves nothing in the memory of the one that is measured."""
    sides: tuple[str, ...] = SIDES
    """Who does it: relstream, and whom it is compared with."""
    servers: Callable[[], AbstractContextManager[Mapping[str, str]]] | None = None
    """Starts servers that it needs of its own, and gives the URL for each side; an empty one where
    the process that measures starts them."""
    peer_n: int | None = None
    """The peer is given no more than so many: it would take too long."""
    rounds: int = 3
    """How often, unless the command line says so."""


def throughput(items: str) -> tuple[Metric, ...]:
    """The metrics of a scenario that is about how fast it goes."""
    return (
        Metric(key="per_second", label=f"{items} a second", digits=0, less_is_better=False),
        Metric(key="client_cpu_us", label="client CPU each, µs", digits=2, less_is_better=True),
        Metric(key="server_cpu_us", label="server CPU each, µs", digits=2, less_is_better=True),
        Metric(key="server_share", label="server busy, limit 1", digits=2),
    )


@asynccontextmanager
async def topology(url: str) -> AsyncIterator[Topology]:
    """Connections of the benchmark's own."""
    opened = deployment_of(url).open("bench")
    try:
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def link(url: str, key: str = "") -> AsyncIterator[KeyConnection]:
    """A connection of the benchmark's own, to the server that has this key."""
    async with topology(url) as servers:
        opened = servers.link(key.encode())
        await opened.get()
        yield opened


class Window:
    """What passes between entering and leaving: wall time, CPU of this process and of the server.

        async with Window(url) as window:
            ...
        window.figures(items)

    The server is asked for its CPU time outside of the wall clock and of this process' CPU time. Of
    a cluster all masters are, and what they need is added up.
    """

    def __init__(self, url: str) -> None:
        self._opening = topology(url)

    async def __aenter__(self) -> Window:
        self._masters = await _masters(await self._opening.__aenter__())
        self._before = await self._server()
        self._client_cpu = time.process_time()
        self._wall = time.perf_counter()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.client_cpu = time.process_time() - self._client_cpu
        passed = [
            (cpu - cpu_before, expired - expired_before)
            for (cpu, expired), (cpu_before, expired_before) in zip(
                await self._server(), self._before, strict=True
            )
        ]
        self.cpu_of_each = [cpu for cpu, _ in passed]
        self.server_cpu = sum(self.cpu_of_each)
        self.expired = sum(expired for _, expired in passed)
        await self._opening.__aexit__(None, None, None)

    def figures(self, items: float) -> Figures:
        """The figures that all scenarios have."""
        return {
            "per_second": items / self.wall,
            "client_cpu_us": self.client_cpu / items * 1e6,
            "server_cpu_us": self.server_cpu / items * 1e6,
            "server_share": self.server_cpu / self.wall,
        }

    async def _server(self) -> list[tuple[float, int]]:
        """CPU seconds of each, user and system; how many keys have expired there."""
        seen = []
        for master in self._masters:
            cpu = await master.execute("INFO", "cpu")
            stats = await master.execute("INFO", "stats")
            seen.append(
                (
                    info_number(cpu, b"used_cpu_user") + info_number(cpu, b"used_cpu_sys"),
                    int(info_number(stats, b"expired_keys")),
                )
            )
        return seen


async def _masters(servers: Topology) -> list[KeyConnection]:
    if not isinstance(servers, ClusterTopology):
        return [servers.link(b"")]
    await servers.slots.fresh()
    return [servers.to(master) for master in servers.slots.masters]


def info_number(info: bytes, field: bytes) -> float:
    """A field of an INFO reply; 0 where the server has none of that name."""
    found = re.search(rb"^%b:([0-9.]+)" % field, info, re.MULTILINE)
    return float(found[1]) if found else 0.0


def resident_mb() -> float:
    """Memory of this process that is in RAM."""
    resident: int = psutil.Process().memory_info().rss
    return resident / 1e6


class PeakMemory:
    """How far this process' memory that is in RAM grows between entering and leaving.

    A thread looks at it again and again: what is taken and given back in between counts, too.
    """

    def __enter__(self) -> PeakMemory:
        self._before = self._peak = resident_mb()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        self.growth_mb = max(self._peak, resident_mb()) - self._before

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_EVERY):
            self._peak = max(self._peak, resident_mb())


def percentile(ordered: list[int], share: float) -> float:
    """The least of the sorted values that at least this share of them do not exceed."""
    return float(ordered[max(math.ceil(len(ordered) * share) - 1, 0)])


def end_with_parent() -> None:
    """Ends this process when standard input is closed, that is when the parent is gone."""

    def watch() -> NoReturn:
        # The descriptor, not sys.stdin: its lock, held while reading, would bar a clean exit.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_line() -> str:
    """One line of standard input, and not a byte more."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def write_line(text: str) -> None:
    """Hands a line to the parent."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def tell(process: asyncio.subprocess.Process, line: str) -> None:
    """Sends a line to another process."""
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")
    await process.stdin.drain()


async def hear(process: asyncio.subprocess.Process) -> str:
    """The next line of another process."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("another process of this measurement has ended early")
    return line.decode()
