"""Masters whose locks can not be verified, at moments that no cluster can be brought to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import SEPARATOR, eventually

from relstream._core import pack
from relstream.errors import ConnectionLost, ReplyError
from relstream.recovery.grace import GracePeriods

LEASE = 0.8


class Masters:
    """A topology of these masters; the lock b"x" is on master "x", or on who replaced it.

    Other keys are shared among them, but for those without any.
    """

    def __init__(self, *masters: str) -> None:
        self.slots = SimpleNamespace(masters=list(masters))
        self.silent: set[str] = set()
        self.hung_up: set[str] = set()
        self.unopened: set[str] = set()
        self.answers: dict[str, object] = {}
        self.generation = Counter(masters)
        self.run_ids: dict[str, bytes | None] = {}
        self.without: set[str] = set()
        self.written: set[str] = set()
        self.asked: dict[str, set[bytes]] = {}

    def group_by_node(self, locks: list[bytes]) -> dict[str, list[bytes]]:
        parts: dict[str, list[bytes]] = {}
        for lock in locks:
            name = lock.decode()
            others = [m for m in self.slots.masters if m not in self.without]
            other = others[len(name) % len(others)]
            at = next((m for m in self.slots.masters if m.startswith(name)), other)
            parts.setdefault(at, []).append(lock)
        return parts

    def to(self, master: str) -> Any:
        async def pipeline(packed: bytes, replies: int) -> list[object]:
            self.asked.setdefault(master, set()).add(packed)
            await asyncio.sleep(0.001)
            if master in self.hung_up:
                raise ConnectionLost("cut")
            while master in self.silent:  # noqa: ASYNC110 - as nobody is told of its end
                await asyncio.sleep(0.01)
            if b"SET" in packed:
                self.written.add(master)
                return [b"OK"]
            return [self.answers.get(master, int(master in self.written))]

        async def run_id() -> bytes | None:
            return self.run_ids.get(master, b"first")

        return SimpleNamespace(
            pipeline=pipeline,
            run_id=run_id,
            alive=master not in self.unopened,
            generation=self.generation[master],
        )


@contextlib.asynccontextmanager
async def watched(
    masters: Any, *, succeeding: bool = False, outages: GracePeriods | None = None
) -> Any:
    outages = outages or GracePeriods(masters, b"svc-input", LEASE)
    task = asyncio.ensure_future(outages.watch(succeeding=succeeding))
    try:
        await asyncio.sleep(0.05)
        yield outages
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_silent_master_is_unverifiable_for_a_lease_after_its_outage() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        assert outages.unverifiable([b"a", b"b"]) == set()
        masters.silent.add("a")
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        masters.silent.clear()
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(LEASE)
        assert outages.unverifiable([b"a", b"b"]) == set()


async def test_a_replaced_master_is_unverifiable_from_the_first_question_on() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        masters.slots.masters = ["a2", "b"]
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}


async def test_a_master_that_hung_up_may_be_back_without_locks() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        masters.hung_up.add("a")
        await asyncio.sleep(0.15)
        masters.hung_up.clear()
        masters.generation["a"] += 1
        masters.run_ids["a"] = b"second"
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(0.15)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}


@pytest.mark.parametrize("run_id", [b"first", None], ids=["told who it is", "not told"])
async def test_a_connection_that_is_only_recycled_is_no_outage(run_id: bytes | None) -> None:
    masters = Masters("a", "b")
    masters.run_ids["a"] = run_id
    async with watched(masters) as outages:
        await eventually(lambda: masters.written == {"a", "b"})
        await asyncio.sleep(0.05)
        for _ in range(3):
            masters.hung_up.add("a")
            await asyncio.sleep(0.05)
            masters.hung_up.clear()
            masters.generation["a"] += 1
            assert outages.unverifiable([b"a", b"b"]) == {b"a"}, "it has not told who it is"
            await eventually(lambda: not outages.unverifiable([b"a", b"b"]), 0.75 * LEASE)


@pytest.mark.parametrize("run_id", [b"second", None], ids=["another", "not told"])
async def test_a_master_on_another_connection_may_be_back_without_locks(
    run_id: bytes | None,
) -> None:
    """It may have been restarted in between two questions."""
    masters = Masters("a", "b")
    masters.run_ids["a"] = run_id and b"first"
    async with watched(masters) as outages:
        masters.generation["a"] += 1
        masters.run_ids["a"] = run_id
        masters.written.discard("a")
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(LEASE)
        assert outages.unverifiable([b"a", b"b"]) == set()


async def test_who_leads_after_another_does_not_know_what_that_one_saw() -> None:
    async with watched(Masters("a", "b"), succeeding=True) as outages:
        assert outages.unverifiable([b"a", b"b"]) == {b"a", b"b"}
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == set()


async def test_a_master_that_refused_a_question_is_unverifiable_for_a_lease() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        outages.unreachable([b"a"])
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await eventually(lambda: not outages.unverifiable([b"a", b"b"]))


async def test_a_master_that_renews_nothing_is_as_one_that_is_silent() -> None:
    masters = Masters("a", "b")
    masters.answers["a"] = ReplyError("NOREPLICAS Not enough good replicas to write.")
    masters.answers["b"] = ReplyError("NOPERM this user has no permissions")  # it does answer
    async with watched(masters) as outages:
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        masters.answers.clear()
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(LEASE)
        assert outages.unverifiable([b"a", b"b"]) == set()


async def test_each_master_is_asked_to_renew_a_key_that_it_serves() -> None:
    masters = Masters("a", "b", "few")
    masters.without.add("few")
    async with watched(masters):
        asked = {master: set(packed) for master, packed in masters.asked.items()}
        masters.without.add("b")  # its slots have moved
        await asyncio.sleep(LEASE / 2)
        masters.without.remove("b")
        masters.slots.masters.append("c")
        await asyncio.sleep(LEASE / 2)
    on_a, on_b = ({each for each in asked[m] if b"PEXPIRE" in each} for m in ("a", "b"))
    assert (len(on_a), len(on_b)) == (1, 1)
    assert on_a != on_b
    assert asked["few"] == {pack(b"PING")}
    assert pack(b"PING") in masters.asked["b"]
    assert any(b"PEXPIRE" in packed for packed in masters.asked["c"])


async def test_a_master_that_loses_keys_before_their_time_has_lost_locks() -> None:
    """Its clock was set forward, say, or it evicts keys."""
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        await eventually(lambda: masters.written == {"a", "b"})
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == set()
        masters.written.remove("a")
        await outages.look_again([b"a"])  # before anybody judges by the locks
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
        await eventually(lambda: not outages.unverifiable([b"a", b"b"]))


async def test_a_user_without_a_right_to_its_keys_asks_for_a_lock_that_is_none() -> None:
    masters = Masters("a")
    denial = "NOPERM No permissions to access a key"
    masters.answers["a"] = ReplyError(denial)
    async with watched(masters) as outages:
        await asyncio.sleep(LEASE / 2)
        masters.answers.clear()
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a"]) == set()
    assert not masters.written
    assert any(SEPARATOR.encode() in packed for packed in masters.asked["a"])


async def test_who_did_not_listen_takes_nobody_for_silent() -> None:
    async with watched(Masters("a", "b")) as outages:
        for _ in range(10):
            time.sleep(LEASE / 3)  # noqa: ASYNC251 - an application that blocks its loop
            assert outages.unverifiable([b"a", b"b"]) == set()
            await asyncio.sleep(0.005)
            assert outages.unverifiable([b"a", b"b"]) == set()


async def test_who_takes_its_time_to_let_us_in_was_not_silent() -> None:
    masters = Masters("a", "b")
    masters.unopened.add("a")
    masters.silent |= {"a", "b"}
    async with watched(masters) as outages:
        await asyncio.sleep(LEASE / 8)
        masters.silent.clear()
        await asyncio.sleep(0.05)
        assert outages.unverifiable([b"a", b"b"]) == {b"b"}


async def test_nothing_is_remembered_by_who_watches_no_more() -> None:
    masters = Masters("a", "b")
    async with watched(masters) as outages:
        masters.silent.add("a")
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
    assert outages.unverifiable([b"a", b"b"]) == set()


async def test_what_was_known_is_known_still_by_who_leads_on() -> None:
    masters = Masters("a", "b")
    outages = GracePeriods(masters, b"svc-input", LEASE)  # type: ignore[arg-type]
    async with watched(masters, outages=outages):
        await eventually(lambda: masters.written == {"a", "b"})
    masters.generation["a"] += 1
    masters.run_ids["a"] = b"second"
    async with watched(masters, outages=outages):
        assert outages.unverifiable([b"a", b"b"]) == {b"a"}
    async with watched(masters, outages=outages, succeeding=True):
        assert outages.unverifiable([b"a", b"b"]) == {b"a", b"b"}
        await asyncio.sleep(LEASE / 2)
        assert outages.unverifiable([b"a", b"b"]) == set()


async def test_a_master_that_is_silent_now_and_then_is_not_unverifiable_for_ever() -> None:
    masters = Masters("a", "b")
    seen = []
    async with watched(masters) as outages:
        for _ in range(5):
            masters.silent.add("a")
            await asyncio.sleep(LEASE * 0.4)
            masters.silent.clear()
            for _ in range(4):
                await asyncio.sleep(LEASE * 0.1)
                seen.append(bool(outages.unverifiable([b"a", b"b"])))
    assert seen[:4] == [True] * 4
    assert False in seen
