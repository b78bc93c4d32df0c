"""Runs an application, and ends it in an orderly way on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import select
import signal
import threading
import time
from collections.abc import Coroutine
from types import FrameType
from typing import Any, Generic, TypeVar

from relstream.errors import InvalidOption, UsageError
from relstream.tasks import CLOSING, new_event_loop

__all__ = ["run"]

_T = TypeVar("_T")

# Signals that come within so many seconds of the first one are the same request: supervisors and
# shells send doubles.
SAME_REQUEST = 0.5


def run(main: Coroutine[Any, Any, _T]) -> _T | None:
    """Runs `main`, a coroutine, until it ends; SIGTERM and SIGINT end it in an orderly way.

    ::

        relstream.run(main())

    Uses uvloop where it can be imported, else asyncio's event loop. To be called in the main
    thread, as the outermost call of a program; it works as process 1, too.

    The first signal cancels `main` once, so that `async with client` hands over what is owned.
    Signals within 0.5 s of it belong to the same request. A later one ends the process at once,
    with the exit code 128 + the signal's number: owned streams are then recovered once their locks
    have expired. A SIGINT that the process inherited as ignored, as shells do for background jobs,
    stays ignored. When `run` returns, the former handlers are back; after a signal that is no
    earlier than 0.5 s after it.

    Returns what `main` returns, or None if it ended by that cancellation; raises what it raises.

    Raises:
        InvalidOption: `main` is no coroutine.
        UsageError: this is not the main thread, or an event loop is running in it.
    """
    if not asyncio.iscoroutine(main):
        expected = "a coroutine: run(main())"
        if inspect.iscoroutinefunction(main):
            expected += ", not run(main)"
        raise InvalidOption("main", main, expected)
    try:
        _check_place()
    except UsageError:
        main.close()
        raise
    return _Run(main).run()


def _check_place() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "relstream.run() was called in another thread than the main one, where Python handles "
            "no signals: call it in the main thread, or use asyncio.run() here"
        )
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise UsageError("relstream.run() was called while an event loop is running: await main()")


class _Run(Generic[_T]):
    """One call of `run`."""

    def __init__(self, main: Coroutine[Any, Any, _T]) -> None:
        self._main = main
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_at: float | None = None

    def run(self) -> _T | None:
        former: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                if number is signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                former[number] = signal.signal(number, self._on_signal)
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                return runner.run(self._supervise())
        finally:
            self._main.close()  # if it was not begun
            self._outlast_request()
            for number, handler in former.items():
                # None is a handler that was not set by Python, and can't be set by it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    async def _supervise(self) -> _T | None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        if self._asked_at is not None:
            return None
        try:
            return await self._main
        except asyncio.CancelledError:
            if self._asked_at is None:
                raise
            return None
        finally:
            # The cancellation may have come while a client was being closed, which goes on; the
            # end of the loop would cancel that.
            while closing := [t for t in asyncio.all_tasks() if t.get_name() == CLOSING]:
                await asyncio.wait(closing)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread, also where the loop is blocked."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if self._task is not None and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nothing to cancel
                    self._loop.call_soon_threadsafe(self._task.cancel)
        elif now - self._asked_at >= SAME_REQUEST:
            _end_at_once(number)

    def _outlast_request(self) -> None:
        """Waits out the time in which more signals are the same request.

        A former handler, which may end the process, must not get one of them.
        """
        if self._asked_at is not None:
            while (left := self._asked_at + SAME_REQUEST - time.monotonic()) > 0:
                time.sleep(left)


def _end_at_once(number: int) -> None:
    line = (
        f"relstream: ended at once by a second signal ({signal.Signals(number).name}); streams "
        "that were not handed over are recovered when their locks have expired\n"
    )
    with contextlib.suppress(OSError, ValueError):
        # Not where nobody reads standard error: that would block.
        if select.select([], [2], [], 0)[1]:
            os.write(2, line.encode())
    os._exit(128 + number)
