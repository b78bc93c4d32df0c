"""The producer's side: announcing data streams to a service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template
from relstream.base_client import BaseClient
from relstream.errors import InvalidOption, ReplyError
from relstream.lbs.names import INPUT_FIELD, Names, message, partition_of
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["Producer"]

# Announcements a pipeline, and the bytes that end one: a slow line shall carry them in time.
BATCH = 1000
BATCH_BYTES = 256 * 1024


class Producer(BaseClient):
    """Announces data streams: from then on some consumer of the service owns each.

    Holds one connection, opened at the first use and again after it was lost. In a Redis Cluster
    and behind Sentinel it finds the master by itself. It belongs to the event loop that it is first
    used in.

    Args:
        redis: a URL or a ready client, as for `StreamClient`.
        service_name: the service whose consumers shall own the streams.
        partitions: as its consumers have it, see `StreamClient`.

    Raises:
        InvalidOption: for a URL or a name that can't be.
    """

    _role = "producer"

    def __init__(
        self,
        redis: str | redis.asyncio.Redis | redis.asyncio.RedisCluster,
        service_name: str,
        *,
        partitions: int = 1,
    ) -> None:
        super().__init__(redis, Names.all_of(service_name, partitions=partitions))
        self._add = [
            Template(b"XADD", names.lbs, b"*", INPUT_FIELD, ITEM) for names in self._partitions
        ]

    async def announce(self, data_stream_name: str, info: dict[str, Any] | None = None) -> str:
        """Announces one data stream (XADD); returns the id of its LBS entry.

        `info` is handed to the owner as `additional_info`; JSON must be able to express it (NaN and
        infinities become null).

        Raises:
            InvalidOption: the name is empty, or `info` no dict that JSON can express.
            ConnectionLost: the connection broke; whether the stream was announced is not known.
                Announced twice it may be owned by two consumers.
            ConnectionFailed, ServerError: it was not announced.
            ClientClosed: the producer is closed.
            UsageError: it was first used in another event loop.
        """
        return (await self.announce_many([(data_stream_name, info)]))[0]

    async def announce_many(
        self, streams: Iterable[tuple[str, dict[str, Any] | None]]
    ) -> list[str]:
        """Announces many data streams, `(name, info)` each, in order; returns their ids.

        All are checked before the first is sent. Raises as `announce` does; of several, some may
        have been announced by then.
        """
        self._check_usable()
        pipelines = [_Pipelines(add) for add in self._add]
        numbers = []
        for name, info in _pairs(streams):
            value = message(name, info)
            numbers.append(partition_of(name, len(pipelines)))
            pipelines[numbers[-1]].append(value)
        if len(pipelines) == 1:
            return await self._announce(0, pipelines[0])
        announced = await asyncio.gather(
            *map(self._announce, range(len(pipelines)), pipelines), return_exceptions=True
        )
        ids = []
        for outcome in announced:  # all have ended: nothing is announced after an error is raised
            if isinstance(outcome, BaseException):
                raise outcome
            ids.append(iter(outcome))
        return [next(ids[number]) for number in numbers]

    async def _announce(self, partition: int, pipelines: _Pipelines) -> list[str]:
        ids: list[str] = []
        for packed, count in pipelines.all():
            replies = await self._pipeline(self._partitions[partition].lbs, packed, count)
            try:
                ids += [reply.decode() for reply in raise_first(replies)]
            except ReplyError as error:
                if not error.exhausted:
                    raise
                lbs = self._partitions[partition].lbs.decode()
                raise ReplyError(
                    f"{error}: {lbs!r} had an entry with the last possible id, which only a "
                    "foreign tool can give; once what it holds is finished, delete the stream"
                ) from None
        return ids


class _Pipelines:
    """Announcements for one partition, packed: values as orjson makes them take 4 KB each."""

    def __init__(self, add: Template) -> None:
        self._add = add
        self._packed: list[tuple[bytes, int]] = []
        self._values: list[bytes] = []
        self._bytes = 0

    def append(self, value: bytes) -> None:
        self._values.append(value)
        self._bytes += len(value)
        if len(self._values) == BATCH or self._bytes >= BATCH_BYTES:
            self._pack()

    def all(self) -> list[tuple[bytes, int]]:
        """Packed commands, and how many they are."""
        if self._values:
            self._pack()
        return self._packed

    def _pack(self) -> None:
        self._packed.append((self._add.pack(self._values), len(self._values)))
        self._values = []
        self._bytes = 0


def _pairs(
    streams: Iterable[tuple[str, dict[str, Any] | None]],
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """What is to be announced; what an iterator of the caller's raises is passed on as it is."""
    for pair in streams if isinstance(streams, Iterable) else [streams]:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            wanted = "names of data streams with their infos: [(name, info), …]"
            raise InvalidOption("streams", pair, wanted)
        yield pair[0], pair[1]
