"""`python -m relstream.bench.announcer`: announces streams, a few ms apart; started by `latency`.

Reads a line of settings, says "ready", waits for a line, announces, and writes the round trips of
its XADDs, in ns. The same for both sides, on a connection that costs little: the consumer is what
is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import time

from relstream.bench.measure import end_with_parent, link, read_line, write_line
from relstream.tasks import run_async

PAUSE = (0.002, 0.005)
"""Seconds between two announcements, drawn anew each time, so that no timer runs in step."""
WARM_UP = 100


async def announce(url: str, service: str, n: int) -> list[int]:
    """Announces n streams, each with the time of its XADD; returns the round trips in ns."""
    round_trips = []
    async with link(url) as connection:
        for _ in range(WARM_UP):
            await connection.execute("PING")
        write_line("ready")
        read_line()
        end_with_parent()
        for i in range(n):
            await asyncio.sleep(random.uniform(*PAUSE))
            sent = time.monotonic_ns()
            entry = f'{{"DataStreamName":"{service}:{i}","Info":{{"sent":{sent}}}}}'
            await connection.execute("XADD", f"{service}-input", "*", "lbs-input", entry)
            round_trips.append(time.monotonic_ns() - sent)
    return round_trips


if __name__ == "__main__":
    write_line(json.dumps(run_async(announce(**json.loads(read_line())))))
