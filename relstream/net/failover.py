"""A reply counts only if the master that sent it has not been replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from relstream.errors import ConnectionLost
from relstream.net.cluster.slots import SlotTable
from relstream.net.connection import SharedAddress
from relstream.net.discovery import POLL_EVERY
from relstream.net.sentinel import SentinelMaster
from relstream.tasks import cancel_and_wait, within

if TYPE_CHECKING:
    pass

# What knows where masters are.
MasterResolver = SlotTable | SentinelMaster | SharedAddress | None


async def unless_replaced(
    sending: Coroutine[Any, Any, list[Any]], guide: MasterResolver
) -> list[Any]:
    """The replies; raises `ConnectionLost` where another master took over meanwhile.

    A hung one that wakes up acknowledges what is lost as soon as it is told of that. Of one that
    wakes up just then it may not be known yet that another took over.
    """
    if guide is None or isinstance(guide, SharedAddress):  # nobody tells
        return await sending
    before = set(guide.masters)
    task = asyncio.ensure_future(sending)
    tasks: list[asyncio.Task[Any]] = [task]
    try:
        if not (await asyncio.wait(tasks, timeout=POLL_EVERY))[0]:
            tasks.append(asyncio.ensure_future(_look_for_ever(guide)))
            for ended in (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]:
                ended.result()
            await within(POLL_EVERY, guide.look())
            if not before <= set(guide.masters):
                raise ConnectionLost("another master took over before this one answered")
    finally:
        await cancel_and_wait(tasks)
    return task.result()


async def _look_for_ever(guide: SlotTable | SentinelMaster) -> None:
    while True:
        await guide.look()
        await asyncio.sleep(POLL_EVERY)
