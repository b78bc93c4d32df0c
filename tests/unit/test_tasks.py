"""Whatever ends first, nothing goes on behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relstream.tasks import cancel_and_wait, run_until_first_exit, within


class Part:
    """Goes on until it is cancelled, and takes a moment then."""

    def __init__(self) -> None:
        self.ended = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            self.ended = True


async def fail() -> None:
    raise ValueError("failed")


async def test_the_first_to_end_ends_all() -> None:
    part = Part()
    await run_until_first_exit(part.run(), asyncio.sleep(0))
    assert part.ended
    part = Part()
    with pytest.raises(ValueError, match="failed"):
        await run_until_first_exit(part.run(), fail())
    assert part.ended


@pytest.mark.parametrize("wait", [run_until_first_exit, lambda work: within(60.0, work)])
async def test_a_cancellation_waits_for_what_it_ends(wait: Any) -> None:
    part = Part()
    waiting = asyncio.ensure_future(wait(part.run()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert part.ended


async def test_what_takes_too_long_is_ended() -> None:
    part = Part()
    await within(0.01, part.run())
    assert part.ended
    await within(1.0, asyncio.sleep(0))
    with pytest.raises(ValueError, match="failed"):
        await within(1.0, fail())


async def test_what_tasks_end_with_is_not_raised() -> None:
    tasks = [asyncio.ensure_future(fail()), asyncio.ensure_future(Part().run())]
    await asyncio.sleep(0.01)
    await cancel_and_wait(tasks)
    assert all(task.done() for task in tasks)
