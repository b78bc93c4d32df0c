"""Which server a key is on: what all topologies share, and the single server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from relstream._core import OBJECT
from relstream.net.connection import Connection
from relstream.net.endpoint import Endpoint

if TYPE_CHECKING:
    from relstream.net.protocol import RedisProtocol


class KeyConnection(Protocol):
    """A `Connection` to one server, or to whichever master serves a key."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def alive(self) -> bool: ...
    @property
    def generation(self) -> int: ...
    @property
    def waiting(self) -> list[tuple[Endpoint, RedisProtocol]]: ...
    async def get(self) -> RedisProtocol: ...
    async def pipeline(
        self, packed: bytes, replies: int, *, decode: int = OBJECT, timeout: float | None = None
    ) -> list[Any]: ...
    async def execute(
        self, *args: bytes | str | int, decode: int = OBJECT, timeout: float | None = None
    ) -> Any: ...


class Topology(Protocol):
    """Carries commands to the masters that serve their keys."""

    single: bool
    """One server holds all keys, as far as connections go, and one of these orders all commands."""
    together: bool
    """One command, or script, may have keys of several slots."""

    @property
    def servers(self) -> set[Endpoint | None]:
        """Those that have keys, as `apart` names them."""

    def link(self, key: bytes) -> KeyConnection:
        """For commands on this key."""

    def to(self, node: Endpoint | None) -> Connection:
        """For commands to a server, one of `servers` or another, whatever keys it has."""

    async def each(
        self, packed: Callable[[list[bytes]], bytes], keys: list[bytes], decode: int = OBJECT
    ) -> list[Any]:
        """Sends one command a key, `packed` by the caller; returns the replies in their order.

        Errors are values among them: of keys whose master can't be reached, a transient one.
        """

    def group_by_node(self, keys: list[bytes]) -> dict[Endpoint | None, list[bytes]]:
        """Keys by the servers that have them, as far as is known."""

    async def close(self) -> None:
        """Closes all connections."""


class SingleTopology:
    """One server, or one at a time."""

    single = True
    together = True
    servers: set[Endpoint | None] = {None}  # noqa: RUF012 - nobody adds any

    def __init__(self, link: Connection) -> None:
        self._link = link
        self.close = link.close

    def link(self, key: bytes) -> Connection:
        return self._link

    def to(self, node: Endpoint | None) -> Connection:
        return self._link

    async def each(
        self, packed: Callable[[list[bytes]], bytes], keys: list[bytes], decode: int = OBJECT
    ) -> list[Any]:
        return await self._link.pipeline(packed(keys), len(keys), decode=decode)

    def group_by_node(self, keys: list[bytes]) -> dict[Endpoint | None, list[bytes]]:
        return {None: keys} if keys else {}
