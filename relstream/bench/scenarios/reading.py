"""`read`: entries out of a stream as fast as they come, nothing else."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from relstream._core import STREAMS, pack
from relstream.bench import peer
from relstream.bench.measure import PEER, Figures, Job, Scenario, Window, link, throughput
from relstream.lbs.names import INPUT_FIELD

COUNT = 1000
IN_FLIGHT = 3
PEER_IN_FLIGHT = 2
"""Reads under way at the same time: the server works on one while the client looks at another.

For each side as many as are fastest."""
TIMEOUT = 10.0
"""Seconds for one read."""


async def read(job: Job) -> Figures:
    """n entries by XREADGROUP, COUNT 1000; what each announces looked at once.

    By the fastest way either side offers to an entry's fields: redis-py a dict, relstream also the
    values of one field of all entries. Connections are open before the window.
    """
    stream = f"{job.service}-input"
    reads = -(-job.n // COUNT)
    side = _peer if job.side == PEER else _relstream
    async with link(job.url) as control, side(job.url, stream, reads) as read_all:
        await control.execute("XGROUP", "CREATE", stream, "bench", "0")
        async with Window(job.url) as window:
            seen = await read_all()
    if seen != job.n:
        raise RuntimeError(f"{seen} of {job.n} entries were read")
    return window.figures(job.n)


ReadAll = Callable[[], Coroutine[Any, Any, int]]


@asynccontextmanager
async def _relstream(url: str, stream: str, reads: int) -> AsyncIterator[ReadAll]:
    command = pack("XREADGROUP", "GROUP", "bench", "c", "COUNT", COUNT, "STREAMS", stream, ">")
    async with link(url) as connection:
        protocol = await connection.get()

        async def read_all() -> int:
            under_way = deque(
                protocol.send(command, decode=STREAMS, timeout=TIMEOUT)
                for _ in range(min(IN_FLIGHT, reads))
            )
            to_send = reads - len(under_way)
            seen = 0
            while under_way:
                (batches,) = await under_way.popleft()
                if to_send:
                    under_way.append(protocol.send(command, decode=STREAMS, timeout=TIMEOUT))
                    to_send -= 1
                    # What is sent leaves at the end of the turn: that shall be before the look at
                    # this reply, or the server would get its next commands all at once, and wait.
                    await asyncio.sleep(0)
                for batch in batches:
                    for value in batch.values(INPUT_FIELD):
                        if value:
                            seen += 1
            return seen

        yield read_all


@asynccontextmanager
async def _peer(url: str, stream: str, reads: int) -> AsyncIterator[ReadAll]:
    """Tasks that take turns, each on a connection of the pool.

    redis-py pipelines only what is known in advance, and hands out no reply of a pipeline before
    the last has come.
    """
    client = peer.connect(url)
    to_send = reads

    async def read_on() -> int:
        nonlocal to_send
        seen = 0
        while to_send:
            to_send -= 1
            reply = await client.xreadgroup("bench", "c", {stream: ">"}, count=COUNT)
            for entries in peer.entries_of(reply):
                for _, fields in entries:
                    if fields[INPUT_FIELD]:
                        seen += 1
        return seen

    async def read_all() -> int:
        return sum(await asyncio.gather(*(read_on() for _ in range(PEER_IN_FLIGHT))))

    await asyncio.gather(*(client.ping() for _ in range(PEER_IN_FLIGHT)))
    yield read_all
    await client.aclose()


READ = Scenario(
    name="read",
    work="XREADGROUP by 1000, the fields of each entry looked at",
    n=100_000,
    run=read,
    metrics=throughput("entries"),
)
