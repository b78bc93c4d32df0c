"""Replies about streams, as batches and pages."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from core.resp import array, bulk, decoded, entry, mapping
from hypothesis import given
from hypothesis import strategies as st

from relstream._core import ENTRIES, OBJECT, PENDING, STREAMS, Batch, PendingPage, Reader, parse_id
from relstream.errors import ProtocolError, ReplyError

NULLS = [b"_\r\n", b"*-1\r\n"]
MAX = 2**64 - 1


def pending(id: bytes, consumer: bytes, idle: int, deliveries: int) -> bytes:  # noqa: A002
    return array(bulk(id), bulk(consumer), b":%d\r\n" % idle, b":%d\r\n" % deliveries)


ENTRY = entry(b"1-1", b"a", b"1")
TWO_STREAMS = [
    (bulk(b"s1"), array(entry(b"1-1", b"a", b"1"), entry(b"2-0", b"b", b"2", b"c", b"3"))),
    (bulk(b"s2"), array(entry(b"9-9", b"a", b""))),
]


@pytest.mark.parametrize(
    "data",
    [array(*(array(key, entries) for key, entries in TWO_STREAMS)), mapping(*TWO_STREAMS)],
    ids=["RESP2", "RESP3"],
)
def test_streams(data: bytes) -> None:
    one, two = decoded(data, STREAMS)
    assert (one.key, list(one)) == (
        b"s1",
        [(b"1-1", {b"a": b"1"}), (b"2-0", {b"b": b"2", b"c": b"3"})],
    )
    assert (two.key, list(two)) == (b"s2", [(b"9-9", {b"a": b""})])


@pytest.mark.parametrize("data", [*NULLS, b"*0\r\n", b"%0\r\n"])
def test_no_streams(data: bytes) -> None:
    assert decoded(data, STREAMS) == []


@pytest.mark.parametrize("data", [*NULLS, b"*0\r\n"])
def test_no_entries(data: bytes) -> None:
    batch = decoded(data, ENTRIES)
    assert (len(batch), list(batch), batch.ids(), batch.nbytes) == (0, [], [], 0)
    [batch] = decoded(array(array(bulk(b"s"), data)), STREAMS)
    assert (batch.key, list(batch)) == (b"s", [])


@pytest.mark.parametrize("null", NULLS)
def test_entries_deleted_while_pending(null: bytes) -> None:
    batch = decoded(array(ENTRY, array(bulk(b"2-0"), null), ENTRY), ENTRIES)
    assert list(batch) == [(b"1-1", {b"a": b"1"}), (b"2-0", None), (b"1-1", {b"a": b"1"})]
    assert batch.fields(1) is None
    assert batch.pairs(1) is None
    assert batch.values(b"a") == [b"1", None, b"1"]


def test_a_batch_is_a_sequence() -> None:
    entries = array(entry(b"1-1", b"a", b"1"), entry(b"1-2"), entry(b"1-3", b"a", b"3", b"a", b"4"))
    batch = decoded(entries, ENTRIES)
    assert isinstance(batch, Batch)
    assert batch.key is None
    assert len(batch) == 3
    assert batch.nbytes == len(entries) - len(b"*3\r\n")
    assert batch[0] == batch[-3] == (b"1-1", {b"a": b"1"})
    assert batch[-1] == (b"1-3", {b"a": b"4"})
    assert batch.ids() == [batch.id(i) for i in range(3)] == [b"1-1", b"1-2", b"1-3"]
    assert batch.fields(1) == {}
    assert batch.values(b"a") == [b"1", None, b"4"]
    assert batch.values(b"b") == [None] * 3
    assert batch.pairs(1) == []
    assert batch.pairs(-1) == [b"a", b"3", b"a", b"4"]
    assert batch.fields(0) is not batch.fields(0)
    for index in (3, -4, sys.maxsize, -sys.maxsize - 1):
        for look in (batch.__getitem__, batch.id, batch.fields, batch.pairs):
            with pytest.raises(IndexError, match="of 3"):
                look(index)


def test_entries_outlive_the_batch() -> None:
    iterator = iter(decoded(array(ENTRY, ENTRY), ENTRIES))
    assert next(iterator) == next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("made", [Batch, PendingPage])
def test_made_by_hand_they_are_empty(made: Any) -> None:
    assert len(made()) == 0
    with pytest.raises(IndexError):
        made()[0]


texts = st.binary(max_size=20)
ids = st.builds(lambda ms, seq: b"%d-%d" % (ms, seq), *[st.integers(0, MAX)] * 2)


@given(st.lists(st.tuples(ids, st.lists(st.tuples(texts, texts), max_size=70))))
def test_any_entries(entries: list[tuple[bytes, list[tuple[bytes, bytes]]]]) -> None:
    flat = [(id_, [text for pair in fields for text in pair]) for id_, fields in entries]
    batch = decoded(array(*(entry(id_, *texts_) for id_, texts_ in flat)), ENTRIES)
    assert list(batch) == [(id_, dict(fields)) for id_, fields in entries]
    assert [(batch.id(i), batch.pairs(i)) for i in range(len(batch))] == flat
    for name in {name for _, fields in entries for name, _ in fields}:
        assert batch.values(name) == [dict(fields).get(name) for _, fields in entries]


@pytest.mark.parametrize("ms", [0, 9, 10, 10**19 - 1, 10**19, MAX - 1, MAX])
@pytest.mark.parametrize("seq", [0, MAX])
def test_ids_up_to_64_bits(ms: int, seq: int) -> None:
    text = b"%d-%d" % (ms, seq)
    assert parse_id(text) == (ms, seq)
    assert decoded(array(entry(text)), ENTRIES).id(0) == text
    assert decoded(array(pending(text, b"c", 0, 0)), PENDING)[0][0] == text


@pytest.mark.parametrize(
    "text",
    [
        *[b"", b"-", b"1", b"1-", b"-1", b"1-1-1", b"1-1 ", b" 1-1", b"+1-1", b"1--1", b"a-1"],
        *[b"1-a", b"1-1\0", b"1\0-1", b"%d-0" % (MAX + 1), b"0-%d" % (MAX + 1)],
        *[b"2" + b"0" * 19 + b"-0", b"0-" + b"9" * 20, b"0-" + b"1" * 21, b"1-" + b"0" * 21],
    ],
)
def test_no_ids(text: bytes) -> None:
    assert parse_id(text) is None
    with pytest.raises(ProtocolError, match="an entry: an id and its fields"):
        decoded(array(entry(text)), ENTRIES)
    with pytest.raises(ProtocolError, match="a pending entry: id"):
        decoded(array(pending(text, b"c", 0, 0)), PENDING)


@given(st.binary(max_size=44) | ids | st.from_regex(rb"[0-9]{1,21}-[0-9]{1,21}", fullmatch=True))
def test_parse_id(text: bytes) -> None:
    parts = text.split(b"-")
    expected = None
    if len(parts) == 2 and all(part.isdigit() and len(part) <= 20 for part in parts):
        ms, seq = map(int, parts)
        expected = (ms, seq) if max(ms, seq) <= MAX else None
    assert parse_id(text) == expected


def test_pending_page() -> None:
    rows = [
        (b"1-0", b"one", 1500, 1),
        (b"1-1", b"two", 0, 2**40),
        (b"2-0", b"one", 2**62, 0),
        (b"2-1", b"", -2, 7),
    ]
    page = decoded(array(*(pending(*row) for row in rows)), PENDING)
    assert [page[i] for i in range(len(page))] == list(page) == rows
    assert page[-1] == rows[-1]
    assert page.consumers == [b"one", b"two", b""]
    page.consumers.clear()
    for index in (0, 4, -5):
        with pytest.raises(IndexError):
            page[index]


@pytest.mark.parametrize("data", [*NULLS, b"*0\r\n"])
def test_nothing_pending(data: bytes) -> None:
    page = decoded(data, PENDING)
    assert (len(page), page.consumers) == (0, [])


ID, FIELDS = bulk(b"1-1"), array(bulk(b"a"), bulk(b"1"))


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (STREAMS, b"+OK\r\n"),
        (STREAMS, b":0\r\n"),
        (STREAMS, b"~0\r\n"),
        (STREAMS, bulk(b"s")),
        (STREAMS, array(bulk(b"s"))),
        (STREAMS, array(array(bulk(b"s")))),
        (STREAMS, array(array(bulk(b"s"), array(ENTRY), ENTRY))),
        (STREAMS, array(array(b"+s\r\n", array(ENTRY)))),
        (STREAMS, array(array(b"$-1\r\n", array(ENTRY)))),
        (STREAMS, array(array(b"_\r\n", array(ENTRY)))),
        (STREAMS, array(b"_\r\n")),
        (STREAMS, mapping((bulk(b"s"), b"+OK\r\n"))),
        (STREAMS, mapping((bulk(b"s"), mapping((ID, FIELDS))))),
        (STREAMS, mapping((array(), array(ENTRY)))),
        (ENTRIES, b"+OK\r\n"),
        (ENTRIES, b"%0\r\n"),
        (ENTRIES, array(b"_\r\n")),
        (ENTRIES, array(b"*-1\r\n")),
        (ENTRIES, array(ID)),
        (ENTRIES, array(array(ID))),
        (ENTRIES, array(array(ID, FIELDS, FIELDS))),
        (ENTRIES, array(array(b":1\r\n", FIELDS))),
        (ENTRIES, array(array(b"_\r\n", FIELDS))),
        (ENTRIES, array(array(ID, bulk(b"a")))),
        (ENTRIES, array(array(ID, array(bulk(b"a"))))),
        (ENTRIES, array(array(ID, array(bulk(b"a"), b"$-1\r\n")))),
        (ENTRIES, array(array(ID, array(bulk(b"a"), b"_\r\n")))),
        (ENTRIES, array(array(ID, array(bulk(b"a"), b":1\r\n")))),
        (ENTRIES, array(array(ID, mapping((bulk(b"a"), bulk(b"1")))))),
        (ENTRIES, array(array(ID, b"|0\r\n" + FIELDS))),
        (PENDING, b"+OK\r\n"),
        (PENDING, array(b"_\r\n")),
        (PENDING, array(array(ID, bulk(b"c"), b":1\r\n"))),
        (PENDING, array(array(ID, bulk(b"c"), b":1\r\n", b":1\r\n", b":1\r\n"))),
        (PENDING, array(array(ID, b"$-1\r\n", b":1\r\n", b":1\r\n"))),
        (PENDING, array(array(ID, b":1\r\n", b":1\r\n", b":1\r\n"))),
        (PENDING, array(array(ID, bulk(b"c"), bulk(b"1"), b":1\r\n"))),
        (PENDING, array(array(ID, bulk(b"c"), b":1\r\n", b",1\r\n"))),
        (PENDING, array(array(b"$-1\r\n", bulk(b"c"), b":1\r\n", b":1\r\n"))),
    ],
)
def test_wrong_shapes(decode: int, data: bytes) -> None:
    decoded(data, OBJECT)  # well formed, but something else than asked for
    with pytest.raises(ProtocolError, match=r"expected .*, got b"):
        decoded(data, decode)


@pytest.mark.parametrize(
    ("decode", "valid"),
    [
        (STREAMS, array(array(bulk(b"s"), array(ENTRY, array(ID, b"*-1\r\n"))))),
        (STREAMS, mapping((bulk(b"s"), array(ENTRY, array(ID, b"_\r\n"))))),
        (ENTRIES, array(ENTRY, entry(b"12-0", b"k", b"v", b"", b"\r\n"))),
        (PENDING, array(pending(b"1-0", b"c", 10, 1), pending(b"1-1", b"d", 1, 2))),
    ],
)
def test_every_byte_changed_to_every_telling_one(decode: int, valid: bytes) -> None:
    for at in range(len(valid)):
        for byte in b"\0\r\n -+$*:_%~>|#,(=!0123459a\xff":
            data = bytearray(valid)
            data[at] = byte
            reader = Reader()
            reader.feed(data)
            out: list[Any] = []
            try:
                reader.fill(out, 1, decode)
            except ProtocolError:
                continue
            for part in out[0] if out and type(out[0]) is list else out:
                if not isinstance(part, ReplyError):
                    assert len(list(part)) == len(part)
