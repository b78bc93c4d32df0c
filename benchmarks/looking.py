"""What looking for deaths costs the server, by consumers and by streams: the leader's alone.

    python benchmarks/looking.py

The consumers are names in the group whose streams are locked, and stay so; the leader owns nothing.
Server CPU is what it takes over what a leader that does not look (auto_claim=False) takes, in ms a
second.
"""

from __future__ import annotations

import asyncio
import itertools

import redis

from relstream import StreamClient
from relstream.testing.server import Server

SECONDS = 5.0


def own(client: redis.Redis, service: str, consumers: int, streams: int) -> None:
    """So many consumers with so many locked streams each."""
    lbs = f"{service}-input"
    client.flushall()
    client.xgroup_create(lbs, f"{service}-group", "0", mkstream=True)
    pipe = client.pipeline(transaction=False)
    for number, owner in itertools.product(range(streams), range(consumers)):
        name = f"s{owner}-{number}"
        entry_id = f"{number * consumers + owner + 1}-0"
        pipe.xadd(lbs, {"lbs-input": f'{{"DataStreamName":"{name}"}}'}, entry_id)
        pipe.xreadgroup(f"{service}-group", f"c{owner}", {lbs: ">"}, count=1)
        pipe.set(f"{name}<MUTEX_KEY_SEP>{entry_id}", f"c{owner}", px=600_000)
        if len(pipe) > 3000:
            pipe.execute()
    pipe.execute()


async def cost(url: str, client: redis.Redis, *, looking: bool) -> float:
    """Seconds of server CPU a second while one consumer leads and has nothing else to do."""

    def used() -> float:
        info = client.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    async with StreamClient(url, "svc", consumer_id="leader", auto_claim=looking):
        await asyncio.sleep(3)
        before = used()
        await asyncio.sleep(SECONDS)
        return (used() - before) / SECONDS


def main() -> None:
    with Server() as server, redis.Redis.from_url(server.url) as client:
        for consumers, streams in ((10, 10), (10, 1000), (100, 10), (100, 100), (1000, 10)):
            own(client, "svc", consumers, streams)
            without, looking = (
                asyncio.run(cost(server.url, client, looking=looking)) for looking in (False, True)
            )
            print(
                f"{consumers:5} consumers with {streams:4} streams each: "
                f"{(looking - without) * 1000:7.2f} ms a second"
            )


if __name__ == "__main__":
    main()
