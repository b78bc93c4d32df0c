"""A consumer in a process of its own, so that it can be killed or frozen.

Its only argument is a JSON object. It prints a JSON object a line for all that it hears, with the
time (`time.monotonic`, which is the same clock in all processes), and does what it is told by lines
of its standard input: `done NAME`, `release NAME`, `fail NAME DELAY`, `claim NAME ID`, `close`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from relstream import LBSInfo, NotificationType, RecoveryConfig, RelstreamError, StreamClient


def tell(what: str, **more: Any) -> None:
    line = json.dumps({"what": what, "at": time.monotonic(), **more})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def obey(client: StreamClient, line: str) -> None:
    verb, _, rest = line.partition(" ")
    name, _, entry_id = rest.partition(" ")
    try:
        if verb == "done":
            await client.done_stream(name)
        elif verb == "release":
            await client.release(name)
        elif verb == "fail":
            await client.fail(name, "of its work", delay=float(entry_id))
        else:
            await client.claim(LBSInfo(name, entry_id))
    except RelstreamError as error:
        tell(verb, stream=name, error=type(error).__name__)
    else:
        tell(verb, stream=name, error=None)


async def listen(client: StreamClient) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    under_way = set()
    while (line := (await reader.readline()).decode().strip()) not in ("", "close"):
        task = asyncio.ensure_future(obey(client, line))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    await client.aclose()


async def main(options: dict[str, Any]) -> None:
    work = options.pop("work", None)
    recovery = RecoveryConfig(**options.pop("recovery", {}))
    client = StreamClient(
        options.pop("url"), options.pop("service", "svc"), recovery=recovery, **options
    )
    notifications = await client.init()
    tell("ready")
    listening = asyncio.ensure_future(listen(client))
    async for notification in notifications:
        name, entry_id = notification.payload
        if notification.type is NotificationType.STREAM_TERMINATED:
            tell("terminated", reason=notification.additional_info)
            break
        if notification.type is NotificationType.STREAM_EXPIRED:
            continue
        tell(notification.type.value, stream=name, id=entry_id)
        if work is not None and notification.type is NotificationType.STREAM_ADDED:
            await asyncio.sleep(work)
            await obey(client, f"done {name}")
    await listening


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(json.loads(sys.argv[1])))
