"""What `fail` costs beside `done_stream`, in pairs of one run.

    python benchmarks/failing.py

CPU of the server and of the client for each stream, in us, of 50,000 streams whose ownership ends
by calls that share commands. Failed streams wait for a day. The limit is `done_stream` and one
script that does nothing but the ZADD.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import redis

from relstream import LBSInfo, Producer, RecoveryConfig, StreamClient
from relstream.tasks import run_async
from relstream.testing.server import Server

STREAMS = 50_000
CALLS = 512
PAIRS = 5


async def cost(url: str, admin: redis.Redis, end: str) -> tuple[float, float]:
    admin.flushall()
    async with Producer(url, "svc") as producer:
        await producer.announce_many((f"call:{number}", {"n": number}) for number in range(STREAMS))
    client = StreamClient(
        url, "svc", consumer_id="c1", heartbeat_interval=60.0, auto_claim=False,
        recovery=RecoveryConfig(min_idle_time=3600, reconciliation_interval=3600),
    )  # fmt: skip
    async with client as notifications:
        owned = [(await notifications.__anext__()).payload for _ in range(STREAMS)]
        ends: dict[str, Callable[[LBSInfo], Awaitable[None]]] = {
            "done": client.done_stream,
            "fail": lambda payload: client.fail(payload, "it failed", delay=86_400),
        }
        left = iter(owned)

        async def work() -> None:
            for payload in left:
                await ends[end](payload)

        used = server_cpu(admin), time.process_time()
        await asyncio.gather(*(work() for _ in range(CALLS)))
        per_stream = 1e6 / STREAMS
        return (
            (server_cpu(admin) - used[0]) * per_stream,
            (time.process_time() - used[1]) * per_stream,
        )


def cost_of_zadd(admin: redis.Redis) -> float:
    """Server CPU for each member, in us, where a script adds them by 128 and does nothing else."""
    members = admin.zrange("{svc-input}-delayed", 0, -1, withscores=True)
    add = admin.register_script("return redis.call('ZADD', KEYS[1], unpack(ARGV))")
    admin.script_load(add.script)
    pipe = admin.pipeline(transaction=False)
    before = server_cpu(admin)
    for start in range(0, STREAMS, 128):
        some = members[start : start + 128]
        arguments = [part for member, due in some for part in (int(due), member)]
        pipe.evalsha(add.sha, 1, "again", *arguments)
        if len(pipe) == 8:
            pipe.execute()
    pipe.execute()
    return (server_cpu(admin) - before) * 1e6 / STREAMS


def server_cpu(admin: redis.Redis) -> float:
    info = admin.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def main() -> None:
    ratios, limits = [], []
    with Server() as server, redis.Redis.from_url(server.url) as admin:
        for _ in range(PAIRS):
            done, fail = (run_async(cost(server.url, admin, end)) for end in ("done", "fail"))
            ratios.append(fail[0] / done[0])
            limits.append(1 + cost_of_zadd(admin) / done[0])
            print(
                f"server: done {done[0]:5.2f} us, fail {fail[0]:5.2f} us, {ratios[-1]:4.2f} x "
                f"(limit {limits[-1]:4.2f} x); "
                f"client: done {done[1]:5.2f} us, fail {fail[1]:5.2f} us"
            )
    print(
        f"server, median: {statistics.median(ratios):4.2f} x "
        f"(limit {statistics.median(limits):4.2f} x)"
    )


if __name__ == "__main__":
    main()
