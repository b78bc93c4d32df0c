"""The operator's side of the dead-letter stream: look, replay, purge."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from relstream._core import ENTRIES, Batch, Entry, announcements, pack
from relstream.base_client import BaseClient
from relstream.errors import ReplyError
from relstream.lbs.failures import recorded_failure
from relstream.lbs.names import (
    DLQ_REASON_FIELD,
    INPUT_FIELD,
    RETRY_FIELD,
    SEPARATOR,
    SOURCE_FIELD,
    Names,
    entry_ids_of,
    partition_of,
    replace_fields,
    retry_count,
    start_after,
)
from relstream.lbs.stream import fitting
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["DeadLetter", "DeadLetters"]

# Letters that are read at a time, at most, and the bytes that they should not exceed.
PAGE = 100
PAGE_BYTES = 1 << 20
# Ids that a log line names.
TOLD = 10

_LOGGER = logging.getLogger("relstream")


class DeadLetter(NamedTuple):
    """An entry that could not be served."""

    id: str
    """Its id in the dead-letter stream."""
    source_id: str
    """The id it had in the load balancer stream; empty where the Go client put it there."""
    reason: str
    """`max_retries_exceeded`, `rejected` or `unparseable`; with several partitions also
    `wrong_partition`."""
    retry_count: int
    data_stream_name: str | None
    """None where it announces none."""
    info: dict[str, Any] | None
    fields: dict[bytes, bytes]
    """All its fields, as they are."""
    error: str
    """The text of the error that the stream failed with last, or why else it is a dead letter;
    empty where nothing is known."""
    error_type: str
    """The type of that error, by its full name; empty where it was given as text."""
    failed_at: int | None
    """When the stream failed (ms since 1970, server time); None where it did not."""
    owner: str
    """The consumer that it failed at; empty where it did not."""


class DeadLetters(BaseClient):
    """The dead letters of a service. Belongs to the event loop that it is first used in.

    Args:
        redis: a URL or a ready client, as for `StreamClient`.
        service_name: the service.
        dlq_stream: the key of its dead-letter stream; `<service>-input-dlq` unless given.
        partitions: as its consumers have it, see `StreamClient`.

    Raises:
        InvalidOption: for a URL or a name that can't be.
    """

    _role = "dead-letters"

    def __init__(
        self,
        redis: str | redis.asyncio.Redis | redis.asyncio.RedisCluster,
        service_name: str,
        *,
        dlq_stream: str | None = None,
        partitions: int = 1,
    ) -> None:
        super().__init__(redis, Names.all_of(service_name, dlq_stream, partitions))
        self._dlq = self._partitions[0].dlq

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """All dead letters, oldest first, read by pages (XRANGE)."""
        async for batch in self._pages():
            named = _named(batch)
            for index in range(len(batch)):
                yield _letter(batch, index, named.get(batch.id(index)))

    async def replay(self, ids: Iterable[str] | None = None) -> int:
        """Announces dead letters (all of them unless `ids` are given) anew, their retries at 0.

        Returns how many. Each is added to the load balancer stream before it is deleted here: when
        this is interrupted, one may be announced twice (and owned by two) and none is lost. What
        comes in meanwhile is left for the next time. Those that announce no stream are left, and a
        warning names them: they would only come back.
        """
        replayed = 0
        unreadable: list[str] = []
        async for batch in self._chosen(ids):
            named = _named(batch)
            adding: dict[bytes, list[tuple[bytes, bytes]]] = {}
            for index in range(len(batch)):
                entry = named.get(batch.id(index))
                if entry is None:
                    unreadable.append(batch.id(index).decode())
                    continue
                pairs = replace_fields(batch.pairs(index) or [], {RETRY_FIELD: b"0"})
                kept = [
                    part
                    for name, value in zip(pairs[::2], pairs[1::2], strict=True)
                    if name not in (DLQ_REASON_FIELD, SOURCE_FIELD)
                    for part in (name, value)
                ]
                number = partition_of(entry.data_stream_name, len(self._partitions))
                lbs = self._partitions[number].lbs
                command = pack(b"XADD", lbs, b"*", *kept)
                adding.setdefault(lbs, []).append((batch.id(index), command))
            for lbs, letters in adding.items():
                adds = [command for _, command in letters]
                replies = await self._pipeline(lbs, b"".join(adds), len(adds))
                added = [
                    letter
                    for (letter, _), reply in zip(letters, replies, strict=True)
                    if not isinstance(reply, ReplyError)
                ]
                if added:
                    await self._execute(b"XDEL", self._dlq, *added)
                replayed += len(added)
                raise_first(replies)
        if unreadable:
            _LOGGER.warning(
                "%d dead letters announce no stream, and were not replayed: %s; mend what "
                "announces them, and purge these",
                len(unreadable), ", ".join(unreadable[:TOLD]),
            )  # fmt: skip
        return replayed

    async def purge(self, ids: Iterable[str] | None = None) -> int:
        """Deletes dead letters, all that are there now unless `ids` are given; returns how many."""
        purged = 0
        async for batch in self._chosen(ids):
            purged += await self._execute(b"XDEL", self._dlq, *batch.ids())
        return purged

    async def _chosen(self, ids: Iterable[str] | None) -> AsyncIterator[Batch]:
        if ids is None:
            async for page in self._pages():
                yield page
            return
        for entry_id in entry_ids_of("ids", ids, "dead letters"):
            batch: Batch = await self._range(entry_id, entry_id)
            if len(batch):
                yield batch

    async def _pages(self) -> AsyncIterator[Batch]:
        newest: Batch = await self._execute(
            b"XREVRANGE", self._dlq, b"+", b"-", b"COUNT", 1, decode=ENTRIES
        )
        start: bytes | None = b"-"
        count = 1
        while len(newest) and start is not None:
            batch = await self._range(start, newest.id(0), count)
            if not len(batch):
                return
            yield batch
            start = start_after(batch.id(-1))
            count = min(4 * count, fitting([batch], PAGE_BYTES), PAGE)

    async def _range(self, start: bytes, end: bytes, count: int = 1) -> Batch:
        batch: Batch = await self._execute(
            b"XRANGE", self._dlq, start, end, b"COUNT", count, decode=ENTRIES
        )
        return batch


def _named(batch: Batch) -> dict[bytes, Entry]:
    """Those entries that announce a stream, by their ids."""
    entries, _, _ = announcements(batch, INPUT_FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)
    return {entry.id: entry for entry in entries}


def _letter(batch: Batch, index: int, named: Entry | None) -> DeadLetter:
    pairs = batch.pairs(index) or []
    fields = batch.fields(index) or {}
    return DeadLetter(
        id=batch.id(index).decode(),
        source_id=fields.get(SOURCE_FIELD, b"").decode(errors="replace"),
        reason=fields.get(DLQ_REASON_FIELD, b"").decode(errors="replace"),
        retry_count=retry_count(pairs),
        data_stream_name=named.data_stream_name if named else None,
        info=named.info if named else None,
        fields=fields,
        **recorded_failure(fields)._asdict(),
    )
