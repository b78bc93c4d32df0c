"""What the core costs, beside hiredis where both do the same work.

Each group is one piece of work, on 1000 items (entries, replies, commands, pending entries): read
milliseconds as µs an item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hiredis
import orjson
import pytest

from relstream._core import (
    ENTRIES,
    ITEM,
    OBJECT,
    PENDING,
    STREAMS,
    Audit,
    Reader,
    Template,
    announcements,
    key_slot,
)

N = 1000
FIELD = b"lbs-input"
RETRY_FIELD = b"_retry_count"
SEPARATOR = b"<MUTEX_KEY_SEP>"

Work = Callable[[], Any]


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def array(*items: bytes) -> bytes:
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def id_of(n: int) -> bytes:
    return b"%d-%d" % (1_700_000_000_000 + n // 10, n % 10)


def announcement(n: int) -> bytes:
    value = orjson.dumps({"DataStreamName": f"session-{n:06d}", "Info": {"tenant": "acme", "n": n}})
    return array(bulk(id_of(n)), array(bulk(FIELD), bulk(value)))


def pending(n: int) -> bytes:
    return array(
        bulk(id_of(n)), bulk(b"redis-consumer-pod-%d" % (n // 100)), b":%d\r\n" % n, b":1\r\n"
    )


ENTRY_LIST = array(*map(announcement, range(N)))
XREADGROUP = array(array(bulk(b"service-input"), ENTRY_LIST))
XPENDING = array(*map(pending, range(N)))
KEYS = [b"session-%06d%b%b" % (n, SEPARATOR, id_of(n)) for n in range(N)]
LEASE = (b"SET", ITEM, b"redis-consumer-pod", b"NX", b"PX", b"2000")


def decoded(data: bytes, decode: int) -> Any:
    return ours(data, 1, decode)()[0]


def ours(data: bytes, replies: int, decode: int) -> Work:
    reader = Reader()

    def work() -> list[Any]:
        out: list[Any] = []
        reader.feed(data)
        assert reader.fill(out, replies, decode) == replies
        return out

    return work


def peers(data: bytes, replies: int) -> Work:
    reader = hiredis.Reader()

    def work() -> list[Any]:
        reader.feed(data)
        return [reader.gets() for _ in range(replies)]

    return work


def peers_fields() -> list[Any]:
    [[[_, entries]]] = READ_BY_HIREDIS()
    return [(id_, dict(zip(fields[::2], fields[1::2], strict=True))) for id_, fields in entries]


READ_BY_HIREDIS = peers(XREADGROUP, 1)
READ = ours(XREADGROUP, 1, STREAMS)
BATCH = decoded(ENTRY_LIST, ENTRIES)
PAGE = decoded(XPENDING, PENDING)
OWNED = announcements(BATCH, FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)[0]
TEMPLATE = Template(*LEASE)

WORK: dict[str, dict[str, Work]] = {
    "XREADGROUP": {"relstream": READ, "hiredis": READ_BY_HIREDIS},
    "XREADGROUP, fields as dicts": {
        "relstream": lambda: [pair for batch in READ()[0] for pair in batch],
        "hiredis": peers_fields,
    },
    "XREADGROUP, as plain objects": {"relstream": ours(XREADGROUP, 1, OBJECT)},
    "XPENDING": {"relstream": ours(XPENDING, 1, PENDING), "hiredis": peers(XPENDING, 1)},
    "+OK": {"relstream": ours(b"+OK\r\n" * N, N, OBJECT), "hiredis": peers(b"+OK\r\n" * N, N)},
    ":1": {"relstream": ours(b":1\r\n" * N, N, OBJECT), "hiredis": peers(b":1\r\n" * N, N)},
    "SET NX PX": {
        "relstream": lambda: TEMPLATE.pack(KEYS),
        "hiredis": lambda: [
            hiredis.pack_command((LEASE[0], key, *LEASE[2:]))  # type: ignore[arg-type]
            for key in KEYS
        ],
    },
    "announcements": {
        "relstream": lambda: announcements(BATCH, FIELD, RETRY_FIELD, SEPARATOR, orjson.loads),
        "orjson alone": lambda: [orjson.loads(fields[FIELD]) for _, fields in BATCH],
    },
    "ids": {"relstream": BATCH.ids},
    "audit": {"relstream": lambda: Audit(OWNED).page(PAGE, 0, True)},
    "slots": {"relstream": lambda: [key_slot(key) for key in KEYS]},
}


@pytest.mark.parametrize(
    ("group", "who"), [(group, who) for group, sides in WORK.items() for who in sides]
)
def test_core(benchmark: Any, group: str, who: str) -> None:
    benchmark.group = group
    benchmark(WORK[group][who])
