"""What is to be done about pending entries, and the calls that put them back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from core.resp import array, batch_of, bulk, decoded, entry
from hypothesis import given
from hypothesis import strategies as st

from relstream._core import OBJECT, PENDING, Batch, EntryIds, Plan, announcements
from relstream.lbs.names import INPUT_FIELD, RETRY_FIELD, SEPARATOR, replace_fields, retry_count

GOOD = b'{"DataStreamName":"a","Info":null}'


def plan(ids: list[bytes], *batches: Batch, loads: Any = orjson.loads) -> Plan:
    return Plan(EntryIds(ids), list(batches), INPUT_FIELD, SEPARATOR, RETRY_FIELD, loads)


def calls(one: Plan, *, counting: bool, most: int = 100, size: int = 1 << 20) -> list[list[bytes]]:
    with_locks, without = (
        [
            decoded(call, OBJECT)
            for call in one.calls(
                b"sha", b"lbs", b"group", counting=counting, locks=locks, most=most, size=size
            )
        ]
        for locks in (True, False)
    )
    assert without == [[*call[:2], b"1", call[3], *call[3 + int(call[2]) :]] for call in with_locks]
    fenced = [
        decoded(call, OBJECT)
        for call in one.calls(
            b"sha", b"lbs", b"group", counting=counting, locks=True, most=most, size=size,
            leader=b"leader", fence=b"value",
        )
    ]  # fmt: skip
    assert fenced == [
        [
            *call[:2], b"%d" % (int(call[2]) + 1), b"lbs", b"leader", *call[4 : 5 + int(call[2])],
            b"value", *call[6 + int(call[2]) :],
        ]
        for call in with_locks
    ]  # fmt: skip
    return with_locks


def put(call: list[bytes]) -> list[tuple[bytes, list[bytes], bytes]]:
    """The entries of a call, as the script reads it."""
    n = int(call[2]) - 1
    assert call[:2] == [b"EVALSHA", b"sha"]
    assert (call[3], call[4 + n]) == (b"lbs", b"group")
    locks, size, args = call[4 : 4 + n], int(call[5 + n]), call[7 + n :]
    assert call[6 + n] == b"", "no fence"
    assert len(args) == n * (size + 1)
    starts = range(0, len(args), size + 1)
    return [
        (args[i], args[i + 1 : i + 1 + size], lock) for i, lock in zip(starts, locks, strict=True)
    ]


# --- ids ----------------------------------------------------------------------------------------


def test_ids() -> None:
    texts = [b"0-0", b"1-2", b"%d-%d" % (2**64 - 1, 2**64 - 1)]
    ids = EntryIds(texts)
    assert (len(ids), list(ids), ids[-1]) == (3, texts, texts[-1])
    for index in (3, -4):
        with pytest.raises(IndexError):
            ids[index]
    assert list(EntryIds()) == list(EntryIds([])) == []


@pytest.mark.parametrize("wrong", [b"", b"1", b"1-", b"1-x", b"-1-0", b"%d-0" % 2**64, None])
def test_what_is_no_id(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected the id of an entry"):
        EntryIds([b"1-0", wrong])


def test_those_idle_for_long_enough() -> None:
    rows = [array(bulk(b"%d-0" % i), bulk(b"c"), b":%d\r\n" % i, b":1\r\n") for i in range(9)]
    page = decoded(array(*rows), PENDING)
    assert list(page.idle(7)) == [b"7-0", b"8-0"]
    assert list(page.idle(9)) == []
    assert len(page.idle(0)) == 9


# --- which entries there are --------------------------------------------------------------------

numbers = st.integers(0, 12)


@given(st.sets(numbers), st.sets(numbers), st.sets(numbers), st.integers(0, 12))
def test_entries_are_found_by_their_ids(
    wanted: set[int], there: set[int], broken: set[int], cut: int
) -> None:
    def one(n: int) -> bytes:
        raw = b"{" if n in broken else b'{"DataStreamName":"s%d","Info":{}}' % n
        return entry(b"%d-0" % n, INPUT_FIELD, raw)

    order = sorted(there)
    first, second = order[:cut], order[cut:]
    found = plan(
        [b"%d-0" % n for n in sorted(wanted)],
        batch_of(*map(one, first)), batch_of(), batch_of(*map(one, second)),
    )  # fmt: skip
    good = sorted((wanted & there) - broken)
    assert found.ids() == [b"%d-0" % n for n in good]
    assert found.names() == [f"s{n}" for n in good]
    assert found.lock_keys() == [b"s%d%b%d-0" % (n, SEPARATOR, n) for n in good]
    assert len(found) == len(good)
    assert found.gone == [b"%d-0" % n for n in sorted(wanted - there)]
    assert [(id_, pairs) for id_, pairs, _ in found.unparseable] == [
        (b"%d-0" % n, [INPUT_FIELD, b"{"]) for n in sorted(wanted & there & broken)
    ]


def test_an_entry_without_fields_is_gone() -> None:
    assert plan([b"1-0"], batch_of(array(bulk(b"1-0"), b"*-1\r\n"))).gone == [b"1-0"]


@pytest.mark.parametrize("batches", [[None], ["a"]])
def test_batches_only(batches: list[Any]) -> None:
    with pytest.raises(TypeError):
        Plan(EntryIds([b"1-0"]), batches, INPUT_FIELD, SEPARATOR, RETRY_FIELD, orjson.loads)


def test_a_decoder_that_fails_otherwise_is_not_the_entrys_fault() -> None:
    def loads(raw: bytes) -> object:
        raise KeyError(raw)

    with pytest.raises(KeyError):
        plan([b"1-0"], batch_of(entry(b"1-0", INPUT_FIELD, b" {}")), loads=loads)


# --- what announces a stream: the same as for who reads it ----------------------------------------


def same_as_reading(*fields: bytes) -> None:
    batch = batch_of(entry(b"1-2", *fields))
    read, bad, _ = announcements(batch, INPUT_FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)
    planned = plan([b"1-2"], batch)
    assert planned.names() == [one.data_stream_name for one in read]
    assert planned.lock_keys() == [one.lock_key for one in read]
    assert [reason for _, _, reason in planned.unparseable] == [reason for _, reason in bad]


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.text(max_size=8), json)
def test_any_announcement(name: str, info: Any) -> None:
    same_as_reading(INPUT_FIELD, orjson.dumps({"DataStreamName": name, "Info": info}))


@pytest.mark.parametrize(
    "valid",
    [
        b'{"DataStreamName":"ab","Info":{"k":[1,-2.5,0,true,false,null,"v"],"":{}}}',
        b'{"DataStreamName":"a","Info":null}',
    ],
)
def test_every_byte_changed_left_out_or_doubled(valid: bytes) -> None:
    for at in range(len(valid)):
        same_as_reading(INPUT_FIELD, valid[:at])
        same_as_reading(INPUT_FIELD, valid[:at] + valid[at + 1 :])
        same_as_reading(INPUT_FIELD, valid[:at] + valid[at : at + 1] + valid[at:])
        for byte in b'\0\x1f\n "\\{}[],:.-+eEtfn019ax\x7f\x80\xc3\xff':
            same_as_reading(INPUT_FIELD, valid[:at] + bytes([byte]) + valid[at + 1 :])


@pytest.mark.parametrize(
    "info",
    [
        b"1", b'"a"', b"[]", b"true", b"nul", b"{", b"{}}", b"{},", b'{},"x":1', b'{},"Info":1',
        b'{"a":01}', b'{"a":-}', b'{"a":-0}', b'{"a":1.}', b'{"a":.1}', b'{"a":1e5}', b'{"a":1,}',
        b'{"a":1e999}', b'{"a":%d}' % 10**30, b'{"a":0.%d}' % 10**30, b'{"a"}', b'{"a":}', b"{,}",
        b'{"a":[}]}', b'{"a":[1 ]}', b'{"a":"\xff"}', b'{"a":"\\ud800"}', b'{"a":tru}', b"",
        b"[" * 2000 + b"]" * 2000, b'{"a":%b}' % (b"[" * 14 + b"]" * 14),
        b'{"a":%b}' % (b"[" * 2000 + b"]" * 2000),
    ],
)  # fmt: skip
def test_info_of_all_kinds(info: bytes) -> None:
    same_as_reading(INPUT_FIELD, b'{"DataStreamName":"a","Info":%b}' % info)


def test_fields_missing_and_repeated() -> None:
    same_as_reading(b"x", b"1")
    same_as_reading(INPUT_FIELD, b"{", b"x", b"1", INPUT_FIELD, GOOD)
    same_as_reading(INPUT_FIELD, GOOD, INPUT_FIELD, b"{")


# --- what is put back -----------------------------------------------------------------------------

counts = st.sampled_from(
    [b"", b"0", b"1", b"+2", b"-1", b"007", b"x", b"1.5", b" 1", b"++1", b"+", b"\xd9\xa1",
     b"%d" % (2**63 - 1), b"%d" % 2**63, b"%d" % 10**19, b"0" * 20]
)  # fmt: skip
other = st.tuples(st.binary(max_size=3), st.binary(max_size=20))
returning = st.lists(
    st.lists(other | st.tuples(st.just(RETRY_FIELD), counts), max_size=4).map(
        lambda pairs: [part for pair in pairs for part in pair]
    ),
    max_size=8,
)


@given(returning, st.booleans(), st.integers(1, 4), st.sampled_from([1, 60, 1 << 20]))
def test_calls_hold_every_entry_once(
    fields: list[list[bytes]], counting: bool, most: int, size: int
) -> None:
    ids = [b"%d-7" % i for i in range(len(fields))]
    entries = [[*pairs, INPUT_FIELD, GOOD] for pairs in fields]
    batch = batch_of(*(entry(id_, *pairs) for id_, pairs in zip(ids, entries, strict=True)))
    one = plan(ids, batch)
    expected = []
    for id_, pairs in zip(ids, entries, strict=True):
        if counting:
            more = b"%d" % (retry_count(pairs) + 1)
            pairs = replace_fields(pairs, {RETRY_FIELD: more})
        expected.append((id_, pairs, b"a" + SEPARATOR + id_))
    made = [put(call) for call in calls(one, counting=counting, most=most, size=size)]
    assert [row for call in made for row in call] == expected
    assert one.returning(counting) == expected
    assert all(0 < len(call) <= most for call in made)
    if size == 1:
        assert len(made) == len(ids)


def test_calls_are_as_few_as_can_be() -> None:
    ids = [b"%d-0" % i for i in range(25)]
    batch = batch_of(*(entry(id_, INPUT_FIELD, GOOD) for id_ in ids))
    made = calls(plan(ids, batch), counting=True, most=10)
    assert [len(put(call)) for call in made] == [10, 10, 5]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12),
    st.integers(0, 5) | st.just(2**70),
)
def test_the_held_stay_and_the_hopeless_become_letters(
    rows: list[tuple[int, bool]], max_retries: int
) -> None:
    ids = [b"%d-0" % i for i in range(len(rows))]
    raw = [b'{"DataStreamName":"s%d","Info":null}' % i for i in range(len(rows))]
    one = plan(ids, batch_of(
        *(
            entry(ids[i], RETRY_FIELD, b"%d" % retries, INPUT_FIELD, raw[i])
            for i, (retries, _) in enumerate(rows)
        )
    ))  # fmt: skip
    values = [b"somebody" if held else None for _, held in rows]
    alive, letters = one.judge(values, max_retries)
    free = [i for i, (_, held) in enumerate(rows) if not held]
    hopeless = [i for i in free if rows[i][0] + 1 > max_retries]
    again = [i for i in free if i not in hopeless]
    assert alive == len(rows) - len(free)
    assert [(name, id_, pairs) for name, (id_, pairs, _) in letters] == [
        (f"s{i}", ids[i], [INPUT_FIELD, raw[i], RETRY_FIELD, b"%d" % (rows[i][0] + 1)])
        for i in hopeless
    ]
    assert [lock for _, (_, _, lock) in letters] == [
        b"s%d%b%b" % (i, SEPARATOR, ids[i]) for i in hopeless
    ]
    assert one.names() == [f"s{i}" for i in again]
    assert one.ids() == [ids[i] for i in again]
    made = [row for call in calls(one, counting=True, most=3) for row in put(call)]
    assert made == one.returning(True)
    assert [id_ for id_, _, _ in made] == [ids[i] for i in again]


def test_as_many_locks_as_entries() -> None:
    one = plan([b"1-0"], batch_of(entry(b"1-0", INPUT_FIELD, GOOD)))
    with pytest.raises(ValueError, match="2 locks of 1 entries"):
        one.judge([None, None], 3)


def test_the_question_for_the_locks() -> None:
    names = ["a", "\u00e9\U0001f600", "x" * 100_000]
    ids = [b"%d-0" % i for i in range(len(names))]
    raw = [orjson.dumps({"DataStreamName": name, "Info": {}}) for name in names]
    one = plan(ids, batch_of(*(entry(ids[i], INPUT_FIELD, raw[i]) for i in range(len(ids)))))
    keys = [name.encode() + SEPARATOR + id_ for name, id_ in zip(names, ids, strict=True)]
    assert decoded(one.mget(), OBJECT) == [b"MGET", *keys]
    assert (one.lock_keys(), one.names()) == (keys, names)
