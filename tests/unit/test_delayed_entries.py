"""Members of the sorted set of delayed entries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relstream.lbs.delayed import packed, unpacked

SIZES = st.sampled_from([0, 1, 31, 32, 255, 256, 65_535, 65_536])


@given(st.lists(st.binary(max_size=40) | SIZES.map(bytes), min_size=3, max_size=41))
def test_what_is_packed_is_unpacked(parts: list[bytes]) -> None:
    member = packed(parts)
    expected = parts if len(parts) % 2 else [b"", b"lbs-input", member]
    assert unpacked(member) == expected


@given(st.binary(max_size=60))
def test_what_is_no_entry_announces_nothing(member: bytes) -> None:
    parts = unpacked(member)
    assert parts == [b"", b"lbs-input", member] or len(parts) % 2


@given(st.lists(st.binary(max_size=300), min_size=3, max_size=9), st.data())
def test_a_part_of_one_is_none(parts: list[bytes], data: st.DataObject) -> None:
    member = packed(parts)
    cut = member[: data.draw(st.integers(0, len(member) - 1))]
    assert unpacked(cut) == [b"", b"lbs-input", cut]
