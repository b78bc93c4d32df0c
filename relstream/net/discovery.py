"""Asks one of several servers what each of them could tell: where the masters are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from relstream._core import pack
from relstream.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    PermissionDenied,
    RelstreamError,
)
from relstream.net.endpoint import Endpoint
from relstream.net.handshake import connect
from relstream.net.replies import raise_first
from relstream.tasks import cancel_and_wait, consume_exception

_T = TypeVar("_T")

# Seconds for an answer: there are others to ask.
ASK_TIMEOUT = 1.0
# Seconds without an answer until the next one is asked as well.
ASK_NEXT = 0.2
# Seconds between two questions, at least, while all seems well: a master that was replaced goes on
# serving who does not ask, and leases renewed there are lost.
POLL_EVERY = 1.0


async def query(endpoint: Endpoint, *args: bytes | str) -> Any:
    """One command over a connection of its own."""
    quick = replace(endpoint, connect_timeout=min(endpoint.connect_timeout, ASK_TIMEOUT))
    protocol = await connect(quick)
    try:
        return raise_first(await protocol.send(pack(*args), timeout=ASK_TIMEOUT))[0]
    finally:
        protocol.abort()
        await asyncio.wait({protocol.closed})


async def first_reply(
    nodes: Iterable[Endpoint], call: Callable[[Endpoint], Awaitable[_T]], vain: str
) -> _T:
    """Asks one node after the other, without waiting long for one that keeps silent."""
    problems: list[RelstreamError] = []
    asking: set[asyncio.Future[_T]] = set()
    others = list(nodes)
    try:
        while others or asking:
            if others:
                asking.add(asyncio.ensure_future(call(others.pop(0))))
            done, asking = await asyncio.wait(
                asking,
                timeout=ASK_NEXT if others else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for asked in done:
                consume_exception(asked)  # of those that end together with the one that is returned
            for asked in done:
                error = asked.exception()
                if error is None:
                    return asked.result()
                if not isinstance(error, RelstreamError):
                    raise error
                problems.append(error)
    finally:
        await cancel_and_wait(asking)
    raise all_failed(vain, problems)


def all_failed(what: str, problems: list[RelstreamError]) -> RelstreamError:
    """What to raise when all of several nodes were asked in vain."""
    # A user who is refused by one is known to none.
    for problem in problems:
        if isinstance(problem, (AuthenticationFailed, PermissionDenied)):
            return problem
    return ConnectionFailed(f"{what}: {'; '.join(map(str, problems))}")
