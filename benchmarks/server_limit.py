"""What the server alone makes of the commands of `read`, `assign` and `done`.

    python benchmarks/server_limit.py

The commands are packed before, and their replies thrown away unread: no client could be faster with
them. An item is an entry or a stream; times are medians of the rounds.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from collections import defaultdict

from relstream._core import ENTRIES, ITEM, Template, pack
from relstream.bench.measure import announce, info_number
from relstream.lbs.names import SEPARATOR
from relstream.lbs.scripts import FINISH
from relstream.net.connection import Connection
from relstream.net.endpoint import endpoint_of
from relstream.ownership.completer import BATCH
from relstream.ownership.completion import RECEIPT_MS
from relstream.testing.server import Server

N = 100_000
ROUNDS = 5
READ = 1000
INTAKE = 250
"""Entries a read, at the default size of the queue."""
AHEAD = 4
"""Pieces of work that are sent before the first of them is answered."""
END = b"=== end of a piece ==="


def drive(port: int, pieces: list[bytes]) -> float:
    """Seconds that these take."""
    end = pack(b"ECHO", END)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        view = memoryview(bytearray(1 << 20))
        start = time.perf_counter()
        sent = answered = 0
        rest = b""
        while answered < len(pieces):
            while sent < len(pieces) and sent - answered < AHEAD:
                sock.sendall(pieces[sent] + end)
                sent += 1
            rest += view[: sock.recv_into(view)]
            answered += rest.count(END)
            rest = rest[max(rest.rfind(END) + len(END), len(rest) - len(END) + 1) :]
        return time.perf_counter() - start


def parts(items: list[bytes], size: int) -> list[list[bytes]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


async def work(link: Connection, service: str) -> dict[str, list[bytes]]:
    """The commands for N announced streams, in the order in which they must be run."""
    stream = f"{service}-input"
    for group in ("read", "assign"):
        await link.execute("XGROUP", "CREATE", stream, group, "0")
    ids = (await link.execute("XRANGE", stream, "-", "+", decode=ENTRIES)).ids()
    locks = [b"%s:%d%s%s" % (service.encode(), i, SEPARATOR, id_) for i, id_ in enumerate(ids)]

    def read(group: str, count: int) -> list[bytes]:
        command = pack("XREADGROUP", "GROUP", group, "c", "COUNT", count, "STREAMS", stream, ">")
        return [command] * (N // count)

    lock = Template(b"SET", ITEM, b"c", b"NX", b"PX", 600_000)
    return {
        f"read: XREADGROUP by {READ}": read("read", READ),
        f"assign: XREADGROUP by {INTAKE}": read("assign", INTAKE),
        "assign: SET NX PX": [lock.pack(part) for part in parts(locks, INTAKE)],
        f"done: script by {BATCH}": [
            pack(
                b"EVALSHA",
                FINISH.digest,
                len(some) + 2,
                stream,
                f"{stream}-finished",
                *some,
                b"assign",
                b"c",
                some[0],
                RECEIPT_MS,
                their_ids[0],
                their_ids[-1],
                *their_ids,
            )
            for some, their_ids in zip(parts(locks, BATCH), parts(ids, BATCH), strict=True)
        ],
    }


async def main() -> None:
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with Server() as server:
        link = Connection(endpoint_of(server.url))

        async def cpu() -> float:
            info = await link.execute("INFO", "cpu")
            return info_number(info, b"used_cpu_user") + info_number(info, b"used_cpu_sys")

        await link.execute("SCRIPT", "LOAD", FINISH.source)
        for number in range(ROUNDS):
            await announce(server.url, f"limit{number}", N)
            for what, pieces in (await work(link, f"limit{number}")).items():
                before = await cpu()
                wall = drive(link.endpoint.port, pieces)
                seen[what].append((await cpu() - before, wall))
        await link.close()
    for what, rounds in seen.items():
        busy, wall = (statistics.median(times) / N * 1e6 for times in zip(*rounds, strict=True))
        print(f"{what:32} server CPU {busy:.2f} µs, wall {wall:.2f} µs an item")


asyncio.run(main())
