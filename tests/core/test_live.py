"""Debug builds count the core's objects, so that each test shows that it leaves none behind."""

from __future__ import annotations

from typing import Any

import pytest

from relstream import _core
from relstream._core import ENTRIES, EntryIds, Reader

pytestmark = pytest.mark.skipif(
    not hasattr(_core, "live_objects"), reason="only debug builds count objects"
)


def test_objects_are_counted_while_they_live() -> None:
    def grown() -> dict[str, int]:
        return {kind: n - before[kind] for kind, n in live_objects().items() if n != before[kind]}

    live_objects = _core.live_objects  # type: ignore[attr-defined]
    before = live_objects()
    reader = Reader()
    out: list[Any] = []
    reader.feed(2 * b"*1\r\n*2\r\n$3\r\n1-1\r\n*0\r\n")
    reader.fill(out, 2, ENTRIES)  # made in the core, past `Batch.__new__`
    ids = [EntryIds(batch.ids()) for batch in out]
    assert grown() == {"Reader": 1, "Batch": 2, "EntryIds": 2}
    del out[0], ids[0]
    assert grown() == {"Reader": 1, "Batch": 1, "EntryIds": 1}
    del reader, out, ids
    assert grown() == {}


def test_objects_of_derived_classes_are_not_counted() -> None:
    class Derived(Reader):
        pass

    before = _core.live_objects()  # type: ignore[attr-defined]
    derived = Derived()
    assert _core.live_objects() == before  # type: ignore[attr-defined]
    del derived
    assert _core.live_objects() == before  # type: ignore[attr-defined]
