"""A recoverer of the other kind: one entry at a time, XACK first, then XADD and XDEL.

Arguments: URL, service. Lists what is pending, says so, waits for a line, and puts it all back, the
last one first.
"""

from __future__ import annotations

import sys

import redis

SEPARATOR = b"<MUTEX_KEY_SEP>"


def main(url: str, service: str) -> None:
    lbs, group = f"{service}-input", f"{service}-group"
    of_cluster = url.startswith("redis+cluster://")
    kind = redis.RedisCluster if of_cluster else redis.Redis
    with kind.from_url(url.replace("+cluster", "")) as client:
        rows = client.xpending_range(lbs, group, "-", "+", 100_000)
        sys.stdout.write('{"what": "ready"}\n')
        sys.stdout.flush()
        sys.stdin.readline()
        won = 0
        for row in reversed(rows):
            entry_id = row["message_id"]
            found = client.xrange(lbs, entry_id, entry_id)
            if not found:
                continue
            ((_, fields),) = found
            name = fields[b"lbs-input"].split(b'"')[3]
            if client.exists(name + SEPARATOR + entry_id):
                continue
            if client.xack(lbs, group, entry_id) == 1:
                count = int(fields.get(b"_retry_count", b"0")) + 1
                client.xadd(lbs, {**fields, b"_retry_count": count})
                client.xdel(lbs, entry_id)
                won += 1
        sys.stdout.write(f'{{"what": "won", "count": {won}}}\n')
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
