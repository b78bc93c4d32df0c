"""`topology`: the master that has the load balancer stream is killed; how long until all works."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from statistics import median

from relstream import NotificationType, Producer, RecoveryConfig, StreamClient
from relstream._core import pack
from relstream.bench.measure import RELSTREAM, Figures, Job, Metric, Scenario, link
from relstream.errors import RelstreamError
from relstream.lbs.names import SEPARATOR
from relstream.net.deployment import deployment_of
from relstream.notifications import Notifications
from relstream.testing import Cluster, Node

EVERY = 0.02
"""Seconds between two announcements, and two locks that expire."""
POLL = 0.005
"""Seconds between two questions to a replica whether it is the master now."""
SETTLE = 1.0
"""Seconds between opening the client, or a restored cluster, and the kill."""
PATIENCE = 30.0
"""Seconds after which what has not come is not waited for any more."""
SHORT_MS = 10
"""The life of a lock that is set to expire."""


class Service:
    """A consumer, a producer, and locks that expire beside the load balancer stream."""

    def __init__(self, job: Job, url: str) -> None:
        self._service = job.service
        self.lbs = f"{job.service}-input"
        self._producer = Producer(url, job.service)
        self._client = StreamClient(
            url,
            job.service,
            consumer_id="bench",
            # What is read from a master and not locked before it dies is back soon.
            recovery=RecoveryConfig(min_idle_time=2.0, reconciliation_interval=2.0),
        )
        self._probes = deployment_of(url).open("bench")
        # All in ns of the monotonic clock, by number: when first tried, when first delivered.
        self.announced: dict[int, int] = {}
        self.accepted: set[int] = set()
        self.delivered: dict[int, int] = {}
        self.locked: dict[int, int] = {}
        self.expired: dict[int, int] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Announces, expires, delivers and finishes."""
        async with self._client as notifications:
            tasks = [
                asyncio.ensure_future(work)
                for work in (self._announce(), self._expire(), self._listen(notifications))
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                await self._producer.aclose()
                await self._probes.close()
        for outcome in outcomes:
            if not isinstance(outcome, asyncio.CancelledError) and outcome is not None:
                raise outcome

    async def lost(self) -> int:
        """How many streams are never delivered that a master has accepted."""
        accepted = set(self.accepted)
        deadline = time.monotonic() + PATIENCE / 3
        while True:
            left = accepted - self.delivered.keys()
            if not left or time.monotonic() > deadline:
                return len(left)
            await asyncio.sleep(EVERY)

    async def _announce(self) -> None:
        under_way: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            # One that is stuck must not keep the next from being tried.
            task = asyncio.ensure_future(self._announce_one(number))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            await asyncio.sleep(EVERY)

    async def _announce_one(self, number: int) -> None:
        self.announced[number] = time.monotonic_ns()
        while number not in self.accepted:
            with contextlib.suppress(RelstreamError):
                await self._producer.announce(f"{self._service}:{number}")
                self.accepted.add(number)
                return
            await asyncio.sleep(EVERY)

    async def _expire(self) -> None:
        """Locks that nobody renews, in the slot of the load balancer stream.

        Each is looked at once its time is up: then the server notices, and tells.
        """
        probes = self._probes.link(self.lbs.encode())
        lock = b"{%b}:%d%b1-1"
        for number in itertools.count():
            self.locked[number] = time.monotonic_ns()
            key = lock % (self.lbs.encode(), number, SEPARATOR)
            before = lock % (self.lbs.encode(), number - 1, SEPARATOR)
            with contextlib.suppress(RelstreamError):
                await probes.pipeline(
                    pack(b"SET", key, b"nobody", b"PX", SHORT_MS) + pack(b"GET", before), 2
                )
            await asyncio.sleep(EVERY)

    async def _listen(self, notifications: Notifications) -> None:
        finishing: set[asyncio.Task[None]] = set()
        async for note in notifications:
            now = time.monotonic_ns()
            if note.type is NotificationType.STREAM_TERMINATED:
                raise RuntimeError(f"the client ended: {note.additional_info}")
            name = note.payload.data_stream_name
            number = int(name.rpartition(":")[2])
            if note.type is NotificationType.STREAM_ADDED:
                self.delivered.setdefault(number, now)
                task = asyncio.ensure_future(self._finish(name))
                finishing.add(task)
                task.add_done_callback(finishing.discard)
            elif note.type is NotificationType.STREAM_EXPIRED and name.startswith("{"):
                self.expired.setdefault(number, now)

    async def _finish(self, name: str) -> None:
        with contextlib.suppress(RelstreamError):
            await self._client.done_stream(name)


def _first(started: dict[int, int], seen: dict[int, int], after: int) -> int | None:
    """When the first was seen of what was started after that moment."""
    return min((at for number, at in seen.items() if started[number] > after), default=None)


async def _served(replica: Node, lbs: str) -> int:
    """When the replica says that the cluster is ok, and serves the stream (monotonic, ns)."""
    host, port = replica.address
    async with link(f"redis://{host}:{port}") as server:
        question = pack(b"CLUSTER", b"INFO") + pack(b"EXISTS", lbs)
        while True:
            info, exists = await server.pipeline(question, 2)
            if b"cluster_state:ok" in info and isinstance(exists, int):
                return time.monotonic_ns()
            await asyncio.sleep(POLL)


async def _kill(cluster: Cluster, service: Service) -> tuple[int, int, int]:
    """One kill; after how many ns the cluster, delivery and events were there again."""
    victim = await asyncio.to_thread(cluster.master_of, service.lbs)
    (replica,) = await asyncio.to_thread(cluster.replicas, victim)
    await asyncio.sleep(SETTLE)
    serving = asyncio.ensure_future(_served(replica, service.lbs))
    await asyncio.sleep(0.1)  # it is connected
    killed = time.monotonic_ns()
    os.kill(victim.pid, signal.SIGKILL)
    try:
        served = await asyncio.wait_for(serving, PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while True:
            delivered = _first(service.announced, service.delivered, killed)
            heard = _first(service.locked, service.expired, killed)
            if delivered is not None and heard is not None:
                break
            if time.monotonic() > deadline:
                missing = "stream" if delivered is None else "expiry event"
                raise RuntimeError(f"no {missing} within {PATIENCE:.0f} s of the failover")
            await asyncio.sleep(EVERY)
    finally:
        serving.cancel()
    await asyncio.to_thread(victim.kill)  # it is dead: this cleans up
    await asyncio.to_thread(victim.start)
    await asyncio.to_thread(cluster.wait_ok)
    return served - killed, delivered - killed, heard - killed


async def failovers(job: Job) -> Figures:
    """n times the master that has the load balancer stream is killed, and comes back as a replica.

    Only what was announced after the kill, or locked after it, counts as delivered or heard.
    """
    cluster = Cluster()
    await asyncio.to_thread(cluster.start)
    try:
        nodes = ",".join(f"{host}:{port}" for host, port in (n.address for n in cluster.nodes))
        service = Service(job, f"redis+cluster://{nodes}")
        async with service.running():
            rounds = [await _kill(cluster, service) for _ in range(job.n)]
            lost = await service.lost()
    finally:
        await asyncio.to_thread(cluster.stop)
    clusters, delivered, heard = ([ns / 1e6 for ns in each] for each in zip(*rounds, strict=True))
    return {
        "cluster_failover_ms": median(clusters),
        "delivered_ms": median(delivered),
        "event_ms": median(heard),
        "delivered_after_ms": _median_difference(delivered, clusters),
        "event_after_ms": _median_difference(heard, clusters),
        "delivered_after_max_ms": max(a - b for a, b in zip(delivered, clusters, strict=True)),
        "event_after_max_ms": max(a - b for a, b in zip(heard, clusters, strict=True)),
        "lost": lost,
    }


def _median_difference(later: list[float], earlier: list[float]) -> float:
    return median(a - b for a, b in zip(later, earlier, strict=True))


@contextmanager
def _in_the_worker() -> Iterator[Mapping[str, str]]:
    """Who kills servers must have started them."""
    yield {RELSTREAM: ""}


TOPOLOGY = Scenario(
    name="topology",
    work="the master that has the load balancer stream is killed, n times; relstream alone",
    n=4,
    rounds=1,
    run=failovers,
    prepare=None,
    sides=(RELSTREAM,),
    servers=_in_the_worker,
    metrics=(
        Metric(key="cluster_failover_ms", label="the cluster's own, ms", digits=0),
        Metric(key="delivered_ms", label="next stream, ms", digits=0),
        Metric(key="event_ms", label="next expiry event, ms", digits=0),
        Metric(key="delivered_after_ms", label="stream - cluster, ms", digits=0),
        Metric(key="event_after_ms", label="event - cluster, ms", digits=0),
        Metric(key="delivered_after_max_ms", label="stream - cluster, worst", digits=0),
        Metric(key="event_after_max_ms", label="event - cluster, worst", digits=0),
        Metric(key="lost", label="lost by replication", digits=0),
    ),
)
