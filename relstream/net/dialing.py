"""Opens TCP connections to names that have several addresses (RFC 8305, "happy eyeballs").

Done here because uvloop's `create_connection` tries one address after the other, however long each
takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from itertools import chain, zip_longest
from typing import Any

# Seconds after which the next address is tried as well, while the ones before it don't answer.
NEXT_AFTER = 0.25

_Address = tuple[int, int, int, Any]


async def dial(host: str, port: int) -> socket.socket:
    """Returns a connected socket to the first address of `host` that accepts.

    An address that swallows packets delays it by `NEXT_AFTER`; one that refuses, not at all. Raises
    `OSError` when all fail; nothing is left open then, nor when it is cancelled.
    """
    untried = deque(await _addresses(host, port))
    attempts: set[asyncio.Task[socket.socket]] = set()
    problems: list[str] = []
    try:
        while True:
            if untried:
                attempts.add(asyncio.ensure_future(_connect(*untried.popleft())))
            done, _ = await asyncio.wait(
                attempts,
                timeout=NEXT_AFTER if untried else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for attempt in done:
                attempts.discard(attempt)
                error = attempt.exception()
                if error is None:
                    _abandon(attempts | (done - {attempt}))
                    return attempt.result()
                if not isinstance(error, OSError):
                    raise error
                problems.append(str(error))
                if not untried and not attempts:
                    raise error if len(problems) == 1 else OSError("; ".join(problems))
    except BaseException:
        _abandon(attempts)
        if attempts:
            await asyncio.wait(attempts)
        raise


async def _addresses(host: str, port: int) -> list[_Address]:
    found: list[Any] = []
    with contextlib.suppress(OSError):  # an address, which needs no look-up in a thread
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    if not found:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Families take turns, beginning with the one that the system prefers: one may lead nowhere.
    by_family: dict[int, list[_Address]] = {}
    for family, kind, proto, _, address in found:
        by_family.setdefault(family, []).append((family, kind, proto, address))
    turns = chain.from_iterable(zip_longest(*by_family.values()))
    return list(dict.fromkeys(address for address in turns if address is not None))


async def _connect(family: int, kind: int, proto: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _abandon(attempts: set[asyncio.Task[socket.socket]]) -> None:
    for attempt in attempts:
        attempt.cancel()
        attempt.add_done_callback(_close)


def _close(attempt: asyncio.Task[socket.socket]) -> None:
    """Closes what was connected all the same, and leaves no error unseen."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
