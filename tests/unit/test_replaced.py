"""What is answered by a master that another one replaces meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers import eventually

from relstream import ConnectionLost
from relstream.net import failover, sentinel
from relstream.net.endpoint import Endpoint
from relstream.net.failover import unless_replaced
from relstream.net.sentinel import SentinelMaster

EVERY = 0.05
HERE, THERE = ("10.0.0.1", 6379), ("10.0.0.2", 6379)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "POLL_EVERY", EVERY)
    monkeypatch.setattr(sentinel, "POLL_EVERY", EVERY)


class MasterResolver:
    """Knows masters, and is slow in looking for others."""

    def __init__(self, looks_for: float = 0.0) -> None:
        self.masters = [HERE]
        self.looks_for = looks_for
        self.looks = self.ended = 0

    async def look(self) -> None:
        self.looks += 1
        try:
            await asyncio.sleep(self.looks_for)
        finally:
            self.ended += 1


async def answered(when: asyncio.Event) -> list[Any]:
    await when.wait()
    return [b"OK"]


async def test_a_quick_answer_is_waited_for_alone() -> None:
    guide: Any = MasterResolver()
    now = asyncio.Event()
    now.set()
    assert await unless_replaced(answered(now), guide) == [b"OK"]
    assert guide.looks == 0


async def test_a_late_answer_holds_if_the_master_is_still_one() -> None:
    guide: Any = MasterResolver()
    guide.masters.append(THERE)
    later = asyncio.Event()
    answer = asyncio.ensure_future(unless_replaced(answered(later), guide))
    await eventually(lambda: guide.looks)
    guide.masters = [THERE, HERE, ("10.0.0.3", 6379)]
    later.set()
    assert await answer == [b"OK"]


async def test_a_late_answer_is_void_if_it_is_not() -> None:
    guide: Any = MasterResolver()
    later = asyncio.Event()
    answer = asyncio.ensure_future(unless_replaced(answered(later), guide))
    await eventually(lambda: guide.looks)
    guide.masters = [THERE]
    later.set()
    with pytest.raises(ConnectionLost, match="another master"):
        await answer


async def test_an_answer_does_not_wait_for_one_who_looks() -> None:
    guide: Any = MasterResolver(looks_for=60)
    later = asyncio.Event()
    answer = asyncio.ensure_future(unless_replaced(answered(later), guide))
    await eventually(lambda: guide.looks)
    later.set()
    assert await asyncio.wait_for(answer, 10) == [b"OK"]
    assert guide.looks == guide.ended == 2


async def test_an_error_is_raised_as_it_is() -> None:
    later = asyncio.Event()

    async def failing() -> list[Any]:
        await later.wait()
        raise ConnectionLost("it broke")

    guide: Any = MasterResolver(looks_for=60)
    answer = asyncio.ensure_future(unless_replaced(failing(), guide))
    await eventually(lambda: guide.looks)
    later.set()
    with pytest.raises(ConnectionLost, match="it broke"):
        await answer
    assert guide.looks == guide.ended == 1


def named_master(ask: Any, count: int = 3) -> SentinelMaster:
    sentinels: Any = range(count)
    master = SentinelMaster(Endpoint(), sentinels, "m")
    master._ask = ask
    return master


async def test_silent_sentinels_are_not_asked_again_at_once() -> None:
    asked = 0

    async def ask(number: Any) -> tuple[str, int]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(3 * EVERY)
        raise ConnectionLost("silent")

    master = named_master(ask)
    for _ in range(3):
        await master.refresh_if_stale()
    assert asked == 3  # each of them once


@pytest.mark.parametrize("known", [HERE, THERE])
async def test_in_a_tie_it_is_where_it_was(known: tuple[str, int]) -> None:
    async def ask(number: Any) -> tuple[str, int]:
        await asyncio.sleep(0.01 * number)
        return THERE if number else HERE

    master = named_master(ask, 2)
    master.found(known, None)
    assert await master.locate() == known
