"""The reader of RESP2 and RESP3: whatever a server sends, however it is cut."""

from __future__ import annotations

import gc
import math
from itertools import pairwise
from typing import Any

import hiredis
import pytest
from core.resp import array, bulk, replies, replies_for_hiredis
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relstream._core import OBJECT, PENDING, STREAMS, Push, Reader
from relstream.errors import ProtocolError, ReplyError


def read(data: bytes, *, count: int = 1 << 30) -> list[Any]:
    reader = Reader()
    reader.feed(data)
    out: list[Any] = []
    reader.fill(out, count)
    assert reader.buffered == 0
    return out


def write_into_view(reader: Reader, data: bytes) -> None:
    while data:
        view = reader.get_buffer()
        size = min(len(view), len(data))
        view[:size] = data[:size]
        reader.advance(size)
        data = data[size:]


FEEDERS = pytest.mark.parametrize(
    "feed", [Reader.feed, write_into_view], ids=["feed", "get_buffer"]
)


def plain(value: object) -> object:
    """A form of replies that can be compared: errors by their text, nan as a word."""
    if isinstance(value, ReplyError):
        return "error", value.message
    if isinstance(value, hiredis.ReplyError):
        return "error", str(value)
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, Push):
        return "push", [plain(item) for item in value]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return [(plain(k), plain(v)) for k, v in value.items()]
    return type(value).__name__, value


# --- every type -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"+OK\r\n", b"OK"),
        (b"+\r\n", b""),
        (b"+OKAY\r\n", b"OKAY"),
        (b"+123\r\n", b"123"),
        (b"+a\rb\nc\r\n", b"a\rb\nc"),
        (b":0\r\n", 0),
        (b":-1\r\n", -1),
        (b":-2\r\n", -2),
        (b":+7\r\n", 7),
        (b":007\r\n", 7),
        (b":9223372036854775807\r\n", 2**63 - 1),
        (b":-9223372036854775808\r\n", -(2**63)),
        (b"$0\r\n\r\n", b""),
        (b"$4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"_\r\n", None),
        (b"*0\r\n", []),
        (b"~2\r\n:1\r\n:1\r\n", [1, 1]),
        (b"%2\r\n+a\r\n:1\r\n+b\r\n_\r\n", {b"a": 1, b"b": None}),
        (b"%2\r\n+a\r\n:1\r\n+a\r\n:2\r\n", {b"a": 2}),
        (b",1.5\r\n", 1.5),
        (b",-1e-3\r\n", -0.001),
        (b",10\r\n", 10.0),
        (b",inf\r\n", math.inf),
        (b",-inf\r\n", -math.inf),
        (b"#t\r\n", True),
        (b"#f\r\n", False),
        (b"(-123456789012345678901234567890\r\n", -123456789012345678901234567890),
        (b"=7\r\ntxt:abc\r\n", b"abc"),
        (b"=4\r\ntxt:\r\n", b""),
        (b"*1\r\n>1\r\n:1\r\n", [Push([1])]),
    ],
)
def test_a_reply_of_each_type(data: bytes, expected: object) -> None:
    [value] = read(data)
    assert plain(value) == plain(expected)


def test_a_double_that_is_no_number() -> None:
    [value] = read(b",nan\r\n")
    assert math.isnan(value)


@pytest.mark.parametrize("data", [b"-OOM no \xff memory\r\n", b"!15\r\nOOM no \xff memory\r\n"])
def test_an_error_is_a_value(data: bytes) -> None:
    [value] = read(data)
    assert type(value) is ReplyError
    assert value.message == "OOM no \ufffd memory"
    assert value.code == "OOM"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"*2\r\n+a\r\n*0\r\n", (b"a", ())),
        (b"%1\r\n+a\r\n~1\r\n:1\r\n", ((b"a", (1,)),)),
        (b">1\r\n+a\r\n", (b"a",)),
        (b"*1\r\n%1\r\n*1\r\n:1\r\n%0\r\n", ((((1,), ()),),)),
        (b"#t\r\n", True),
        (b"_\r\n", None),
    ],
)
def test_any_type_may_be_the_key_of_a_map(key: bytes, expected: object) -> None:
    assert read(b"%1\r\n" + key + b"+v\r\n") == [{expected: b"v"}]


def test_keys_equal_only_to_themselves_are_all_kept() -> None:
    [value] = read(b"%4\r\n-ERR\r\n:1\r\n-ERR\r\n:2\r\n,nan\r\n:3\r\n,nan\r\n:4\r\n")
    assert list(value.values()) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "data",
    [
        b"|1\r\n+ttl\r\n:9\r\n*1\r\n+a\r\n",
        b"|0\r\n|2\r\n+x\r\n*1\r\n|1\r\n_\r\n_\r\n$1\r\nz\r\n+y\r\n%1\r\n#t\r\n,1\r\n*1\r\n+a\r\n",
        b"*1\r\n|1\r\n+ttl\r\n*-1\r\n+a\r\n",
        b"*1\r\n|0\r\n|1\r\n=5\r\ntxt:a\r\n!1\r\ne\r\n+a\r\n",
    ],
)
def test_attributes_are_passed_over(data: bytes) -> None:
    assert read(data) == [[b"a"]]


def test_attributes_of_a_push_frame() -> None:
    reader = Reader()
    reader.feed(b"|1\r\n+a\r\n+b\r\n>1\r\n+news\r\n|1\r\n+a\r\n+b\r\n:1\r\n")
    out: list[Any] = []
    assert reader.fill(out, 1) == 1
    assert out == [1]
    assert reader.pushes == [[b"news"]]


# --- generated replies, cut at every byte ---------------------------------------------------------


@FEEDERS
@given(pipeline=st.lists(replies(), max_size=4))
@example(pipeline=[(b"$-1\r\n", None), (b"_\r\n", None), (b"*-1\r\n", None)])
def test_byte_by_byte(feed: Any, pipeline: list[tuple[bytes, Any]]) -> None:
    reader = Reader()
    out: list[Any] = []
    for data, value in pipeline:
        for at in range(len(data)):
            assert reader.fill(out, 1) == 0
            feed(reader, data[at : at + 1])
        assert reader.fill(out, 1) == 1
        assert plain(out.pop()) == plain(value)
        assert reader.buffered == 0


@FEEDERS
@settings(max_examples=40)
@given(pipeline=st.lists(replies(), min_size=1, max_size=3))
def test_two_pieces_at_every_position(feed: Any, pipeline: list[tuple[bytes, Any]]) -> None:
    data = b"".join(encoded for encoded, _ in pipeline)
    for cut in range(len(data) + 1):
        reader = Reader()
        out: list[Any] = []
        feed(reader, data[:cut])
        reader.fill(out, len(pipeline))
        feed(reader, data[cut:])
        reader.fill(out, len(pipeline) - len(out))
        assert [plain(value) for value in out] == [plain(value) for _, value in pipeline]


def as_hiredis_has_it(value: Any) -> object:
    """hiredis leaves big numbers as text."""
    match value:
        case list():
            return [as_hiredis_has_it(item) for item in value]
        case ("int", n) if not -(2**63) <= n < 2**63:
            return "bytes", b"%d" % n
        case tuple():
            return tuple(as_hiredis_has_it(item) for item in value)
    return value


@given(replies_for_hiredis())
def test_the_same_as_hiredis(reply: tuple[bytes, Any]) -> None:
    data, _ = reply
    reader = hiredis.Reader()
    reader.feed(data)
    [value] = read(data)
    assert as_hiredis_has_it(plain(value)) == plain(reader.gets())


# --- pipelines, push frames, counts ---------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 262_000, 536_870_912])
def test_ok_and_a_lone_carriage_return_is_another_text(length: int) -> None:
    """Taken for OK, what follows would be read as the length of a string, far beyond the reply."""
    text = b"OK\rX$%d" % length
    assert read(b"*2\r\n+" + text + b"\r\n+second\r\n") == [[text, b"second"]]


@given(st.lists(st.text("OK\r$*:1+X"), min_size=1, max_size=5))
@example(["OK\r"])
@example(["OK\r$1"])
def test_lines_end_at_cr_lf_alone(lines: list[str]) -> None:
    data = b"*%d\r\n" % len(lines) + b"".join(b"+%b\r\n" % line.encode() for line in lines)
    assert read(data) == [[line.encode() for line in lines]]


def test_fill_takes_no_more_than_count() -> None:
    reader = Reader()
    reader.feed(b":1\r\n:2\r\n:3\r\n")
    out: list[Any] = []
    assert reader.fill(out, 0) == 0
    assert reader.fill(out, 2) == 2
    assert out == [1, 2]
    assert reader.buffered == 4
    assert reader.fill(out, 9) == 1
    assert out == [1, 2, 3]


def test_push_frames_between_replies() -> None:
    reader = Reader()
    news = b">2\r\n+message\r\n$1\r\n%d\r\n"
    reader.feed(news % 1 + b":1\r\n" + news % 2 + news % 3 + b":2\r\n" + news % 4)
    out: list[Any] = []
    assert reader.fill(out, 1) == 1
    # Those behind the last reply are taken too: nobody may ask for a while.
    assert reader.take_pushes() == [[b"message", b"1"], [b"message", b"2"], [b"message", b"3"]]
    assert reader.pushes == []
    assert reader.fill(out, 1) == 1
    assert [type(push) for push in reader.take_pushes()] == [Push]
    assert out == [1, 2]


@pytest.mark.parametrize("decode", [STREAMS, PENDING])
def test_push_frames_and_errors_are_themselves_whatever_is_decoded(decode: int) -> None:
    reader = Reader()
    reader.feed(b">1\r\n+news\r\n-NOGROUP no\r\n!5\r\nERR x\r\n")
    out: list[Any] = []
    assert reader.fill(out, 2, decode) == 2
    assert [error.code for error in out] == ["NOGROUP", "ERR"]
    assert reader.pushes == [[b"news"]]


# --- the buffer -----------------------------------------------------------------------------------


def test_a_huge_reply_does_not_keep_its_memory() -> None:
    reader = Reader()
    small = len(reader.get_buffer())
    write_into_view(reader, bulk(b"x" * (8 << 20)))
    assert len(reader.get_buffer()) > small
    out: list[Any] = []
    reader.fill(out, 1)
    assert out == [b"x" * (8 << 20)]
    # Not even when the next reply has begun.
    reader.feed(b":1")
    assert len(reader.get_buffer()) < small
    reader.feed(b"2\r\n")
    reader.fill(out, 1)
    assert out[1:] == [12]


def test_consumed_bytes_make_room() -> None:
    reader = Reader()
    cap = len(reader.get_buffer())
    out: list[Any] = []
    reply = bulk(b"y" * 1000)
    for _ in range(1000):
        reader.feed(reply + reply[:500])
        reader.fill(out, 9)
        reader.feed(reply[500:])
        reader.fill(out, 9)
    assert out == [b"y" * 1000] * 2000
    assert len(reader.get_buffer()) == cap


def test_an_old_view_can_do_no_harm() -> None:
    reader = Reader()
    views = [reader.get_buffer()]
    for _ in range(4):
        reader.feed(b"$3000000\r\n" + b"z" * 1000000)
        views.append(reader.get_buffer())
        reader.feed(b"z" * 2000000 + b"\r\n")
        assert reader.fill([], 1) == 1
        views.append(reader.get_buffer())
    for view in views[:-1]:
        view[:] = bytes(len(view))
    with pytest.raises(BufferError):
        views[0].obj.clear()  # type: ignore[attr-defined]
    reader.feed(b"+ok\r\n")
    out: list[Any] = []
    reader.fill(out, 1)
    assert out == [b"ok"]


def test_advance_is_for_the_view_last_given() -> None:
    reader = Reader()
    with pytest.raises(ValueError, match=r"advance\(1\): expected 0 to 0 bytes"):
        reader.advance(1)
    view = reader.get_buffer()
    for size in (-1, len(view) + 1):
        with pytest.raises(ValueError, match=f"to {len(view)} bytes"):
            reader.advance(size)
    view[:4] = b":1\r\n"
    reader.feed(b":2\r\n")  # takes the place of what was written
    with pytest.raises(ValueError, match="to 0 bytes"):
        reader.advance(4)
    out: list[Any] = []
    reader.fill(out, 9)
    assert out == [2]


@pytest.mark.parametrize("data", [bytearray(b":1\r\n"), memoryview(b"_:1\r\n_")[1:5]])
def test_feed_takes_any_bytes(data: Any) -> None:
    assert read(data) == [1]


@pytest.mark.parametrize("data", ["+OK\r\n", None, 1, memoryview(b"+-O-K-\r-\n-")[::2]])
def test_feed_refuses_what_is_no_bytes(data: Any) -> None:
    with pytest.raises((TypeError, BufferError)):
        Reader().feed(data)


def test_the_garbage_collector_may_run_anything() -> None:
    """While replies are built, code run by the collector can't pull the buffer from under them."""
    reader = Reader()
    seen: list[type[BaseException]] = []

    class Meddler:
        def __del__(self) -> None:
            for use in (
                lambda: reader.feed(b"x" * (1 << 20)),
                lambda: reader.fill([], 1),
                lambda: reader.get_buffer(),
                lambda: reader.advance(0),
            ):
                try:
                    use()
                except ValueError as error:
                    seen.append(type(error))

    out: list[Any] = []
    reader.feed(array(*[b"*1\r\n-ERR\r\n"] * 5000))
    gc.collect()
    meddler: Any = Meddler()
    meddler.itself = meddler
    del meddler
    assert reader.fill(out, 1) == 1
    assert [str(error) for [error] in out[0]] == ["ERR"] * 5000
    assert seen == [ValueError] * 4
    assert reader.buffered == 0


def test_what_a_reader_held_is_not_needed_by_its_replies() -> None:
    reader = Reader()
    reader.feed(array(bulk(b"a"), b"+b\r\n"))
    out: list[Any] = []
    reader.fill(out, 1)
    reader.feed(b"#" * 100)
    del reader
    assert out == [[b"a", b"b"]]


@pytest.mark.parametrize("decode", [-1, 4])
def test_an_unknown_decode(decode: int) -> None:
    reader = Reader()
    reader.feed(b":1\r\n")
    with pytest.raises(ValueError, match=f"decode={decode}: expected OBJECT, STREAMS"):
        reader.fill([], 1, decode)
    assert reader.fill([], 1, OBJECT) == 1


# --- hostile input --------------------------------------------------------------------------------


def broken(data: bytes, *, step: int | None = None, max_reply: int = 1 << 30) -> str:
    """The error that `data` ends in; all later calls must repeat it."""
    reader = Reader(max_reply)
    out: list[Any] = []
    cuts = [*range(0, len(data), step or len(data)), len(data)]

    def read_all() -> None:
        for start, end in pairwise(cuts):
            reader.feed(data[start:end])
            reader.fill(out, 1 << 30)

    with pytest.raises(ProtocolError) as caught:
        read_all()
    for again in (
        lambda: reader.fill(out, 1),
        lambda: reader.feed(b"+OK\r\n"),
        lambda: reader.get_buffer(),
        lambda: reader.advance(0),
    ):
        with pytest.raises(ProtocolError) as repeated:
            again()
        assert str(repeated.value) == str(caught.value)
    assert out == []
    return str(caught.value)


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"$536870913\r\n", "length of a string"),
        (b"$99999999999999999999\r\n", "expected a number"),
        (b"$18446744073709551617\r\n", "expected a number"),
        (b"$9223372036854775807\r\n", "length of a string"),
        (b"$9223372036854775808\r\n", "expected a number"),
        (b"$-2\r\n", "length of a string"),
        (b"!-1\r\n", "length of a string"),
        (b"=-1\r\n", "length of a string"),
        (b"$\r\n", "expected a number"),
        (b"$1a\r\n", "expected a number"),
        (b"$ 1\r\n", "expected a number"),
        (b"$+-1\r\n", "expected a number"),
        (b"$?\r\n", "expected a number"),
        (b"$3\r\nabcde\r\n", "does not end"),
        (b"$3\r\nabc\rX", "does not end"),
        (b"*-2\r\n", "number of elements"),
        (b"~-1\r\n", "number of elements"),
        (b"%-1\r\n", "number of elements"),
        (b">-1\r\n", "number of elements"),
        (b"|-1\r\n", "number of elements"),
        (b"*16777217\r\n", "number of elements"),
        (b"%8388609\r\n", "number of elements"),
        (b"*9000000\r\n*9000000\r\n", "number of elements"),
        (b"*9223372036854775807\r\n", "number of elements"),
        (b"%4611686018427387905\r\n", "number of elements"),
        (b"*x\r\n", "expected a number"),
        (b":\r\n", "expected a number"),
        (b":+\r\n", "expected a number"),
        (b":1.5\r\n", "expected a number"),
        (b":9223372036854775808\r\n", "expected a number"),
        (b":-9223372036854775809\r\n", "expected a number"),
        (b"_x\r\n", "expected a null"),
        (b"_1\r\n", "expected a null"),
        (b"#\r\n", "malformed"),
        (b"#x\r\n", "malformed"),
        (b"#tt\r\n", "malformed"),
        (b",\r\n", "malformed"),
        (b",abc\r\n", "malformed"),
        (b"(12x\r\n", "malformed"),
        (b"(1.5\r\n", "malformed"),
        (b"=3\r\ntxt\r\n", "verbatim"),
        (b"=5\r\ntxt;a\r\n", "verbatim"),
        (b"PING\r\n", "no type"),
        (b"\r\n", "no type"),
        (b"\0", "no type"),
        (b"X1\r\n", "no type"),
        (b"HTTP/1.1 400 Bad Request\r\n", "no type"),
        (b"*2\r\n+fine\r\nX", "no type"),
        (b"*1\r\n" * 32, "nested deeper than 32"),
        (b"*1\r\n" * 100_000, "nested deeper than 32"),
        (b"%1\r\n" * 32, "nested deeper than 32"),
        (b"*1\r\n" + b"|1\r\n" * 32, "nested deeper than 32"),
    ],
)
def test_hostile_bytes(data: bytes, why: str, step: int | None) -> None:
    assert why in broken(data[:1000] if step else data, step=step)


def test_depth_just_within_the_limit() -> None:
    [value] = read(b"*1\r\n" * 31 + b"+deep\r\n")
    for _ in range(31):
        [value] = value
    assert value == b"deep"


@pytest.mark.parametrize("step", [None, 4093])
@pytest.mark.parametrize("kind", [b"+", b"-", b"$", b"(", b"*"])
def test_endless_lines(kind: bytes, step: int | None) -> None:
    assert "a line of over 65536 bytes" in broken(kind + b"1" * 65600, step=step)


@pytest.mark.parametrize("tail", [b"", b"\r", b"\r\n"])
def test_the_longest_line(tail: bytes) -> None:
    reader = Reader()
    reader.feed(b"+" + b"x" * 65535)
    out: list[Any] = []
    assert reader.fill(out, 1) == 0
    reader.feed(tail)
    assert reader.fill(out, 1) == (tail == b"\r\n")


def test_endless_attributes_within_a_reply() -> None:
    data = b"*1\r\n" + b"|0\r\n" * 1000
    assert "a reply of over 1000 bytes" in broken(data, step=7, max_reply=1000)


def test_endless_attributes_before_a_reply_take_no_memory() -> None:
    reader = Reader(1000)
    for _ in range(1000):
        reader.feed(b"|0\r\n|1\r\n+a\r\n+b\r\n")
        assert reader.fill([], 1) == 0
        assert reader.buffered == 0


@pytest.mark.parametrize("step", [None, 1, 13])
def test_max_reply(step: int | None) -> None:
    reply = array(bulk(b"x" * 50), b":1\r\n")
    assert f"over {len(reply) - 1} bytes" in broken(reply, step=step, max_reply=len(reply) - 1)
    reader = Reader(len(reply))
    reader.feed(reply * 3)  # the limit is a reply's, not a pipeline's
    assert reader.fill([], 9) == 3


def test_the_limit_of_elements_is_a_replys() -> None:
    reader = Reader()
    attributes = b"|3000000\r\n" + b"_\r\n" * 6_000_000  # which are passed over, so cheap to read
    for _ in range(3):
        reader.feed(attributes)
        assert reader.fill([], 1) == 0
        assert reader.buffered == 0


def test_a_claimed_length_allocates_nothing() -> None:
    reader = Reader()
    reader.feed(b"*16777216\r\n$536870912\r\n")
    for _ in range(10_000):
        assert reader.fill([], 1) == 0
    assert len(reader.get_buffer()) < 1 << 20


TOKENS = [*(bytes([kind]) for kind in b"$*+-:%~>|_#,(=!0123a"), b"-1", b"9" * 19, b"\r\n", b"\r"]
RESP_LIKE = st.lists(st.sampled_from(TOKENS), max_size=60).map(b"".join)


@pytest.mark.parametrize("decode", range(4))
@given(data=st.binary(max_size=200) | RESP_LIKE, cut=st.integers(0, 200))
def test_garbage(decode: int, data: bytes, cut: int) -> None:
    outcomes = []
    for pieces in ([data], [data[:cut], data[cut:]]):
        reader = Reader()
        out: list[Any] = []
        error = None
        try:
            for piece in pieces:
                reader.feed(piece)
                reader.fill(out, 1 << 30, decode)
        except ProtocolError as raised:
            error = type(raised)
        outcomes.append((len(out), len(reader.pushes), error))
    # However it is cut, the same replies come out, and the same end.
    assert outcomes[0] == outcomes[1]


@given(reply=replies(), at=st.integers(0, 1 << 16), byte=st.integers(0, 255))
def test_one_byte_changed(reply: tuple[bytes, Any], at: int, byte: int) -> None:
    data = bytearray(reply[0])
    data[at % len(data)] = byte
    reader = Reader()
    reader.feed(data)
    try:
        reader.fill([], 9)
    except ProtocolError as error:
        assert str(error)  # noqa: PT017
    assert reader.buffered <= len(data)
