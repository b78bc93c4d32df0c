"""The wire contract: names of keys, and fields of entries."""

from __future__ import annotations

import json

import pytest

from relstream import InvalidOption
from relstream._core import key_slot
from relstream.lbs.names import (
    Names,
    entry_id_of,
    message,
    partition_of,
    replace_fields,
    retry_count,
    split_lock_key,
)

SEP = "<MUTEX_KEY_SEP>"


@pytest.mark.parametrize(
    "service", ["calls", "a b", "größe-☎", "x-input", "{tag}:s", "<MUTEX_KEY>"]
)
def test_names(service):
    names = Names.of(service)
    expected = [f"{service}-input", f"{service}-group", f"{service}-input-dlq"]
    assert [names.lbs, names.group, names.dlq] == [name.encode() for name in expected]
    assert Names.of(service, "dead ☠").dlq == "dead ☠".encode()


@pytest.mark.parametrize("service", ["", None, 5, b"calls", "\ud800", SEP, f"a{SEP}b"])
def test_names_that_cannot_be_a_services(service):
    with pytest.raises(InvalidOption, match=r"^service_name=.*: expected a name"):
        Names.of(service)


@pytest.mark.parametrize(
    ("key", "partitions"),
    [("s-input", 1), ("s-input-reconciler", 1), ("s-input{76}", 3), ("s-input-reconciler{26}", 3)],
)
def test_the_dead_letter_stream_is_a_key_of_its_own(key, partitions):
    with pytest.raises(InvalidOption) as caught:
        Names.all_of("s", key, partitions)
    assert str(caught.value) == (
        f"recovery.dlq_stream={key!r}: expected a key that serves nothing else"
    )


@pytest.mark.parametrize("partitions", range(2, 13))
def test_partitions_are_on_different_masters(partitions):
    slots = [key_slot(names.lbs) for names in Names.all_of("s", None, partitions)]
    for masters in range(partitions, 50):
        serving = {slot * masters // 16384 for slot in slots}
        assert len(serving) == partitions


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        (f"call{SEP}1-0", ("call", "1-0")),
        (f"gespräch ☎{SEP}18446744073709551615-7", ("gespräch ☎", "18446744073709551615-7")),
        (f"a{SEP}b{SEP}5-5", (f"a{SEP}b", "5-5")),
        (f"a{SEP}1-0{SEP}5-5", (f"a{SEP}1-0", "5-5")),
        (f"{SEP}{SEP}5-5", (SEP, "5-5")),
        (f"{SEP}1-0", None),
        (f"a{SEP}", None),
        (f"a{SEP}b", None),
        (f"a{SEP}1", None),
        (f"a{SEP}1-", None),
        (f"a{SEP}-1", None),
        (f"a{SEP}1-0 ", None),
        (f"a{SEP}1-0-0", None),
        (f"a{SEP}18446744073709551616-0", None),
        (f"a{SEP}1-0{SEP}x", None),
        (f"a{SEP}1-00", None),
        (f"a{SEP}01-0", None),
        ("a<MUTEX_KEY_SE>1-0", None),
        ("a", None),
        ("", None),
        (b"\xff" + f"{SEP}1-0".encode(), None),
    ],
)
def test_split_lock_key(key, parts):
    assert split_lock_key(key if isinstance(key, bytes) else key.encode()) == parts


def test_an_id_has_one_spelling():
    assert entry_id_of("x", "007-00") == b"7-0"


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, 0),
        (b"0", 0),
        (b"3", 3),
        (b"007", 7),
        (b"+4", 4),
        (b"9223372036854775807", 2**63 - 1),
        (b"9223372036854775808", 0),
        (b"9" * 5000, 0),
        *[
            (bad, 0)
            for bad in (b"", b"-1", b"1.0", b" 1", b"1\n", b"1_0", b"x", "٣".encode(), b"\xff")
        ],
    ],
)
def test_retry_count(value, count):
    pairs = [b"lbs-input", b"{}"] + ([] if value is None else [b"_retry_count", value])
    assert retry_count(pairs) == count


def test_of_a_field_given_twice_the_last_one_counts_as_in_a_map():
    assert retry_count([b"_retry_count", b"1", b"_retry_count", b"2"]) == 2
    assert retry_count([b"_retry_count", b"1", b"_retry_count", b"x"]) == 0


def test_replace_fields():
    pairs = [b"a", b"1", b"b", b"2", b"a", b"3", b"c", b"a"]
    before = list(pairs)
    assert replace_fields(pairs, {b"a": b"9", b"new": b"8"}) == [
        *(b"b", b"2", b"c", b"a", b"a", b"9", b"new", b"8")
    ]
    assert replace_fields(pairs, {}) == pairs == before
    assert replace_fields([], {b"a": b"1"}) == [b"a", b"1"]


@pytest.mark.parametrize(
    ("name", "info", "written"),
    [
        ("call", None, '{"DataStreamName":"call","Info":null}'),
        ("call", {}, '{"DataStreamName":"call","Info":{}}'),
        ('"\\\n\0', {"k": [1, None, {"x": 1.5}]}, None),
        (f"ü{SEP}1-0☎", {"ä": "ö", "Info": {"DataStreamName": "no"}}, None),
    ],
)
def test_message(name, info, written):
    value = message(name, info)
    assert json.loads(value) == {"DataStreamName": name, "Info": info}
    assert list(json.loads(value)) == ["DataStreamName", "Info"]
    if written is not None:
        assert value == written.encode()


@pytest.mark.parametrize("name", ["", None, 5, b"call", "\ud800", ["a"]])
def test_names_that_cannot_be_announced(name):
    with pytest.raises(InvalidOption, match=r"^data_stream_name="):
        message(name, None)


LOOP: dict = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    "info",
    [
        *("text", ["list"], 5, True, b"{}", {1: 2}, {"k": {1, 2}}, {"k": object()}, {"k": b"x"}),
        *({"k": 2**70}, {"\ud800": 1}, {"k": "\udfff"}, LOOP),
    ],
    ids=lambda info: str(info)[:20].encode("ascii", "replace").decode(),
)
def test_infos_that_cannot_be_announced(info):
    with pytest.raises(InvalidOption, match=r"^info=.*a dict that JSON can express"):
        message("call", info)


def test_one_partition_is_the_wire_contract():
    assert Names.all_of("svc") == (Names.of("svc"),)


@pytest.mark.parametrize("partitions", [2, 3, 5, 64])
def test_partitions_lie_in_even_ranges_of_slots(partitions):
    names = Names.all_of("svc", partitions=partitions)
    slots = [key_slot(each.lbs) for each in names]
    assert [slot * partitions // 16384 for slot in slots] == list(range(partitions))
    assert [key_slot(each.leader) for each in names] == slots
    assert len({each.lbs for each in names}) == partitions
    assert {(each.group, each.dlq) for each in names} == {(b"svc-group", b"svc-input-dlq")}


@pytest.mark.parametrize("wrong", [0, -1, 65, 1.5, True])
def test_a_number_of_partitions_that_can_not_be(wrong):
    with pytest.raises(InvalidOption, match="partitions"):
        Names.all_of("svc", partitions=wrong)


def test_a_hash_tag_in_the_name_would_keep_partitions_together():
    with pytest.raises(InvalidOption, match="a name without"):
        Names.all_of("{svc}", partitions=2)
    assert 0 <= partition_of("\ud800", 3) < 3  # which was never announced
    Names.all_of("{svc}")


def test_a_stream_has_one_partition():
    assert {partition_of(f"s{i}", 3) for i in range(100)} == {0, 1, 2}
    assert partition_of("s1", 1) == 0
    assert partition_of("ä", 3) == key_slot("ä".encode()) % 3
