"""Slots of a Redis Cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot as peer

from relstream._core import key_slot


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        (b"", 0),
        (b"123456789", 0x31C3),
        (b"{user1000}.following", peer(b"user1000")),
        (b"foo{}{bar}", peer(b"foo{}{bar}")),
        (b"{}", peer(b"{}")),
        (b"foo{{bar}}zap", peer(b"{bar")),
        (b"foo{bar}{zap}", peer(b"bar")),
        (b"foo{bar", peer(b"foo{bar")),
        (b"foo}bar{", peer(b"foo}bar{")),
        (b"}{a}", peer(b"a")),
        (b"{\0}\xff", peer(b"\0")),
    ],
)
def test_slot(key: bytes, slot: int) -> None:
    assert key_slot(key) == slot


keys = st.lists(st.sampled_from([b"{", b"}", b"a", b"\0"]), max_size=12).map(b"".join)


@given(keys | st.binary())
def test_the_same_as_redis_py(key: bytes) -> None:
    assert key_slot(key) == peer(key)
