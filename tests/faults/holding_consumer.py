"""README's consumer, but for the end of its work, which never comes: it owns until it is ended.

Arguments: URL, and how many streams it reads before it leaves `async with` by itself; 0: none.
"""

from __future__ import annotations

import asyncio
import sys

import relstream
from relstream import NotificationType, StreamClient


def say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


async def main(url: str, leave_after: int) -> None:
    client = StreamClient(url, "svc", consumer_id="worker-1", heartbeat_interval=4.0)
    owned = 0
    say("opening")
    async with client as notifications:
        say("ready")
        async for notification in notifications:
            if notification.type is NotificationType.STREAM_ADDED:
                say("owns", notification.payload.data_stream_name)
                owned += 1
                if owned == leave_after:
                    await asyncio.sleep(2)  # so that it is seen to own them all
                    break
        say("leaving")


if __name__ == "__main__":
    relstream.run(main(sys.argv[1], int(sys.argv[2])))
