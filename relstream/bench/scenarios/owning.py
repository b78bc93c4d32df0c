"""`assign`, `done`, `hold`: announced streams become owned, stay owned, and are finished."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import orjson

from relstream import Notification, NotificationType, StreamClient
from relstream._core import ENTRIES, ITEM, Template
from relstream.bench import peer
from relstream.bench.measure import (
    PEER,
    Figures,
    Job,
    Metric,
    Scenario,
    Window,
    link,
    resident_mb,
    throughput,
    topology,
)
from relstream.lbs.names import SEPARATOR
from relstream.net.topology import Topology

ME = "bench"
CALLS = 256
"""Streams finished at a time."""
HEARTBEAT = 2.0
"""The default heartbeat interval, in seconds; locks are renewed every half of it."""
LONG_HEARTBEAT = 60.0
"""Where renewal is not what is measured, and would be most of the peer's work: it can't renew
100,000 locks in time, loses some, and could not finish them."""
PAGE = 1000


class Owner(Protocol):
    """What a side can do."""

    async def own(self, n: int) -> list[str]:
        """Opens the client; returns when n streams are owned and delivered by the iterator."""

    async def listen(self) -> None:
        """Takes what else the iterator delivers."""

    async def finish(self, names: Sequence[str]) -> None:
        """Finishes these streams, CALLS at a time."""

    def disowned(self) -> int:
        """How many streams it knows that it lost."""

    async def close(self) -> None:
        """Leaves without finishing what is owned."""


class Relstream:
    """An owner that is a `StreamClient`."""

    def __init__(self, job: Job, heartbeat: float, partitions: int = 1) -> None:
        self._client = StreamClient(
            job.url,
            job.service,
            consumer_id=ME,
            heartbeat_interval=heartbeat,
            partitions=partitions,
        )
        self._disowned = 0

    async def own(self, n: int) -> list[str]:
        self._notifications = await self._client.init()
        names: list[str] = []
        added = NotificationType.STREAM_ADDED  # looking that up is slow before Python 3.12
        async for note in self._notifications:
            if note.type is added:
                names.append(note.payload.data_stream_name)
                if len(names) == n:
                    break
            else:
                self._heard(note)
        return names

    async def listen(self) -> None:
        async for note in self._notifications:
            self._heard(note)

    def _heard(self, note: Notification) -> None:
        if note.type is NotificationType.STREAM_DISOWNED:
            self._disowned += 1
        elif note.type is NotificationType.STREAM_TERMINATED:
            raise RuntimeError(f"the client ended: {note.additional_info}")

    async def finish(self, names: Sequence[str]) -> None:
        left = iter(names)

        async def work() -> None:
            for name in left:
                await self._client.done_stream(name)

        await asyncio.gather(*(work() for _ in range(CALLS)))

    def disowned(self) -> int:
        return self._disowned

    async def close(self) -> None:
        await self._client.aclose()


class _Peer:
    def __init__(self, job: Job, heartbeat: float) -> None:
        self._consumer = peer.Consumer(
            job.url, job.service, consumer_id=ME, heartbeat_interval=heartbeat
        )

    async def own(self, n: int) -> list[str]:
        self._streams = await self._consumer.init()
        names: list[str] = []
        async for added in self._streams:
            names.append(added.data_stream_name)
            if len(names) == n:
                break
        return names

    async def listen(self) -> None:
        async for _ in self._streams:
            pass

    async def finish(self, names: Sequence[str]) -> None:
        # Two halves take turns, so that the server works on one while the other is being packed.
        left = iter(peer.chunks(names, CALLS // 2))

        async def work() -> None:
            for some in left:
                await self._consumer.done_streams(some)

        await asyncio.gather(work(), work())

    def disowned(self) -> int:
        return self._consumer.disowned

    async def close(self) -> None:
        await self._consumer.aclose()


def _owner(job: Job, heartbeat: float = HEARTBEAT) -> Owner:
    return _Peer(job, heartbeat) if job.side == PEER else Relstream(job, heartbeat)


async def assign(job: Job) -> Figures:
    """n announced streams become owned, and are delivered by the iterator.

    Opening the client is part of it, as reading begins with that.
    """
    async with Window(job.url) as window:
        owner = _owner(job)
        names = await owner.own(job.n)
    await owner.close()
    if len(set(names)) != job.n:
        raise RuntimeError(f"{len(set(names))} of {job.n} streams were delivered")
    return window.figures(job.n)


async def done(job: Job) -> Figures:
    """n owned streams are finished, CALLS at a time."""
    owner = _owner(job, LONG_HEARTBEAT)
    names = await owner.own(job.n)
    async with Window(job.url) as window:
        await owner.finish(names)
    await owner.close()
    lbs = f"{job.service}-input"
    async with link(job.url, lbs) as control:
        if left := await control.execute("XLEN", lbs):
            raise RuntimeError(f"{left} of {job.n} streams are not finished")
    return window.figures(job.n)


async def hold(job: Job) -> Figures:
    """n owned streams are held; an item is one renewal that is due.

    Lost is what was told as lost, or has no lock of ours at the end, or had none for a while. The
    last is known by the server's count of expired keys, where nobody else uses the server.
    """
    before = resident_mb()
    owner = _owner(job)
    await owner.own(job.n)
    listening = asyncio.create_task(owner.listen())
    await asyncio.sleep(HEARTBEAT / 2)  # all have been renewed once, none is new
    async with Window(job.url) as window:
        await asyncio.sleep(job.seconds)
    memory = resident_mb() - before
    lost = max(
        owner.disowned(),
        job.n - await _locked(job),
        window.expired if job.private else 0,
    )
    if listening.done():
        listening.result()
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    await owner.close()
    return {
        **window.figures(job.n * job.seconds / (HEARTBEAT / 2)),
        "client_core": window.client_cpu / window.wall,
        "server_core": window.server_cpu / window.wall,
        "lost": lost,
        "rss_mb": memory,
    }


async def _locked(job: Job) -> int:
    """How many announced streams are locked by this consumer."""
    locked = 0
    holder = Template("GET", ITEM)
    async with topology(job.url) as servers:
        async for locks in _lock_keys(servers, f"{job.service}-input"):
            locked += (await servers.each(holder.pack, locks)).count(ME.encode())
    return locked


async def _lock_keys(servers: Topology, lbs: str) -> AsyncIterator[list[bytes]]:
    start = "-"
    control = servers.link(lbs.encode())
    while entries := await control.execute(
        "XRANGE", lbs, start, "+", "COUNT", PAGE, decode=ENTRIES
    ):
        locks = []
        for id_, fields in entries:
            name = orjson.loads(fields[b"lbs-input"])["DataStreamName"]
            locks.append(b"%b%b%b" % (name.encode(), SEPARATOR, id_))
        yield locks
        start = f"({id_.decode()}"


ASSIGN = Scenario(
    name="assign",
    work="announced streams become owned and are delivered",
    n=20_000,
    run=assign,
    metrics=throughput("streams"),
)
DONE = Scenario(
    name="done",
    work="owned streams are finished, 256 at a time",
    n=20_000,
    run=done,
    metrics=throughput("streams"),
)
HOLD = Scenario(
    name="hold",
    work="owned streams are held at the default heartbeat",
    n=10_000,
    rounds=1,
    run=hold,
    metrics=(
        Metric(key="client_core", label="client, of a core", digits=4, less_is_better=True),
        Metric(key="server_core", label="server, of a core", digits=4, less_is_better=True),
        Metric(key="rss_mb", label="client memory, MB", less_is_better=True),
        Metric(key="lost", label="lost", digits=0),
    ),
)
