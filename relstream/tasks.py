"""Tasks that belong to whoever starts them: they are ended, and their end is waited for.

And what belongs to one event loop, of one process.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from relstream.errors import UsageError

__all__ = [
    "CLOSING",
    "HAS_UVLOOP",
    "OneLoop",
    "cancel_and_wait",
    "new_event_loop",
    "run_async",
    "run_until_first_exit",
    "within",
]

_T = TypeVar("_T")

new_event_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop
except ImportError:  # it is an extra, and there is none for Windows
    from asyncio import new_event_loop

HAS_UVLOOP = new_event_loop is not asyncio.new_event_loop

# The name of tasks that close a client: `relstream.run` waits for them.
CLOSING = "relstream-close"


def run_async(main: Coroutine[Any, Any, _T]) -> _T:
    """As `asyncio.run`, on uvloop where there is one."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


async def cancel_and_wait(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels these, and waits until they have ended; what they end with is not raised."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_until_first_exit(*parts: Coroutine[Any, Any, object]) -> None:
    """Runs these until one of them ends, and ends the others; raises what that one raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel_and_wait(tasks)


async def within(seconds: float, work: Coroutine[Any, Any, object]) -> None:
    """Waits so long for it, and cancels it then.

    Not `asyncio.wait_for`, which may swallow that we are cancelled ourselves.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        await cancel_and_wait([task])
    if not task.cancelled():
        task.result()


class OneLoop:
    """Says so where something is used in another event loop than at first, or in a forked process.

    What is open belongs to the process that opened it: a child that used it would speak, and
    close, in its parent's name.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process: int | None = None
        self.forked = False
        """Whether this is a child of the process that uses it."""

    def check_process(self) -> None:
        """Raises `UsageError` in a child of the process that uses it."""
        if self.forked:
            raise UsageError(
                f"{self._what} first used in process {self._process}, and this is process "
                f"{os.getpid()}, which was forked: make one in each process"
            )

    def check(self) -> None:
        """Raises `UsageError`."""
        self.check_process()
        running = asyncio.get_running_loop()
        if self._loop not in (None, running):
            raise UsageError(
                f"{self._what} first used in another event loop: make one in each asyncio.run()"
            )
        if self._loop is None:
            self._loop = running
            self._process = os.getpid()
            _used.add(self)


# Those that are used in this process. Asking for its id at each call would be a system call.
_used: weakref.WeakSet[OneLoop] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_used):
        each.forked = True
    _used.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def consume_exception(future: asyncio.Future[Any]) -> None:
    """Leaves no error unseen of what nobody waits for any more; a callback for it."""
    if not future.cancelled():
        future.exception()
