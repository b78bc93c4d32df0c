"""What `relstream.run` returns, raises and refuses; signals are in tests/faults."""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from typing import Any

import pytest

import relstream
from relstream import InvalidOption, UsageError, running


async def give(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "asyncio":
        monkeypatch.setattr(running, "new_event_loop", asyncio.new_event_loop)


@pytest.mark.usefixtures("loop")
def test_it_returns_what_main_returns_and_restores_the_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert relstream.run(give(42)) == 42
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), asyncio.CancelledError()])
def test_it_raises_what_main_raises_and_restores_the_handlers(error: BaseException) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(type(error)):
        relstream.run(fail(error))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.usefixtures("loop")
def test_a_signal_is_the_end_of_main_and_of_nothing_else() -> None:
    async def main() -> None:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(60)

    for _ in range(2):
        assert relstream.run(main()) is None
    assert relstream.run(give(1)) == 1


@pytest.mark.parametrize("what", [None, 5, "main", functools.partial(give, 1), asyncio.sleep])
def test_what_is_no_coroutine_is_refused(what: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^main=.*: expected a coroutine: run\(main\(\)\)"):
        relstream.run(what)


def test_who_forgets_to_call_main_is_helped() -> None:
    with pytest.raises(InvalidOption, match=r"main=<function give.*, not run\(main\)$"):
        relstream.run(give)  # type: ignore[arg-type]


async def test_in_a_running_loop_it_is_refused() -> None:
    with pytest.raises(UsageError, match="while an event loop is running"):
        relstream.run(give(1))


def test_in_another_thread_it_is_refused() -> None:
    refusals: list[UsageError] = []

    def body() -> None:
        try:
            relstream.run(give(1))
        except UsageError as error:
            refusals.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert "another thread than the main one" in str(refusals[0])
