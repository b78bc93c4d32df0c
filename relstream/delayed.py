"""The operator's side of delayed entries: look, requeue, drop."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from relstream._core import ENTRIES, Batch, Entry, Reader, announcements, pack
from relstream.base_client import BaseClient
from relstream.errors import ReplyError
from relstream.lbs.delayed import scored, unpacked
from relstream.lbs.failures import recorded_failure
from relstream.lbs.names import (
    INPUT_FIELD,
    RETRY_FIELD,
    SEPARATOR,
    Names,
    entry_ids_of,
    retry_count,
)
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["Delayed", "DelayedEntry"]

# Entries that are read at a time, at most: so many may be large although those before were small.
PAGE = 10
# The bytes that a page should not exceed.
PAGE_BYTES = 1 << 20

# A member of the sorted set, and its score: when it is due.
_Row = tuple[bytes, float]


class DelayedEntry(NamedTuple):
    """An entry of a stream that failed, and waits until it is due."""

    data_stream_name: str | None
    """None where it announces none: it becomes a dead letter when it is due."""
    info: dict[str, Any] | None
    retry_count: int
    """As it is when it is back."""
    due: int
    """When it goes back to the load balancer stream (ms since 1970, server time)."""
    error: str
    """The text of the error that the stream failed with; empty where there is none."""
    error_type: str
    """The type of that error, by its full name; empty where it was given as text."""
    failed_at: int | None
    """When the stream failed (ms since 1970, server time); None where that is not known."""
    owner: str
    """The consumer that it failed at; empty where that is not known."""
    source_id: str
    """The id it had in the load balancer stream; empty where relstream did not put it here."""
    fields: dict[bytes, bytes]
    """All its fields, as they are."""


class Delayed(BaseClient):
    """The delayed entries of a service. Belongs to the event loop that it is first used in.

    Streams that failed wait here until they are due, and the service's leader then requeues them.
    Ids are those that the entries had in the load balancer stream (`DelayedEntry.source_id`). Each
    partition has ids of its own: an id names all entries that had it. No scripts are used.

    Args:
        redis: a URL or a ready client, as for `StreamClient`.
        service_name: the service.
        partitions: as its consumers have it, see `StreamClient`.

    Raises:
        InvalidOption: for a URL or a name that can't be.
    """

    _role = "delayed"

    def __init__(
        self,
        redis: str | redis.asyncio.Redis | redis.asyncio.RedisCluster,
        service_name: str,
        *,
        partitions: int = 1,
    ) -> None:
        super().__init__(redis, Names.all_of(service_name, partitions=partitions))

    async def __aiter__(self) -> AsyncIterator[DelayedEntry]:
        """The delayed entries of each partition in turn, the one that is due first in front.

        They are read by pages (ZRANGEBYSCORE) while the set changes. Of each partition it yields no
        entry that is due after the last one of the beginning, and no more entries than there were
        at the beginning. An entry that waits all the time is yielded once, unless others that
        fail meanwhile take its place. One that is requeued or dropped meanwhile may be missing, and
        so may one that is due in the same millisecond. One whose due time changes may come twice.
        """
        for names in self._partitions:
            there: int = await self._execute(b"ZCARD", names.delayed)
            async for page in self._pages(names.delayed, most=there):
                for member, due in page:
                    yield _entry(member, due)

    async def requeue(self, source_ids: Iterable[str] | None = None) -> int:
        """Makes entries due now, all that wait unless `source_ids` are given; returns how many.

        Their retry counts stay as they are. The leader then requeues them, within 0.2 s: one
        atomic step each where scripts are permitted. While no consumer runs they stay here.
        Entries that are due already are on their way, and not counted. When this is interrupted,
        some are due and none is lost.

        Raises:
            InvalidOption: `source_ids` is no iterable of ids.
            ConnectionFailed, ServerError: some may be due by then.
            ClientClosed: it is closed.
            UsageError: it was first used in another event loop.
        """
        wanted = self._wanted(source_ids)
        requeued = 0
        for names in self._partitions:
            now = await self._now_ms(names.delayed)
            async for page in self._pages(names.delayed, b"(%d" % now):
                chosen = _taken_out(page, wanted)
                if chosen:
                    # XX: only what is still there; LT: never later than it is.
                    pairs = [part for member in chosen for part in (now, member)]
                    requeued += await self._execute(
                        b"ZADD", names.delayed, b"XX", b"LT", b"CH", *pairs
                    )
        return requeued

    async def drop(self, source_ids: Iterable[str] | None = None) -> int:
        """Deletes entries for good, all unless `source_ids` are given; returns how many.

        Their streams are not delivered again. When this is interrupted, some are left. Raises as
        `requeue` does.
        """
        wanted = self._wanted(source_ids)
        dropped = 0
        for names in self._partitions:
            async for page in self._pages(names.delayed):
                chosen = _taken_out(page, wanted)
                if chosen:
                    dropped += await self._execute(b"ZREM", names.delayed, *chosen)
        return dropped

    def _wanted(self, source_ids: Iterable[str] | None) -> set[bytes] | None:
        self._check_usable()
        if source_ids is None:
            return None
        return set(entry_ids_of("source_ids", source_ids, "delayed entries"))

    async def _now_ms(self, key: bytes) -> int:
        """The time of the server that has this key; where TIME is forbidden 0: long ago."""
        (reply,) = await self._pipeline(key, pack(b"TIME"), 1)
        if isinstance(reply, ReplyError) and reply.code == "NOPERM":
            return 0
        seconds, micros = map(int, raise_first([reply])[0])
        return seconds * 1000 + micros // 1000

    async def _pages(
        self, key: bytes, start: bytes = b"-inf", most: float = math.inf
    ) -> AsyncIterator[list[_Row]]:
        """Pages of up to `most` rows by score, from `start` to the last score of the beginning.

        Rows that the caller takes out of this range it takes out of their page, too. Rows of equal
        scores are told apart by how many of them were left behind.
        """
        last = scored(await self._execute(b"ZRANGE", key, -1, -1, b"WITHSCORES"))
        offset, count = 0, 1
        while last and most > 0:
            commands = (
                pack(
                    b"ZRANGEBYSCORE", key, start, b"%r" % last[0][1],
                    b"WITHSCORES", b"LIMIT", offset, int(min(count, most)),
                ),
                pack(b"ZCOUNT", key, start, start),
            )  # fmt: skip
            rows, there = raise_first(await self._pipeline(key, b"".join(commands), 2))
            if there < offset:  # others took some of those out: none behind them may be skipped
                offset = there
                continue
            page = scored(rows)
            if not page:
                return
            most -= len(page)
            score = page[-1][1]
            nbytes = sum(len(member) for member, _ in page)
            count = min(4 * count, max(1, PAGE_BYTES * len(page) // max(1, nbytes)), PAGE)
            yield page
            stayed = sum(due == score for _, due in page)
            offset = stayed + (offset if start == b"%r" % score else 0)
            start = b"%r" % score


def _taken_out(page: list[_Row], wanted: set[bytes] | None) -> list[bytes]:
    """The members that are wanted (None: all), which are no longer in the page then."""
    chosen = [row for row in page if wanted is None or unpacked(row[0])[0] in wanted]
    page[:] = [row for row in page if row not in chosen]
    return [member for member, _ in chosen]


def _entry(member: bytes, due: float) -> DelayedEntry:
    source_id, *pairs = unpacked(member)
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
    announced = _announced(pairs)
    return DelayedEntry(
        data_stream_name=announced.data_stream_name if announced else None,
        info=announced.info if announced else None,
        retry_count=retry_count(pairs),
        due=int(max(-(2.0**63), min(due, 2.0**63))),  # some other tool's may be infinite
        source_id=source_id.decode(errors="replace"),
        fields=fields,
        **recorded_failure(fields)._asdict(),
    )


def _announced(pairs: list[bytes]) -> Entry | None:
    """What these fields announce: they are decoded as a reply that contains them is."""
    reader, replies = Reader(), list[Batch]()
    reader.feed(b"*1\r\n*2\r\n$3\r\n0-1\r\n" + pack(*pairs))
    reader.fill(replies, 1, ENTRIES)
    entries, _, _ = announcements(replies[0], INPUT_FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)
    return entries[0] if entries else None
