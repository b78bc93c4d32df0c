"""Resets of a cluster's subscriptions: one at a time, shared by those who ask meanwhile."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from relstream import ClientClosed
from relstream.lbs.expiry_events import ClusterEvents


class Slots:
    """Takes its time to be settled."""

    masters: tuple[()] = ()

    def __init__(self) -> None:
        self.noticed = asyncio.Event()
        self.under_way = self.most = self.settled = 0

    async def compare_nodes(self) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        self.settled += 1

    async def refresh(self) -> None: ...


def events_of(slots: Any) -> ClusterEvents:
    def never(master: Any) -> Any:
        raise AssertionError(master)

    return ClusterEvents(slots, never, logging.getLogger("relstream"))


async def test_who_asks_again_at_once_joins_those_who_wait() -> None:
    slots = Slots()
    events = events_of(slots)

    async def twice() -> None:
        await events.reset()
        await events.reset()

    asking = [asyncio.ensure_future(twice())]
    await asyncio.sleep(0)
    asking.append(asyncio.ensure_future(events.reset()))
    await asyncio.gather(*asking)
    assert (slots.most, slots.settled) == (1, 2)
    await events.close()


async def test_closing_ends_all_of_them() -> None:
    slots = Slots()
    events = events_of(slots)
    asking = [asyncio.ensure_future(events.reset()) for _ in range(5)]
    await asyncio.sleep(0.005)
    await events.close()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ClientClosed}
    assert (slots.most, slots.settled) == (1, 0)
