"""Announcements of data streams, and what is owned of them."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from core.resp import array, batch_of, bulk, decoded, entry
from hypothesis import given, settings
from hypothesis import strategies as st

from relstream._core import (
    PENDING,
    Audit,
    Entry,
    PendingPage,
    announcements,
    id_range,
)

SEPARATOR = b"<MUTEX_KEY_SEP>"


def read(
    *entries: bytes, loads: Any = orjson.loads
) -> tuple[list[Entry], list[tuple[int, str]], list[bytes]]:
    return announcements(batch_of(*entries), b"lbs-input", b"_retry_count", SEPARATOR, loads)


def announced(message: str | bytes, *, loads: Any = orjson.loads) -> Entry:
    raw = message.encode() if isinstance(message, str) else message
    [good], bad, gone = read(entry(b"5-1", b"lbs-input", raw), loads=loads)
    assert (bad, gone) == ([], [])
    return good


def refused(message: str | bytes, *, loads: Any = orjson.loads) -> str:
    raw = message.encode() if isinstance(message, str) else message
    good = entry(b"5-2", b"lbs-input", b'{"DataStreamName":"good"}')
    entries, [(index, reason)], gone = read(entry(b"5-1", b"lbs-input", raw), good, loads=loads)
    assert [one.data_stream_name for one in entries] == ["good"]
    assert (index, gone) == (0, [])
    return reason


def test_an_announcement() -> None:
    one = announced('{"DataStreamName":"session-1","Info":{"tenant":"acme","n":[1]}}')
    assert one.data_stream_name == "session-1"
    assert one.info == {"tenant": "acme", "n": [1]}
    assert (one.id, one.id_in_lbs) == (b"5-1", "5-1")
    assert one.lock_key == b"session-1<MUTEX_KEY_SEP>5-1"
    assert (one.again, one.delivered, one.ended) == (None, False, False)
    assert repr(one) == "<Entry 'session-1' 5-1>"


@pytest.mark.parametrize(
    ("message", "name", "info"),
    [
        ('{"DataStreamName":"a"}', "a", None),
        ('{"DataStreamName":"a","Info":null}', "a", None),
        ('{"DataStreamName":"a","Info":{}}', "a", {}),
        ('{"DATASTREAMNAME":"a","INFO":{"k":1}}', "a", {"k": 1}),
        ('{"datastreamname":"a","info":{"k":1}}', "a", {"k": 1}),
        ('{"Info":{"k":1},"dataStreamName":"a"}', "a", {"k": 1}),
        ('{"DataStreamName":"a","Info":{},"More":[1],"":0}', "a", {}),
        ('{"DataStreamName":"a","More":1}', "a", None),
        # The last one wins, as in encoding/json, where null leaves a string as it is.
        ('{"DataStreamName":"a","datastreamname":"b"}', "b", None),
        ('{"datastreamname":"b","DataStreamName":"a"}', "a", None),
        ('{"DataStreamName":"a","Info":{"k":1},"info":{"k":2}}', "a", {"k": 2}),
        ('{"DataStreamName":"a","Info":{"k":1},"info":null}', "a", None),
        ('{"DataStreamName":"a","datastreamname":null}', "a", None),
        ('{"DataStreamName":"a\\u0000b","Info":null}', "a\0b", None),
    ],
)
def test_keys_in_any_case(message: str, name: str, info: object) -> None:
    one = announced(message)
    assert (one.data_stream_name, one.info) == (name, info)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"DataStreamName":"a"', "not JSON"),
        (b'{"DataStreamName":"\xff"}', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 5000, "not JSON"),
        ("null", "expected a JSON object, got NoneType"),
        ('["DataStreamName"]', "expected a JSON object, got list"),
        ('"a"', "expected a JSON object, got str"),
        ("{}", "DataStreamName is of type NoneType"),
        ('{"Info":{}}', "DataStreamName is of type NoneType"),
        ('{"DataStreamName":null,"Info":{}}', "DataStreamName is of type NoneType"),
        ('{"DataStreamName":7,"Info":{}}', "DataStreamName is of type int"),
        ('{"DataStreamName":"","Info":{}}', "DataStreamName is empty"),
        ('{"DataStreamName":%s}' % ("[" * 1000 + "]" * 1000), "DataStreamName is of type list"),
        ('{"DataStreamName":"a","Info":[]}', "Info is of type list, expected an object"),
        ('{"DataStreamName":"a","Info":"x"}', "Info is of type str, expected an object"),
        ('{"DataStreamName":"a","info":0}', "Info is of type int, expected an object"),
    ],
)
def test_what_announces_nothing_is_told_apart(message: str | bytes, why: str) -> None:
    assert why in refused(message)


# Pieces of JSON, and of what only looks like it.
PIECES = [
    *["{", "}", "[", "]", ",", ":", '"', "\\", " ", "\n", "\x00", "\x7f", "\u00e9"],
    *["0", "1", "-", "+", ".", "e", "E5", "-0.50", "01", "1.", "12345678901234567890", "1e999"],
    *[
        "true",
        "false",
        "null",
        "nul",
        "NaN",
        "Infinity",
        '"k":',
        '"k":1',
        '{"k":[{}]}',
        '"\\ud800"',
    ],
    *["[" * 40 + "]" * 40, '{"k":' * 40 + "1" + "}" * 40],
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
INFO = (
    st.dictionaries(st.text(), JSON, max_size=4).map(json.dumps)
    | st.dictionaries(st.text(), JSON, max_size=4).map(lambda info: json.dumps(info, indent=1))
    | st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
    | st.lists(st.sampled_from(PIECES), max_size=4).map(lambda some: f"{{{''.join(some)}}}")
)
MESSAGES = st.tuples(
    st.sampled_from(
        [*4 * ['{"DataStreamName":'], '{ "DataStreamName" : ', '{"DataStreamname":', "{"]
    ),
    st.sampled_from([*4 * ['"a"'], '"a\\n"', '"\u00e9"', '""', "1", '"a']),
    st.sampled_from([*4 * [',"Info":'], ' , "Info" : ', ',"Info"', ',"More":', ":"]),
    INFO,
    st.sampled_from(
        [*4 * ["}"], " }\n", "}}", "}x", ",}", ',"Info":null}', ',"datastreamname":"b"}', ""]
    ),
).map("".join)


def understood(raw: bytes) -> tuple[str, object] | None:
    """Name and Info, as the contract has it: the long way."""
    try:
        message = orjson.loads(raw)
    except ValueError:
        return None
    name = info = None
    for key, value in message.items() if isinstance(message, dict) else ():
        if key.casefold() == "datastreamname":
            name = name if value is None else value
        elif key.casefold() == "info":
            info = value
    if not isinstance(name, str) or not name or not isinstance(info, dict | None):
        return None
    return name, info


@settings(max_examples=1000)
@given(MESSAGES)
def test_what_is_understood_without_decoding_is_what_decoding_would_say(message: str) -> None:
    raw = message.encode()
    entries, bad, _ = read(entry(b"5-1", b"lbs-input", raw))
    got = [(one.data_stream_name, one.info) for one in entries]
    expected = understood(raw)
    assert got == ([] if expected is None else [expected])
    assert len(bad) == (expected is None)


def test_info_is_decoded_for_each_who_asks() -> None:
    asked: list[bytes] = []

    def loads(raw: bytes) -> object:
        asked.append(raw)
        return orjson.loads(raw)

    one = announced('{"DataStreamName":"a","Info":{"k":[1.5,-2,true,null,"x"]}}', loads=loads)
    assert not asked
    one.info["k"].clear()
    assert one.info == {"k": [1.5, -2, True, None, "x"]}
    assert asked == 2 * [b'{"k":[1.5,-2,true,null,"x"]}']


@pytest.mark.parametrize(
    "raw",
    [
        '{"DataStreamName":"a","Info":{"k":[1,2]}}',
        '{"DataStreamName":"a","Info":null}',
        '{"DataStreamName": "a", "Info": {"k":1}}',
        '{"Info":{"k":1},"DataStreamName":"a"}',
        '{"DataStreamName":"Grüße","Info":{"k":"ü"}}',
        '{"DataStreamName":"Grüße","Info":null}',
        '{"datastreamname":"a"}',
    ],
)
def test_an_announcement_is_known_as_it_was_written(raw: str) -> None:
    one = announced(raw)
    written = {key.casefold(): value for key, value in json.loads(raw).items()}
    assert one.announcement == raw.encode()
    assert (one.data_stream_name, one.info) == (written["datastreamname"], written.get("info"))
    assert one.retry_count == 0


@pytest.mark.parametrize(
    ("fields", "count", "known"),
    [
        ((b"_retry_count", b"3"), 3, True),
        ((b"_retry_count", b"-3"), 0, True),
        ((b"_retry_count", b"3", b"_retry_count", b"4"), 4, False),
        ((b"_retry_count", b"3", b"x", b""), 3, False),
        ((b"x", b""), 0, False),
        ((b"lbs-input", b'{"DataStreamName":"b"}'), 0, False),
    ],
)
def test_retries_and_further_fields_of_an_announcement(
    fields: tuple[bytes, ...], count: int, known: bool
) -> None:
    raw = b'{"DataStreamName":"a","Info":null}'
    last = b'{"DataStreamName":"b"}' in fields
    (one,), _, _ = read(entry(b"1-0", b"lbs-input", raw, *fields))
    assert one.data_stream_name == ("b" if last else "a")
    assert one.retry_count == count
    assert one.announcement == (raw if known else None)


def test_a_name_that_is_not_text() -> None:
    assert "is not text" in refused('{"DataStreamName":"\\ud800"}', loads=json.loads)


def test_a_decoder_that_fails_otherwise_is_not_the_entrys_fault() -> None:
    def loads(raw: bytes) -> object:
        raise KeyError(raw)

    with pytest.raises(KeyError):
        announced("{}", loads=loads)


def test_missing_deleted_and_good_entries_together() -> None:
    good, bad, gone = read(
        entry(b"1-0", b"other", b"1"),
        array(bulk(b"2-0"), b"*-1\r\n"),
        entry(
            b"3-0", b"other", b"1", b"lbs-input", b'{"DataStreamName":"a"}', b"_retry_count", b"2"
        ),
        entry(b"4-0"),
        array(bulk(b"5-0"), b"_\r\n"),
        entry(b"6-0", b"LBS-INPUT", b'{"DataStreamName":"a"}'),
    )
    assert [(one.data_stream_name, one.id) for one in good] == [("a", b"3-0")]
    assert bad == [(index, "no field lbs-input") for index in (0, 3, 5)]
    assert gone == [b"2-0", b"5-0"]


def test_of_a_repeated_field_the_last_one_counts() -> None:
    fields = [b"lbs-input", b"broken", b"x", b"y", b"lbs-input", b'{"DataStreamName":"last"}']
    [one], bad, _ = read(entry(b"1-0", *fields))
    assert (one.data_stream_name, bad) == ("last", [])


def test_ten_megabytes_of_info() -> None:
    text = "x" * 10_000_000
    assert announced(json.dumps({"DataStreamName": "a", "Info": {"k": text}})).info == {"k": text}


@pytest.mark.parametrize(
    "name", ["a", "a<MUTEX_KEY_SEP>1-1", "\u00e9\U0001f600", "with space\n", "\0", "x" * 100_000]
)
@pytest.mark.parametrize("id_", [b"0-1", b"1700000000000-0", b"%d-%d" % (2**64 - 1, 2**64 - 1)])
def test_lock_keys_byte_for_byte(name: str, id_: bytes) -> None:
    [one], _, _ = read(entry(id_, b"lbs-input", orjson.dumps({"DataStreamName": name})))
    assert one.data_stream_name == name
    assert one.lock_key == name.encode() + SEPARATOR + id_


def test_the_range_of_ids_whatever_their_order() -> None:
    message = b'{"DataStreamName":"a"}'
    ids = [b"9-2", b"10-0", b"9-10", b"%d-%d" % (2**64 - 1, 2**64 - 1), b"9-1"]
    for order in (ids, ids[::-1], sorted(ids)):
        entries, _, _ = read(*(entry(id_, b"lbs-input", message) for id_ in order))
        assert id_range(entries) == (b"9-1", ids[3])
        assert id_range(entries[:1]) == (order[0], order[0])
    with pytest.raises(ValueError, match="at least one"):
        id_range([])


# --- what is owned --------------------------------------------------------------------------------


def owned(ids: list[int]) -> list[Entry]:
    message = b'{"DataStreamName":"a"}'
    entries, _, _ = read(*(entry(b"%d-%d" % divmod(n, 3), b"lbs-input", message) for n in ids))
    return entries


def page_of(rows: list[tuple[int, int]]) -> PendingPage:
    data = [
        array(bulk(b"%d-%d" % divmod(n, 3)), bulk(b"me"), b":%d\r\n" % idle, b":1\r\n")
        for n, idle in rows
    ]
    page = decoded(array(*data), PENDING)
    assert isinstance(page, PendingPage)
    return page


numbers = st.integers(0, 60)


@given(
    st.lists(numbers, unique=True),
    st.dictionaries(numbers, st.integers(0, 100)),
    st.integers(1, 8),
    st.integers(0, 100),
)
def test_audit(own: list[int], pending: dict[int, int], size: int, min_idle: int) -> None:
    rows = sorted(pending.items())
    pages = [rows[at : at + size] for at in range(0, len(rows), size)] or [[]]
    entries = owned(own)
    audit = Audit(entries)
    missing: list[Entry] = []
    strays: list[bytes] = []
    for number, page in enumerate(pages, 1):
        gone, strange = audit.page(page_of(page), min_idle, number == len(pages))
        missing += gone
        strays += strange
    as_id = {n: b"%d-%d" % divmod(n, 3) for n in range(61)}
    assert [one.id for one in missing] == [as_id[n] for n in sorted({*own} - {*pending})]
    assert {id(one) for one in missing} <= {id(one) for one in entries}
    assert strays == [as_id[n] for n, idle in rows if n not in own and idle >= min_idle]


def test_audit_keeps_to_what_was_owned_when_it_began() -> None:
    entries = owned([1, 2])
    audit = Audit(entries)
    entries.clear()
    missing, strays = audit.page(page_of([]), 0, True)
    assert ([one.id for one in missing], strays) == ([b"0-1", b"0-2"], [])


@pytest.mark.parametrize("entries", [[None], ["a"], [1]])
def test_audit_is_of_entries(entries: list[Any]) -> None:
    with pytest.raises(TypeError):
        Audit(entries)
