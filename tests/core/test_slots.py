"""Slots of a Redis Cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot as peer

from relstream._core import by_owner, key_slot, scatter
from relstream.errors import ReplyError


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


@given(st.lists(st.sampled_from([b"a", b"b", b"c", b"d"])), st.data())
def test_by_owner(all_keys: list[bytes], data: st.DataObject) -> None:
    names = [object(), object(), None]
    owners = [names[slot % 3] for slot in range(16384)]
    every = range(len(all_keys))
    places = [place for place in every if data.draw(st.booleans())]
    groups = by_owner(all_keys, places, owners)
    assert len({id(owner) for owner, _ in groups}) == len(groups)
    for owner, some in groups:
        assert some == [p for p in places if owners[key_slot(all_keys[p])] is owner]
    assert sorted(place for _, some in groups for place in some) == places


def test_scatter() -> None:
    replies: list[object] = [None] * 4
    assert not scatter(replies, [3, 0], [b"x", 7])
    assert replies == [7, None, None, b"x"]
    error = ReplyError("MOVED 1 :1")
    assert scatter(replies, [1], [error])
    assert replies == [7, error, None, b"x"]
    with pytest.raises(ValueError, match="1 replies to 2 commands"):
        scatter(replies, [1, 2], [b""])


@given(st.lists(keys | st.binary(), max_size=50), st.data())
def test_keys_by_their_owners(some: list[bytes], data: st.DataObject) -> None:
    masters = [None, "m1", "m2", "m3"]
    owners = [masters[slot % 7 % 4] for slot in range(16384)]
    places = data.draw(st.lists(st.sampled_from(range(len(some))), unique=True)) if some else []
    found = by_owner(some, places, owners)
    expected: dict[str | None, list[int]] = {}
    for place in places:
        expected.setdefault(owners[peer(some[place])], []).append(place)
    assert found == list(expected.items())


@pytest.mark.parametrize("slots", [0, 7, 16385])
def test_owners_are_those_of_all_slots(slots: int) -> None:
    with pytest.raises(ValueError, match=f"owners of {slots} slots, expected 16384"):
        by_owner([b"a"], [0], [None] * slots)
