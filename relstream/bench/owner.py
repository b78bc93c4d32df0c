"""`python -m relstream.bench.owner`: one consumer; started by `failover`, which kills some.

Reads a line of settings, and owns. To each line "report" it answers, as a line of JSON, with the
streams that it was told of since the last one, `[name, monotonic time in ns]` each; at "close" it
finishes all of them and ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from relstream import NotificationType, StreamClient
from relstream.bench.measure import read_line, write_line
from relstream.notifications import Notifications
from relstream.tasks import run_async


async def own(url: str, service: str, max_streams: int | None) -> None:
    """Owns streams until told to close."""
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    added: list[tuple[str, int]] = []
    client = StreamClient(url, service, consumer_id=f"bench-{os.getpid()}", max_streams=max_streams)
    listening = asyncio.create_task(_listen(await client.init(), added))
    while (order := (await orders.readline()).strip()) == b"report":
        if listening.done():
            listening.result()
        write_line(json.dumps(added))
        added.clear()
    if order != b"close":  # the parent is gone: no time for goodbyes
        os._exit(1)
    await client.done()
    await listening


async def _listen(notifications: Notifications, added: list[tuple[str, int]]) -> None:
    async for note in notifications:
        now = time.monotonic_ns()
        if note.type is NotificationType.STREAM_ADDED:
            added.append((note.payload.data_stream_name, now))


if __name__ == "__main__":
    run_async(own(**json.loads(read_line())))
