"""The producer's side: announcing data streams to a service."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template
from relstream.errors import ClientClosed, InvalidOption
from relstream.lbs import INPUT_FIELD, Names, message, partition_of
from relstream.locks import chunks
from relstream.net.asking import LOOK_EVERY
from relstream.net.connection import raise_first
from relstream.net.deployment import deployment_of
from relstream.tasks import end_all

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["Producer"]

# Announcements a pipeline.
BATCH = 1000


class Producer:
    """Announces data streams: from then on some consumer of the service owns each.

    Holds one connection, opened at the first use and again after it was lost. In a Redis Cluster
    and behind Sentinel it finds the master by itself.

    Args:
        redis: a URL or a ready client, as for `StreamClient`.
        service_name: the service whose consumers shall own the streams.
        partitions: as its consumers have it, see `StreamClient`.

    Raises:
        InvalidOption: for a URL or a name that can't be.
    """

    def __init__(
        self,
        redis: str | redis.asyncio.Redis | redis.asyncio.RedisCluster,
        service_name: str,
        *,
        partitions: int = 1,
    ) -> None:
        names = Names.all_of(service_name, partitions=partitions)
        deployment = deployment_of(redis)
        self._guide = deployment.guide()
        self._topology = deployment.open("producer", self._guide)
        self._links = [self._topology.link(its_names.lbs) for its_names in names]
        self._closed = False
        self._add = [
            Template(b"XADD", its_names.lbs, b"*", INPUT_FIELD, ITEM) for its_names in names
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
        """
        return (await self.announce_many([(data_stream_name, info)]))[0]

    async def announce_many(
        self, streams: Iterable[tuple[str, dict[str, Any] | None]]
    ) -> list[str]:
        """Announces many data streams, `(name, info)` each, in order; returns their ids.

        All are checked before the first is sent. Raises as `announce` does; of several, some may
        have been announced by then.
        """
        if self._closed:
            raise ClientClosed("the producer is closed: make a new one")
        pairs = _pairs(streams)
        values = [message(name, info) for name, info in pairs]
        if len(self._links) == 1:
            return await self._announce(0, values)
        numbers = [partition_of(name, len(self._links)) for name, _ in pairs]
        groups: list[list[bytes]] = [[] for _ in self._links]
        for number, value in zip(numbers, values, strict=True):
            groups[number].append(value)
        announced = await asyncio.gather(
            *map(self._announce, range(len(groups)), groups), return_exceptions=True
        )
        ids = []
        for outcome in announced:  # all have ended: nothing is announced after an error is raised
            if isinstance(outcome, BaseException):
                raise outcome
            ids.append(iter(outcome))
        return [next(ids[number]) for number in numbers]

    async def _announce(self, partition: int, values: list[bytes]) -> list[str]:
        ids: list[str] = []
        for part in chunks(values, BATCH):
            packed = self._add[partition].pack(list(part))
            sending = self._links[partition].pipeline(packed, len(part))
            replies = await (sending if self._guide is None else self._watched(sending))
            ids += [reply.decode() for reply in raise_first(replies)]
        return ids

    async def _watched(self, sending: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        """The replies, unless another master takes over meanwhile.

        A hung one that wakes up would acknowledge what is lost as soon as it is told of that.
        """
        assert self._guide is not None
        task = asyncio.ensure_future(sending)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_EVERY))[0]:
                await self._guide.look()
        finally:
            await end_all([task])
        return task.result()

    async def aclose(self) -> None:
        """Closes the connection."""
        self._closed = True
        await self._topology.close()

    async def __aenter__(self) -> Producer:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _pairs(
    streams: Iterable[tuple[str, dict[str, Any] | None]],
) -> list[tuple[str, dict[str, Any] | None]]:
    """What is to be announced; what an iterator of the caller's raises is passed on as it is."""
    pairs = list(streams) if isinstance(streams, Iterable) else [streams]
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            wanted = "names of data streams with their infos: [(name, info), …]"
            raise InvalidOption("streams", pair, wanted)
    return pairs
