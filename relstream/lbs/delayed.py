"""Entries of failed streams, which wait in a sorted set until they are due.

A member is a MessagePack array: the id that the entry had in the load balancer stream, then its
field names and values in turn. The score is when it is due (ms since 1970, the server's clock).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template, pack
from relstream.errors import ReplyError, is_retriable
from relstream.lbs.names import INPUT_FIELD
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import MOVE_DUE, run
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream.lbs.names import Names
    from relstream.lbs.server_clock import ServerClock
    from relstream.net.topology import KeyConnection

# Seconds between two looks for what is due.
MOVE_EVERY = 0.18
# Seconds until the next one where what seemed to be due was not, or where moving was refused.
SOON = 0.005
REFUSED = 5.0
# Entries, and about how many bytes of them, that are moved in one exchange.
MOST = 100
MOST_BYTES = 1 << 20
# The same where scripts are forbidden, and what is moved passes through here.
MOST_IN_STEPS = 10
# Milliseconds after which what was not moved after all is due again.
CLAIM_MS = 10_000


class DelayedEntries:
    """The delayed entries of one load balancer stream."""

    def __init__(self, link: KeyConnection, names: Names, logger: logging.Logger) -> None:
        self._link = link
        self._names = names
        self._logger = logger
        self._no_scripts = Denied(link)
        self._refused = False
        self._denied = Denied(link)
        self._added: list[bytes] = []  # members that are in the stream, and not yet out of the set

    async def run(self, clock: ServerClock) -> None:
        """Moves what is due, for as long as this consumer leads; raises what a failover explains.

        What is refused otherwise is logged once, and tried again.
        """
        while True:
            pause = MOVE_EVERY
            if self._denied:
                await asyncio.sleep(pause)
                continue
            try:
                # The script costs more than this look, which mostly finds nothing.
                if await self._link.execute(
                    b"ZCOUNT", self._names.delayed, b"-inf", clock.now_ms()
                ):
                    # By the server's own clock it may not be quite due yet.
                    pause = 0.0 if await self.move_due() else SOON
                self._refused = False
            except ReplyError as error:
                if is_retriable(error):
                    raise
                pause = REFUSED
                if error.code == "NOPERM":
                    self._denied.remember()
                if not self._refused:
                    self._refused = True
                    self._logger.error(
                        "failed streams that are due can't be requeued, and wait in %r until this "
                        "is mended: %s (needed: +time +zcount +zrangebyscore +zadd +zrem and ~%s)",
                        self._names.delayed.decode(errors="replace"), error,
                        self._names.delayed.decode(errors="replace"),
                    )  # fmt: skip
            await asyncio.sleep(pause)

    async def move_due(self) -> int:
        """Adds entries that are due to the load balancer stream; returns how many.

        Atomic where scripts are allowed, and it has no more fields than a script can pass on. Else
        it is added before it is taken out of the set: a crash, or a lost reply, between may
        deliver it twice, and can't lose it.
        """
        if self._no_scripts:
            return await self._move_in_steps()
        keys = (self._names.lbs, self._names.delayed)
        (reply,) = await run(self._link, MOVE_DUE, [(keys, (MOST, MOST_BYTES))])
        if isinstance(reply, ReplyError):
            if not refused(reply) or reply.about_keys:
                raise reply
            self._no_scripts.remember()
            return await self._move_in_steps()
        moved, *why = reply
        if why == [b""]:
            moved += await self._move_in_steps()
        elif why:
            raise ReplyError(why[0].decode(errors="replace").removeprefix("-"))
        return int(moved)

    async def _move_in_steps(self) -> int:
        if self._added:  # the connection was lost in between
            await self.remove(self._added)
            self._added = []
        seconds, micros = map(int, await self._link.execute(b"TIME"))
        rows = await self._link.execute(
            b"ZRANGEBYSCORE", self._names.delayed, b"-inf", seconds * 1000 + micros // 1000,
            b"WITHSCORES", b"LIMIT", 0, MOST_IN_STEPS,
        )  # fmt: skip
        rows = scored(rows)
        members = [member for member, _ in rows]
        if not members:
            return 0
        # Of several who move at the same time one sees the score that it made.
        claim = Template(b"ZADD", self._names.delayed, b"XX", b"INCR", CLAIM_MS, ITEM)
        scores = raise_first(await self._link.pipeline(claim.pack(members), len(members)))
        ours = [
            member
            for (member, due), score in zip(rows, scores, strict=True)
            if score is not None and float(score) == due + CLAIM_MS
        ]
        if ours:
            adding = [pack(b"XADD", self._names.lbs, b"*", *unpacked(m)[1:]) for m in ours]
            replies = await self._link.pipeline(b"".join(adding), len(adding))
            self._added = [
                member
                for member, reply in zip(ours, replies, strict=True)
                if not isinstance(reply, ReplyError)
            ]
            if self._added:
                await self.remove(self._added)
                self._added = []
            raise_first(replies)
        return len(ours)

    async def add(self, due: Sequence[tuple[int, bytes]]) -> None:
        """Adds members, each with when it is due; those that are there already stay as they are."""
        await self._link.execute(
            b"ZADD", self._names.delayed, *(part for pair in due for part in pair)
        )

    async def remove(self, members: Sequence[bytes]) -> int:
        """Takes members out; returns how many were there."""
        removed: int = await self._link.execute(b"ZREM", self._names.delayed, *members)
        return removed


def scored(reply: list[Any]) -> list[tuple[bytes, float]]:
    """Members and their scores, of a reply WITHSCORES: pairs in RESP3, and a flat list in RESP2."""
    if reply and not isinstance(reply[0], list):
        reply = list(zip(reply[::2], reply[1::2], strict=True))
    return [(member, float(score)) for member, score in reply]


def packed(parts: Sequence[bytes]) -> bytes:
    """A MessagePack array of byte strings."""
    out = [_header(len(parts), 0x90, 15, ((0xDC, 2), (0xDD, 4)))]
    for part in parts:
        size = len(part)
        out += (_SHORT[size] if size < 256 else _text_header(size), part)
    return b"".join(out)


def _header(size: int, fixed: int, most: int, longer: Sequence[tuple[int, int]]) -> bytes:
    """The shortest that fits: each byte more of a member costs the server."""
    if size <= most:
        return bytes((fixed | size,))
    kind, width = next((kind, width) for kind, width in longer if size < 256**width)
    return bytes((kind,)) + size.to_bytes(width, "big")


def _text_header(size: int) -> bytes:
    return _header(size, 0xA0, 31, ((0xD9, 1), (0xDA, 2), (0xDB, 4)))


_SHORT = [_text_header(size) for size in range(256)]


def unpacked(member: bytes) -> list[bytes]:
    """The byte strings of an array that `packed` wrote.

    What is none becomes an entry that announces nothing, as `MOVE_DUE` has it, too: it is not lost,
    and ends as a dead letter.
    """
    try:
        at, count = _size(member, 0, 0x90, {0xDC: 2, 0xDD: 4})
        parts = []
        for _ in range(count):
            at, size = _size(member, at, 0xA0, {0xD9: 1, 0xDA: 2, 0xDB: 4})
            parts.append(member[at : at + size])
            at += size
        if at == len(member) and count >= 3 and count % 2:
            return parts
    except (IndexError, KeyError):
        pass
    return [b"", INPUT_FIELD, member]


def _size(member: bytes, at: int, fixed: int, longer: dict[int, int]) -> tuple[int, int]:
    """Where what has this header begins, and its size."""
    kind = member[at]
    if fixed <= kind < (0xA0 if fixed == 0x90 else 0xC0):
        return at + 1, kind - fixed
    end = at + 1 + longer[kind]
    if end > len(member):
        raise IndexError
    return end, int.from_bytes(member[at + 1 : end], "big")
