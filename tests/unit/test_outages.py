"""Which masters are in the dark, at moments that no cluster can be brought to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import SimpleNamespace
from typing import Any

from helpers import eventually

from relstream.errors import ConnectionLost
from relstream.outages import Outages

LEASE = 0.8


class Masters:
    """A topology of these masters; the lock b"x" is on master "x", or on who replaced it."""

    def __init__(self, *masters: str) -> None:
        self.slots = SimpleNamespace(masters=list(masters))
        self.silent: set[str] = set()
        self.hung_up: set[str] = set()
        self.unopened: set[str] = set()

    def apart(self, locks: list[bytes]) -> dict[str, list[bytes]]:
        parts: dict[str, list[bytes]] = {}
        for lock in locks:
            name = lock.decode()
            at = next(m for m in self.slots.masters if m.startswith(name))
            parts.setdefault(at, []).append(lock)
        return parts

    def to(self, master: str) -> Any:
        async def pipeline(*args: Any) -> list[bytes]:
            await asyncio.sleep(0.001)
            if master in self.hung_up:
                raise ConnectionLost("cut")
            while master in self.silent:  # noqa: ASYNC110 - as nobody is told of its end
                await asyncio.sleep(0.01)
            return [b"PONG"]

        return SimpleNamespace(pipeline=pipeline, alive=master not in self.unopened)


@contextlib.asynccontextmanager
async def watched(masters: Any) -> Any:
    outages = Outages(masters, LEASE)
    task = asyncio.ensure_future(outages.watch())
    try:
        await asyncio.sleep(0.05)
        yield outages
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_silent_master_is_in_the_dark_for_a_lease_after_its_outage() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        assert outages.shadowed([b"a", b"b"]) == set()
        masters.silent.add("a")
        await asyncio.sleep(LEASE / 2)
        assert outages.shadowed([b"a", b"b"]) == {b"a"}
        masters.silent.clear()
        await asyncio.sleep(LEASE / 2)
        assert outages.shadowed([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(LEASE)
        assert outages.shadowed([b"a", b"b"]) == set()


async def test_a_replaced_master_is_in_the_dark_from_the_first_question_on() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        masters.slots.masters = ["a2", "b"]
        assert outages.shadowed([b"a", b"b"]) == {b"a"}


async def test_a_master_that_hung_up_may_be_back_without_locks() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        masters.hung_up.add("a")
        await asyncio.sleep(0.15)
        masters.hung_up.clear()
        assert outages.shadowed([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(0.15)
        assert outages.shadowed([b"a", b"b"]) == {b"a"}


async def test_a_master_that_refused_a_question_is_in_the_dark_for_a_lease() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        outages.refused([b"a"])
        assert outages.shadowed([b"a", b"b"]) == {b"a"}
        await eventually(lambda: not outages.shadowed([b"a", b"b"]))


async def test_who_did_not_listen_takes_nobody_for_silent() -> None:
    async with watched(Masters("a", "b")) as outages:
        for _ in range(10):
            time.sleep(LEASE / 3)  # noqa: ASYNC251 - an application that blocks its loop
            assert outages.shadowed([b"a", b"b"]) == set()
            await asyncio.sleep(0.005)
            assert outages.shadowed([b"a", b"b"]) == set()


async def test_who_takes_its_time_to_let_us_in_was_not_silent() -> None:
    masters = Masters("a", "b")
    masters.unopened.add("a")
    masters.silent |= {"a", "b"}
    async with watched(masters) as outages:
        await asyncio.sleep(LEASE / 8)
        masters.silent.clear()
        await asyncio.sleep(0.05)
        assert outages.shadowed([b"a", b"b"]) == {b"b"}


async def test_nothing_is_remembered_by_who_watches_no_more() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        masters.silent.add("a")
        await asyncio.sleep(LEASE / 2)
        assert outages.shadowed([b"a", b"b"]) == {b"a"}
    assert outages.shadowed([b"a", b"b"]) == set()
