"""What `Producer`, `DeadLetters` and `Delayed` share: the connection, closing, event loop."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from relstream._core import OBJECT, pack
from relstream.errors import ClientClosed
from relstream.net.deployment import deployment_of
from relstream.net.failover import unless_replaced
from relstream.net.replies import raise_first
from relstream.tasks import OneLoop

if TYPE_CHECKING:
    import redis.asyncio

    from relstream.lbs.names import Names

_Client = TypeVar("_Client", bound="BaseClient")


class BaseClient:
    """Sends commands for one service. Belongs to the event loop that it is first used in.

    Args:
        redis: a URL or a ready client, as for `StreamClient`.
        partitions: the keys of each partition of the service.

    Raises:
        InvalidOption: for a URL that can't be.
    """

    _role: ClassVar[str]
    """What CLIENT LIST shows as the name of the connection, behind `relstream:`."""

    def __init__(
        self,
        redis: str | redis.asyncio.Redis | redis.asyncio.RedisCluster,
        partitions: tuple[Names, ...],
    ) -> None:
        self._partitions = partitions
        deployment = deployment_of(redis)
        self._guide = deployment.guide()
        self._topology = deployment.open(self._role, self._guide)
        self._closed = False
        self._loop = OneLoop(f"this {type(self).__name__} was")

    def _check_usable(self) -> None:
        """Raises `ClientClosed`, or `UsageError` in another event loop or process."""
        self._loop.check_process()
        if self._closed:
            raise ClientClosed(f"this {type(self).__name__} is closed: make a new one")
        self._loop.check()

    async def _execute(
        self, command: bytes, key: bytes, *args: bytes | int, decode: int = OBJECT
    ) -> Any:
        """The reply to one command on this key; raises an error reply."""
        packed = pack(command, key, *args)
        return raise_first(await self._pipeline(key, packed, 1, decode))[0]

    async def _pipeline(
        self, key: bytes, packed: bytes, replies: int, decode: int = OBJECT
    ) -> list[Any]:
        """The replies to packed commands for the master of this key, errors as values."""
        self._check_usable()
        sending = self._topology.link(key).pipeline(packed, replies, decode=decode)
        return await unless_replaced(sending, self._guide)

    async def aclose(self) -> None:
        """Closes the connection. Raises `UsageError` in another event loop or process."""
        self._loop.check()
        self._closed = True
        await self._topology.close()

    async def __aenter__(self: _Client) -> _Client:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._loop.forked and exc_type is not None:
            return  # it is the parent's: let the exception pass
        await self.aclose()
