"""Replies as a server writes them, together with what they mean."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from relstream._core import ENTRIES, Batch, Push, Reader
from relstream.errors import ReplyError

Reply = tuple[bytes, Any]

NULLS = [b"$-1\r\n", b"*-1\r\n", b"_\r\n"]


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def array(*items: bytes) -> bytes:
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def mapping(*items: tuple[bytes, bytes]) -> bytes:
    return b"%%%d\r\n%b" % (len(items), b"".join(k + v for k, v in items))


def entry(id: bytes, *fields: bytes) -> bytes:  # noqa: A002
    return array(bulk(id), array(*map(bulk, fields)))


def decoded(data: bytes, decode: int) -> Any:
    reader = Reader()
    reader.feed(data)
    out: list[Any] = []
    assert reader.fill(out, 1, decode) == 1
    assert reader.buffered == 0
    return out[0]


def batch_of(*entries: bytes) -> Batch:
    batch = decoded(array(*entries), ENTRIES)
    assert isinstance(batch, Batch)
    return batch


def as_key(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(as_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((as_key(k), as_key(v)) for k, v in value.items())
    return value


def _aggregate(items: list[Reply], kind: bytes) -> Reply:
    data = b"%b%d\r\n" % (kind, len(items)) + b"".join(data for data, _ in items)
    values = [value for _, value in items]
    return data, Push(values) if kind == b">" else values


def _map(items: list[tuple[Reply, Reply]]) -> Reply:
    data = b"%%%d\r\n" % len(items) + b"".join(k[0] + v[0] for k, v in items)
    return data, {as_key(k[1]): v[1] for k, v in items}


def _with_attributes(attributes: list[tuple[Reply, Reply]], reply: Reply) -> Reply:
    data, value = reply
    return b"|%d\r\n" % len(attributes) + b"".join(k[0] + v[0] for k, v in attributes) + data, value


_texts = st.binary(max_size=30)
_int64 = st.integers(-(2**63), 2**63 - 1)
# Beyond 64 bits, so that the value tells which type it came in.
_big = st.integers(2**63, 10**40).flatmap(lambda n: st.sampled_from([n, -n - 1]))


def _scalars(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[Reply]:
    return st.one_of(
        lines.map(lambda line: (b"+%b\r\n" % line, line)),
        lines.map(lambda line: (b"-%b\r\n" % line, ReplyError(line.decode(errors="replace")))),
        _int64.map(lambda n: (b":%d\r\n" % n, n)),
        _texts.map(lambda text: (bulk(text), text)),
        st.sampled_from([(form, None) for form in NULLS]),
        st.floats(allow_nan=False).map(lambda x: (b",%b\r\n" % repr(x).encode(), x)),
        st.builds(lambda: (b",nan\r\n", float("nan"))),
        st.booleans().map(lambda b: (b"#t\r\n" if b else b"#f\r\n", b)),
        _big.map(lambda n: (b"(%d\r\n" % n, n)),
        _texts.map(lambda text: (b"=%d\r\ntxt:%b\r\n" % (len(text) + 4, text), text)),
    )


def _bulk_error(text: bytes) -> Reply:
    return b"!%d\r\n%b\r\n" % (len(text), text), ReplyError(text.decode(errors="replace"))


def _grown(
    scalars: st.SearchStrategy[Reply], *, keys: st.SearchStrategy[Reply] | None, attributes: bool
) -> st.SearchStrategy[Reply]:
    def aggregates(inner: st.SearchStrategy[Reply]) -> st.SearchStrategy[Reply]:
        if keys is None:
            pairs = st.lists(st.tuples(inner, inner), max_size=3)
        else:
            # A key met again makes hiredis lose the first one's value too.
            pairs = st.lists(st.tuples(keys, inner), max_size=3, unique_by=lambda pair: pair[0][1])
        kinds = [
            st.builds(_aggregate, st.lists(inner, max_size=4), st.sampled_from([b"*", b"~"])),
            st.builds(_map, pairs),
        ]
        if attributes:
            kinds.append(st.builds(_with_attributes, pairs, inner))
        return st.one_of(kinds)

    return st.recursive(scalars, aggregates, max_leaves=12)


def replies() -> st.SearchStrategy[Reply]:
    """A reply of any type but push, as `(bytes, what it means)`."""
    lines = st.binary(max_size=20).filter(lambda line: b"\r\n" not in line and line[-1:] != b"\r")
    return _grown(_scalars(lines) | _texts.map(_bulk_error), keys=None, attributes=True)


def replies_for_hiredis() -> st.SearchStrategy[Reply]:
    """Without what hiredis does not know: bulk errors, attributes, aggregates as keys of a map, and
    single CR or LF in a line."""
    lines = st.binary(max_size=20).filter(lambda line: b"\r" not in line and b"\n" not in line)
    scalars = _scalars(lines)
    return _grown(scalars, keys=scalars, attributes=False)
