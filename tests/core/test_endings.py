"""Streams whose ownership shall end and who waits for that; tables of locks."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any

import pytest
from core.test_lbs import announced

from relstream._core import CompletionQueue, Entry, discard, enter


def head(number: int) -> Entry:
    return announced(json.dumps({"DataStreamName": f"s{number}", "Info": None}))


@pytest.fixture
def woken() -> list[bool]:
    return []


@pytest.fixture
def endings(woken: list[bool]) -> Any:
    opened: Any = CompletionQueue(lambda: woken.append(True))
    opened.open(Future)
    return opened


def test_they_come_in_the_order_asked_and_wake_once(endings: Any, woken: list[bool]) -> None:
    heads = [head(number) for number in range(7)]
    futures = [endings.ask(one) for one in heads]
    assert woken == [True]
    assert all(one.finishing for one in heads)
    taken = []
    while endings:
        batch = endings.next_batch(3)
        taken.append((len(batch), batch.heads, batch.futures))
    assert taken == [
        (3, heads[:3], futures[:3]),
        (3, heads[3:6], futures[3:6]),
        (1, heads[6:], futures[6:]),
    ]
    endings.ask(head(7))
    assert woken == [True, True]


def test_a_batch_is_of_bounded_bytes(endings: Any) -> None:
    heads = [head(number) for number in range(5)]
    for one in heads:
        endings.ask(one)
    size = heads[0].cost
    assert endings.next_batch(9, 2 * size).heads == heads[:2]
    assert endings.next_batch(9, 2 * size + 1).heads == heads[2:]
    endings.ask(heads[0])
    assert endings.next_batch(9, 1).heads == heads[:1]


def test_a_long_queue_is_taken_from_its_start(endings: Any) -> None:
    waiting: list[Entry] = []
    for number in range(100):
        waiting += [head(2 * number), head(2 * number + 1), head(number)]
        for one in waiting[-3:]:
            endings.ask(one)
        assert endings.next_batch(2).heads == waiting[:2]
        del waiting[:2]
        assert len(endings) == len(waiting)


def test_all_entries_of_a_stream_end_together() -> None:
    batch: Any = CompletionQueue(lambda: None)
    batch.open(Future)
    one, other, more = head(1), head(2), head(1)
    one.again = [more]
    batch.ask(one)
    batch.ask(other)
    assert batch.next_batch(9).entries() == [one, other, more]


def test_only_who_still_waits_is_told(endings: Any) -> None:
    done, waits = endings.ask(head(1)), endings.ask(head(2))
    done.set_exception(ValueError())
    endings.next_batch(2).succeed()
    assert isinstance(done.exception(), ValueError)
    assert waits.result() is None


def test_when_closed_it_refuses_until_it_is_opened_again(endings: Any) -> None:
    endings.ask(head(1))
    endings.next_batch(1)
    left = endings.ask(head(2))
    assert endings.close(lambda: KeyError("closed")) == [left]
    late = head(3)
    assert isinstance(endings.ask(late).exception(), KeyError)
    assert not late.finishing
    endings.open(Future)
    assert not endings.ask(late).done()


def test_enter() -> None:
    table = {b"a": None}
    enter(table, [b"c", b"a", b"b"])
    assert list(table) == [b"a", b"c", b"b"]


def test_discard() -> None:
    table = {b"a": 1, b"b": 2, b"c": 3}
    discard(table, [b"a", b"x", b"c", b"a"])
    assert table == {b"b": 2}
