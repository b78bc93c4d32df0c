"""Sends commands to the masters of a Redis Cluster, and follows MOVED and ASK."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from relstream._core import OBJECT, by_owner, commands, key_slot, pack, scatter
from relstream.errors import ConnectionFailed, ConnectionLost, RelstreamError, ReplyError
from relstream.net.cluster.slots import SlotTable
from relstream.net.connection import Connection
from relstream.net.discovery import ASK_NEXT
from relstream.net.endpoint import Endpoint
from relstream.net.replies import raise_first, useless
from relstream.net.topology import KeyConnection

if TYPE_CHECKING:
    from relstream.net.protocol import RedisProtocol

# How often a command follows a redirect before its sender is told, and the pause in between once
# the slots look the same as before, in seconds.
REDIRECTS = 8

REDIRECT_PAUSE = 0.05

# Seconds for which a former master may still answer what it was sent.
LEAVE_TIMEOUT = 0.5


class ClusterTopology:
    """All masters of a Redis Cluster, with a connection to each that is needed."""

    single = False
    together = False

    def __init__(self, endpoint: Endpoint, slots: SlotTable) -> None:
        self.endpoint = endpoint
        self.slots = slots
        slots.join(self)
        self._links: dict[Endpoint, Connection] = {}
        self._keys: dict[bytes, _ClusterConnection] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def servers(self) -> set[Endpoint | None]:
        return {*self.slots.owners} - {None}

    def link(self, key: bytes) -> KeyConnection:
        found = self._keys.get(key)
        if found is None:
            found = self._keys[key] = _ClusterConnection(self, key)
        return found

    def to(self, node: Endpoint | None) -> Connection:
        assert node is not None  # only of a single server
        link = self._links.get(node)
        if link is None:
            if self._closed:
                raise ConnectionLost("the connection was closed")
            named = replace(self.endpoint, host=node.host, port=node.port, path=None)
            link = self._links[node] = Connection(named)
        return link

    @property
    def generation(self) -> int:
        """Another number whenever a connection was opened."""
        return sum(link.generation for link in self._links.values())

    def waiting(self) -> list[tuple[Endpoint, RedisProtocol]]:
        """Connections on which replies are outstanding, and to which nodes."""
        return [
            (node, protocol) for node, link in self._links.items() for _, protocol in link.waiting
        ]

    def leave_all_but(self, masters: list[Endpoint]) -> None:
        """Gives up connections to nodes that are no masters any more."""
        for node in self._links.keys() - set(masters):
            task = asyncio.ensure_future(_leave(self._links.pop(node)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def each(
        self, packed: Callable[[list[bytes]], bytes], keys: list[bytes], decode: int = OBJECT
    ) -> list[Any]:
        return await self._carry(
            len(keys),
            lambda places: by_owner(keys, places, self.slots.owners),
            lambda places: packed([keys[place] for place in places]),
            lambda place: packed([keys[place]]),
            decode,
            apart=True,
        )

    def group_by_node(self, keys: list[bytes]) -> dict[Endpoint | None, list[bytes]]:
        places = by_owner(keys, list(range(len(keys))), self.slots.owners)
        return {owner: [keys[place] for place in some] for owner, some in places}

    async def follow(
        self, slot: int, packed: bytes, replies: int, decode: int, timeout: float | None
    ) -> list[Any]:
        """Sends commands that all belong to one slot, in this order."""
        parts: list[bytes] = []

        def some(places: list[int]) -> bytes:
            if len(places) == replies:
                return packed
            return b"".join(map(parts.__getitem__, places))

        def alone(place: int) -> bytes:
            parts[:] = parts or commands(packed)
            return parts[place]

        return await self._carry(
            replies,
            lambda places: [(self.slots.owners[slot], places)],
            some,
            alone,
            decode,
            timeout,
        )

    async def _carry(
        self,
        count: int,
        by_master: Callable[[list[int]], list[tuple[Endpoint | None, list[int]]]],
        packed: Callable[[list[int]], bytes],
        alone: Callable[[int], bytes],
        decode: int,
        timeout: float | None = None,
        *,
        apart: bool = False,
    ) -> list[Any]:
        """Sends commands, known by their places, to the masters of today; follows redirects.

        A command that was redirected has not been carried out, so none is ever carried out twice.
        `apart`: what other masters answer counts though one can't be reached.
        """
        replies: list[Any] = [None] * count
        places = list(range(count))
        for attempt in range(REDIRECTS if count else 0):
            await self.slots.fresh()
            groups = by_master(places)
            under_way: list[asyncio.Future[list[Any]]] = []
            errors = False
            try:
                for owner, some in groups:
                    under_way.append(
                        self._start(owner, packed(some), len(some), decode, timeout, apart=apart)
                    )
                for (_, some), replied in zip(groups, under_way, strict=True):
                    try:
                        part = await replied
                    except RelstreamError as error:
                        self.slots.doubt()
                        if not apart:
                            raise
                        part = [ReplyError(f"MASTERDOWN {error}") for _ in some]
                    errors = scatter(replies, some, part) or errors
            finally:
                for replied in under_way:
                    replied.cancel()
            if not errors:
                break
            self._leave_former(replies, groups)
            places = await self._redirected(
                replies, groups, alone, decode, timeout, attempt=attempt, apart=apart
            )
            if not places:
                break
        return replies

    def _leave_former(
        self, replies: list[Any], groups: list[tuple[Endpoint | None, list[int]]]
    ) -> None:
        """Closes connections to servers that are no masters any more, though their names may be.

        Their names lead elsewhere by now: they say READONLY, or that what they were asked is to be
        asked at the name by which they were reached.
        """
        for owner, places in groups:
            if owner is not None and any(self._former(replies[place], owner) for place in places):
                self.slots.doubt()
                why = f"{owner} is no master any more, or wants us to sign in again"
                self.to(owner).reopen(ConnectionLost(why))

    def _former(self, reply: Any, owner: Endpoint) -> bool:
        if not isinstance(reply, ReplyError):
            return False
        return useless(reply) or (reply.code == "MOVED" and self._target(reply, owner) == owner)

    def _start(
        self,
        owner: Endpoint | None,
        packed: bytes,
        replies: int,
        decode: int,
        timeout: float | None = None,
        *,
        apart: bool = False,
    ) -> asyncio.Future[list[Any]]:
        """Sends commands; without a task if the connection is open and has room.

        `apart`: others do not wait for a connection that was lost, or could not be opened.
        """
        if owner is None:
            self.slots.doubt()
            unserved: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            unserved.set_result(
                [ReplyError("CLUSTERDOWN Hash slot not served") for _ in range(replies)]
            )
            return unserved
        link = self.to(owner)
        sent = link.send(packed, replies, decode=decode, timeout=timeout)
        if sent is not None:
            return sent
        patience = ASK_NEXT if apart and link.attempted else None
        return asyncio.ensure_future(
            link.pipeline(packed, replies, decode=decode, timeout=timeout, patience=patience)
        )

    async def _redirected(
        self,
        replies: list[Any],
        groups: list[tuple[Endpoint | None, list[int]]],
        alone: Callable[[int], bytes],
        decode: int,
        timeout: float | None,
        *,
        attempt: int,
        apart: bool,
    ) -> list[int]:
        """Answers redirects among the replies: ASK by asking there, MOVED by looking again.

        Returns the places of commands that are to be sent again. `apart`: of those that could not
        be the replies say that.
        """
        moved: list[int] = []
        target: Endpoint | None = None
        importing: dict[Endpoint, list[int]] = {}
        asked_at = [(place, owner) for owner, places in groups for place in places]
        for place, owner in asked_at:
            reply = replies[place]
            if isinstance(reply, ReplyError) and reply.code == "ASK" and owner is not None:
                importer = self._target(reply, owner)
                if importer is not None:
                    importing.setdefault(importer, []).append(place)
                    continue
                replies[place] = ReplyError(
                    f"TRYAGAIN {owner} does not know the name of the node to ask ({reply}): set "
                    "cluster-announce-hostname there"
                )
        for node, some in importing.items():
            self.slots.imports(node)
            try:
                asked = await self._ask_at(
                    node, [alone(place) for place in some], decode, timeout, apart=apart
                )
            except RelstreamError as error:
                self.slots.doubt()
                if not apart:
                    raise
                # Not MASTERDOWN: that of the slot lives.
                asked = [ReplyError(f"TRYAGAIN {error}") for _ in some]
            for place, reply in zip(some, asked, strict=True):
                replies[place] = reply
        for place, owner in asked_at:
            reply = replies[place]
            if isinstance(reply, ReplyError):
                if reply.code == "MOVED" and owner is not None:
                    moved.append(place)
                    target = self._target(reply, owner)
                elif useless(reply) and not attempt:
                    moved.append(place)
                elif reply.transient:  # CLUSTERDOWN, READONLY, …: perhaps a failover
                    self.slots.doubt()
        if moved:
            before = self.slots.owners
            try:
                await self.slots.refresh(target)
            except RelstreamError as error:
                if not apart:
                    raise
                for place in moved:
                    replies[place] = ReplyError(f"MASTERDOWN {error}")
                return []
            if attempt and self.slots.owners == before:
                await asyncio.sleep(REDIRECT_PAUSE * attempt)
        return moved

    async def _ask_at(
        self,
        node: Endpoint,
        commands: list[bytes],
        decode: int,
        timeout: float | None,
        *,
        apart: bool,
    ) -> list[Any]:
        """Carries commands to where their keys have moved already, ahead of their slot."""
        link = self.to(node)
        if timeout is None:
            timeout = link.endpoint.timeout
        protocol = await link.get(ASK_NEXT if apart and link.attempted else None)
        # Two requests each, as what decodes the one reply can't read the other; nothing in between.
        sent: list[asyncio.Future[list[Any]]] = []
        for command in commands:
            sent.append(protocol.send(pack(b"ASKING"), timeout=timeout))
            sent.append(protocol.send(command, decode=decode, timeout=timeout))
        answers = [reply for (reply,) in await asyncio.gather(*sent)]
        return [
            asking if isinstance(asking, ReplyError) else reply
            for asking, reply in zip(answers[::2], answers[1::2], strict=True)
        ]

    def _target(self, redirect: ReplyError, asked: Endpoint) -> Endpoint | None:
        """Where MOVED and ASK point (`MOVED 3999 127.0.0.1:6381`), as the node `asked` says it.

        None where it does not know the name of that node (`MOVED 3999 ?:6381`).
        """
        host, _, port = redirect.message.split(" ")[2].rpartition(":")
        if host == "?":
            named = [node for node in self.slots.nodes if node.port == int(port)]
            return named[0] if len(named) == 1 else None
        # Without a host: all are behind the name by which one was asked.
        return self.slots.at(host or asked.host, int(port))

    async def close(self) -> None:
        self._closed = True
        links = list(self._links.values())
        await asyncio.gather(*(link.close() for link in links), *self._leaving, self.slots.close())


async def _leave(link: Connection) -> None:
    """Closes it, once what was sent is answered; a server that hangs is not waited for long."""
    for _, protocol in link.waiting:
        if protocol.last is not None:
            await asyncio.wait({protocol.last}, timeout=LEAVE_TIMEOUT)
    await link.close()


class _ClusterConnection:
    """To whichever master serves a key."""

    def __init__(self, cluster: ClusterTopology, key: bytes) -> None:
        self._cluster = cluster
        self._slot = key_slot(key)
        self.endpoint = cluster.endpoint

    @property
    def alive(self) -> bool:
        owner = self._cluster.slots.owners[self._slot]
        return owner is not None and self._cluster.to(owner).alive

    @property
    def generation(self) -> int:
        return self._cluster.generation

    @property
    def waiting(self) -> list[tuple[Endpoint, RedisProtocol]]:
        """Connections of this topology on which replies are outstanding, wherever it was sent."""
        return self._cluster.waiting()

    async def get(self) -> RedisProtocol:
        await self._cluster.slots.fresh()
        owner = self._cluster.slots.owners[self._slot]
        if owner is None:
            self._cluster.slots.doubt()
            raise ReplyError("CLUSTERDOWN Hash slot not served")
        try:
            return await self._cluster.to(owner).get()
        except ConnectionFailed:
            self._cluster.slots.doubt()
            raise

    async def pipeline(
        self, packed: bytes, replies: int, *, decode: int = OBJECT, timeout: float | None = None
    ) -> list[Any]:
        return await self._cluster.follow(self._slot, packed, replies, decode, timeout)

    async def execute(
        self, *args: bytes | str | int, decode: int = OBJECT, timeout: float | None = None
    ) -> Any:
        replies = await self.pipeline(pack(*args), 1, decode=decode, timeout=timeout)
        return raise_first(replies)[0]
