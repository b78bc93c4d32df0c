"""Commands, as bytes."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relstream._core import ITEM, Template, commands, pack

arguments = st.binary() | st.text(max_size=20) | st.integers()


@given(st.lists(arguments, min_size=1, max_size=12))
def test_the_same_as_hiredis(args: list[Any]) -> None:
    assert pack(*args) == hiredis.pack_command(tuple(args))


@pytest.mark.parametrize("size", [0, 9, 10, 99, 100, 999, 1000, 99_999, 100_000])
def test_lengths_of_all_digits(size: int) -> None:
    value = b"x" * size
    assert pack(b"SET", value) == b"*2\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (size, value)
    assert pack(*[b""] * size) == b"*%d\r\n" % size + b"$0\r\n\r\n" * size


class Number(IntEnum):
    SEVEN = 7


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (bytearray(b"a\0b"), b"a\0b"),
        (memoryview(b"abcd")[::2], b"ac"),
        (Number.SEVEN, b"7"),
        (-(2**70), b"-1180591620717411303424"),
        ("\u00e9\U0001f600", b"\xc3\xa9\xf0\x9f\x98\x80"),
    ],
)
def test_an_argument(value: Any, sent: bytes) -> None:
    assert pack(value) == b"*1\r\n$%d\r\n%b\r\n" % (len(sent), sent)


@pytest.mark.parametrize("value", [None, 1.5, True, [b"a"], ITEM])
def test_no_argument(value: Any) -> None:
    with pytest.raises(TypeError, match="expected bytes, str or int"):
        pack(b"SET", value)


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(UnicodeEncodeError):
        pack("\ud800")


@given(
    st.lists(st.one_of(arguments, st.just(ITEM)), max_size=8),
    st.lists(st.binary(max_size=200), max_size=8),
)
def test_a_template_is_the_command_once_for_each_item(args: list[Any], items: list[bytes]) -> None:
    expected = [pack(*(item if arg is ITEM else arg for arg in args)) for item in items]
    assert Template(*args).pack(items) == b"".join(expected)


@pytest.mark.parametrize("item", [None, "text", 1, bytearray(b"x")])
def test_items_are_bytes(item: Any) -> None:
    with pytest.raises(TypeError):
        Template(b"GET", ITEM).pack([b"fine", item])


@pytest.mark.parametrize("items", [None, (b"a",)])
def test_items_are_a_list(items: Any) -> None:
    with pytest.raises(TypeError):
        Template(b"GET", ITEM).pack(items)


def test_a_template_never_given_its_command() -> None:
    with pytest.raises(TypeError):
        Template.__new__(Template).pack([b"a"])


@given(st.lists(st.lists(arguments, min_size=1, max_size=6), max_size=8))
def test_packed_commands_are_told_apart(several: list[list[Any]]) -> None:
    packed = [pack(*args) for args in several]
    assert commands(b"".join(packed)) == packed
