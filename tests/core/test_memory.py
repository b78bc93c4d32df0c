"""Nothing is kept of what was read, however the reading ended."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson
import pytest
from core.resp import array, bulk, entry, mapping

from relstream._core import (
    ENTRIES,
    ITEM,
    OBJECT,
    PENDING,
    STREAMS,
    Audit,
    EntryIds,
    Plan,
    Reader,
    Template,
    announcements,
    pack,
)
from relstream.errors import ProtocolError

ANNOUNCED = [
    entry(b"1-%d" % n, b"lbs-input", b'{"DataStreamName":"a","Info":{"k":[1]}}') for n in range(50)
]
REFUSED = [entry(b"2-0", b"lbs-input", raw) for raw in (b"{", b"[]", b"{}", b'{"Info":{}}')]
PENDING_ROWS = array(*[array(bulk(b"1-1"), bulk(b"me"), b":5\r\n", b":1\r\n")] * 50)
TREE = mapping(
    (array(b"+k\r\n", b"$-1\r\n"), array(b"-ERR x\r\n", b"|1\r\n+a\r\n+b\r\n,1.5\r\n", b"#t\r\n")),
    (b"=5\r\ntxt:v\r\n", b"(123456789012345678901234567890\r\n"),
)


def reading(data: bytes, decode: int) -> Callable[[], Any]:
    def read() -> Any:
        reader = Reader()
        reader.feed(data[:-3])
        out: list[Any] = []
        with suppress(ProtocolError):
            reader.fill(out, 9, decode)
            reader.get_buffer()[:3] = data[-3:]
            reader.advance(3)
            reader.fill(out, 9, decode)
        return out

    return read


def announcing() -> None:
    [batch] = reading(array(*ANNOUNCED, *REFUSED, array(bulk(b"3-0"), b"_\r\n")), ENTRIES)()
    list(batch)
    batch.pairs(0)
    batch.ids()
    entries, _, _ = announcements(batch, b"lbs-input", b"_retry_count", b"<SEP>", orjson.loads)
    [page] = reading(PENDING_ROWS, PENDING)()
    Audit(entries[::-1]).page(page, 0, True)
    list(page)


def recovering() -> None:
    escaped = entry(b"2-1", b"lbs-input", b'{"DataStreamName":"\\n"}', b"_retry_count", b"2")
    [batch] = reading(array(*ANNOUNCED, *REFUSED[:1], escaped), ENTRIES)()
    ids = EntryIds([*batch.ids(), b"4-0"])
    plan = Plan(ids, [batch], b"lbs-input", b"<SEP>", b"_retry_count", orjson.loads)
    plan.lock_keys(), plan.names(), plan.ids(), plan.mget()
    plan.judge([None] * len(plan), 2)
    plan.calls(b"sha", b"lbs", b"group", counting=True, locks=True, most=20, size=1000)
    plan.returning(True)
    with suppress(ValueError):
        EntryIds([b"1-0", b"x"])


@pytest.mark.parametrize(
    "work",
    [
        announcing,
        recovering,
        reading(array(TREE, TREE) + b">1\r\n" + TREE, OBJECT),
        reading(array(array(bulk(b"s"), array(*ANNOUNCED))), STREAMS),
        reading(array(array(bulk(b"s"), array(*ANNOUNCED, TREE))), STREAMS),
        reading(array(*ANNOUNCED, b"+no entry\r\n"), ENTRIES),
        reading(array(TREE, b"#x\r\n"), OBJECT),
        reading(array(TREE, b"$-9\r\n"), OBJECT),
        reading(bulk(b"x" * 3_000_000), OBJECT),
        lambda: Template(b"SET", ITEM, 1, ITEM).pack([pack(b"a", "b", 3)] * 50),
    ],
)
def test_no_memory_is_kept(work: Callable[[], Any]) -> None:
    for _ in range(5):
        work()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            work()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Less than an object for each time: only what tracing itself and caches take.
    assert after - before < 50 * 16
