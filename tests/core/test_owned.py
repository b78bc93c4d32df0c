"""Leases of owned streams: deadlines, who may work, and the list of what is owned."""

from __future__ import annotations

import json
import tracemalloc
from typing import NamedTuple

import pytest
from core.resp import batch_of, entry

from relstream._core import Entry, OwnedStreams, ending_before, extend, grant, holds
from relstream._core import announcements as announced


class Owned(NamedTuple):
    data_stream_name: str
    id_in_lbs: str
    since: float
    lease_deadline: float


def entries(*names: str) -> list[Entry]:
    batch = batch_of(
        *(
            entry(b"%d-1" % number, b"lbs-input", json.dumps({"DataStreamName": name}).encode())
            for number, name in enumerate(names, 1)
        )
    )
    return announced(batch, b"lbs-input", b"_retry_count", b"|", json.loads)[0]


@pytest.fixture
def table() -> dict[str, Entry]:
    """Streams a, b and c, granted at 10 until 12; a was announced once more."""
    owned: dict[str, Entry] = {}
    granted = entries("a", "b", "c", "a")
    grant(granted, [b"OK"] * 4, owned, 10.0, 12.0)
    for one in granted:
        one.delivered = True
    return owned


def test_deadlines_are_extended_where_renewal_worked(table: dict[str, Entry]) -> None:
    heads = list(table.values())
    extend(heads, [1, 0, OSError()], 14.0)
    assert [one.lease_deadline for one in heads] == [14.0, 12.0, 12.0]
    assert [one.since for one in heads] == [10.0] * 3
    with pytest.raises(ValueError, match="2 outcomes of renewing 3 locks"):
        extend(heads, [1, 1], 14.0)


def test_a_lease_holds_until_its_deadline(table: dict[str, Entry]) -> None:
    head = table["a"]
    assert holds(head, None, 11.9)
    assert not holds(head, None, 12.0)
    assert holds(head, "1-1", 11.9)
    assert holds(head, "4-1", 11.9)
    assert not holds(head, "2-1", 11.9)
    assert not holds(None, None, 0.0)


@pytest.mark.parametrize("flag", ["finishing", "ended"])
def test_what_ends_is_not_held(table: dict[str, Entry], flag: str) -> None:
    setattr(table["a"], flag, True)
    assert not holds(table["a"], None, 11.0)


def test_what_was_not_delivered_is_not_held(table: dict[str, Entry]) -> None:
    table["a"].delivered = False
    assert not holds(table["a"], None, 11.0)


def test_leases_that_end_soon(table: dict[str, Entry]) -> None:
    heads = list(table.values())
    extend(heads, [1, 1, 0], 14.0)
    table["c"].finishing = True
    # Its further announcement has a lock of its own.
    assert [one.data_stream_name for one in ending_before(heads, 13.0)] == ["a"]
    assert ending_before(heads, 12.0) == []


def test_the_list_is_a_snapshot(table: dict[str, Entry]) -> None:
    table["b"].finishing = True
    owned = OwnedStreams(Owned, [table, {}])
    del table["a"]
    assert list(owned) == [Owned("a", "1-1", 10.0, 12.0), Owned("c", "3-1", 10.0, 12.0)]
    assert list(owned) == []


def test_a_list_leaves_no_memory_behind(table: dict[str, Entry]) -> None:
    def grow() -> int:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            assert len(list(OwnedStreams(Owned, [table]))) == 3
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        grow()
        assert grow() < 10_000
    finally:
        tracemalloc.stop()
