"""Which master serves a key: the only server there is, the one Sentinel names, or one of a cluster.

A `Topology` hands out links to keys, and carries commands to where their keys are. In a cluster it
follows redirects, and looks at the slots again whenever a node or a connection gives it a reason.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

from relstream._core import OBJECT, by_owner, commands, jittered, key_slot, pack, scatter
from relstream.errors import (
    ClusterNotSettled,
    ConnectionFailed,
    ConnectionLost,
    PermissionDenied,
    ProtocolError,
    RelstreamError,
    ReplyError,
)
from relstream.net.connection import (
    Connection,
    Endpoint,
    SharedAddress,
    consume_exception,
    raise_first,
    useless,
)
from relstream.net.discovery import ASK_NEXT, POLL_EVERY, first_reply, query
from relstream.net.sentinel import SentinelMaster
from relstream.tasks import cancel_and_wait, within

if TYPE_CHECKING:
    from relstream.net.deployment import Deployment
    from relstream.net.protocol import RedisProtocol

SLOTS = 16384
# How often a command follows a redirect before its sender is told, and the pause in between once
# the slots look the same as before, in seconds.
REDIRECTS = 8
REDIRECT_PAUSE = 0.05
# Seconds for which a former master may still answer what it was sent.
LEAVE_TIMEOUT = 0.5
# Seconds for which a node without slots is taken for a master after it was seen to import one.
IMPORTING = 60.0


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


@dataclass
class _View:
    """What one node says of the cluster."""

    owners: list[Endpoint | None] = field(default_factory=lambda: [None] * SLOTS)
    masters: list[Endpoint] = field(default_factory=list)
    replicas: list[Endpoint] = field(default_factory=list)


class SlotTable:
    """Which master serves which slot. Belongs to one event loop."""

    def __init__(self, deployment: Deployment) -> None:
        self._common = deployment.endpoint
        self._seeds = deployment.nodes
        self._remap = deployment.remap
        self._view = _View()
        self._nodes: dict[tuple[str, int], Endpoint] = {}
        # Each node by its id, with all hosts under which it was named: some may name it otherwise.
        self._ids: dict[bytes, tuple[Endpoint, set[str]]] = {}
        # Masters to which slots are on their way, and when that was last seen (monotonic time).
        self._importing: dict[Endpoint, float] = {}
        self._topologies: weakref.WeakSet[ClusterTopology] = weakref.WeakSet()
        self._refreshing: asyncio.Task[None] | None = None
        self._closed = False
        self.stale = True
        """Whether something went wrong since."""
        self.noticed = asyncio.Event()
        """Set whenever there is something to notice: a doubt, or other masters than before."""
        self.replaced = asyncio.Event()
        """Set when there are other masters than before."""

    @property
    def owners(self) -> list[Endpoint | None]:
        """The master of each slot; None where nobody serves it."""
        return self._view.owners

    @property
    def masters(self) -> list[Endpoint]:
        """All masters that serve slots, or soon will."""
        return [*self._view.masters, *self._importing]

    @property
    def nodes(self) -> list[Endpoint]:
        """All nodes that are known: masters, then replicas."""
        return [*self.masters, *self._view.replicas]

    def join(self, topology: ClusterTopology) -> None:
        """This one is to leave servers that are no masters any more."""
        self._topologies.add(topology)

    def imports(self, node: Endpoint) -> None:
        """A slot is on its way to this node, which may be a master that has none yet."""
        if node in self._view.masters:
            return
        if node not in self._importing:
            self.noticed.set()
        self._importing[node] = time.monotonic()

    def doubt(self) -> None:
        """Something went wrong that other masters would explain."""
        self.stale = True
        self.noticed.set()

    def _see(self, view: _View) -> None:
        before = self.masters
        self._view = view
        self._importing = {
            node: seen
            for node, seen in self._importing.items()
            if node not in view.masters and time.monotonic() - seen < IMPORTING
        }
        self.stale = False
        known = {id(node) for node in self.nodes}
        self._ids = {key: node for key, node in self._ids.items() if id(node[0]) in known}
        self._nodes = {at: node for at, node in self._nodes.items() if id(node) in known}
        if self.masters != before:
            self.noticed.set()
            self.replaced.set()
            for topology in list(self._topologies):
                topology.leave_all_but(self.masters)

    async def fresh(self) -> None:
        """Looks at the slots again if there is a reason to."""
        if self.stale:
            await self.refresh()

    async def refresh(self, first: Endpoint | None = None) -> None:
        """Asks nodes, beginning with `first`, until one tells (CLUSTER SLOTS).

        Callers that come meanwhile share the answer. Raises `ConnectionFailed` if none does.
        """
        if self._closed:
            raise ConnectionLost("the connection was closed")
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refresh(first))
            self._refreshing.add_done_callback(consume_exception)
        refreshing = self._refreshing
        await asyncio.wait({refreshing})  # whoever stops waiting does not stop the others'
        if refreshing.cancelled():
            raise ConnectionLost("the connection was closed")
        refreshing.result()

    async def run(self, every: float) -> None:
        """Looks at the slots every so many seconds, until cancelled.

        A master that hangs gives no other reason to, though the rest have replaced it.
        """
        while True:
            await asyncio.sleep(jittered(every, 0.2, random.random()))
            await self.look()

    async def look(self) -> None:
        """Looks at the slots, if a node can be asked."""
        with contextlib.suppress(RelstreamError):  # what is sent finds that out, too
            await self.refresh()

    async def close(self) -> None:
        """Ends what is under way; whoever waits for it gets `ConnectionLost`."""
        self._closed = True
        if self._refreshing is not None:
            await cancel_and_wait([self._refreshing])

    async def _refresh(self, first: Endpoint | None) -> None:
        self._see(
            await first_reply(
                self._candidates(first), self._ask, "no node of the cluster tells its slots"
            )
        )

    def _candidates(self, first: Endpoint | None) -> list[Endpoint]:
        masters = self.masters
        random.shuffle(masters)
        known = ([] if first is None else [first]) + masters + self._view.replicas
        seeds = random.sample(self._seeds, len(self._seeds))
        return list(dict.fromkeys([*known, *map(self._node, seeds)]))

    def _node(self, at: Endpoint) -> Endpoint:
        return replace(self._common, host=at.host, port=at.port, path=at.path)

    def at(self, host: str, port: int) -> Endpoint:
        """A node of this cluster, by the address that others give: always the same object, as
        slots are many.
        """
        given = host, port
        node = self._nodes.get(given)
        if node is None:
            host, port = self._remap(given) if self._remap else given
            node = self._nodes[given] = replace(self._common, host=host, port=port, path=None)
        return node

    async def _ask(self, node: Endpoint) -> _View:
        view = _View()
        try:
            ranges = await query(node.named("slots"), b"CLUSTER", b"SLOTS")
        except ReplyError as error:
            if error.code == "NOPERM":
                raise PermissionDenied(f"{node}: {error}: grant +cluster|slots") from None
            raise
        try:
            self._read(view, ranges, node)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ProtocolError(f"{node} answers CLUSTER SLOTS with {ranges!r:.100}") from error
        if not view.masters:  # one that has left the cluster, or never was in it
            raise ConnectionFailed(f"{node} knows nobody who serves slots")
        view.masters = list(dict.fromkeys(view.masters))
        view.replicas = list(dict.fromkeys(view.replicas))
        return view

    def _read(self, view: _View, ranges: list[Any], node: Endpoint) -> None:
        for start, end, master, *replicas in sorted(ranges, key=itemgetter(0)):
            if not 0 <= start <= end < SLOTS:
                raise ProtocolError(f"{node} tells of slots {start} to {end}, of {SLOTS}")
            owner = self._address(master, node)
            view.owners[start : end + 1] = [owner] * (end + 1 - start)
            view.masters.append(owner)
            view.replicas += [self._address(replica, node) for replica in replicas]

    def _address(self, row: list[Any], asked: Endpoint) -> Endpoint:
        """Where a node is: always the same object, however it is called by whoever was asked.

        https://redis.io/docs/latest/commands/cluster-slots/
        """
        said, port = row[0], int(row[1])
        node_id = row[2] if len(row) > 2 else b""
        others = _hosts(row[3]) if len(row) > 3 else []
        if said == b"?":  # it has a name that nobody knows yet
            if not others:
                raise ProtocolError(
                    f"{asked} names a node '?' and no address: set cluster-announce-hostname on it"
                )
            hosts = others
        elif said:
            hosts = [said.decode(), *others]
        else:  # all are behind the name by which one was asked
            hosts = [asked.host, *(seed.host for seed in self._seeds)]
        node, names = self._ids.get(node_id, (None, set()))
        if node is None or names.isdisjoint(hosts) or (self._port(node) != port):
            node, names = self.at(hosts[0], port), set()
        if node_id:
            self._ids[node_id] = node, names.union(hosts)
        if said:
            for host in hosts:
                self._nodes[host, port] = node
        return node

    def _port(self, node: Endpoint) -> int:
        """By which others call it."""
        return next((at[1] for at, known in self._nodes.items() if known is node), node.port)

    async def compare_nodes(self) -> None:
        """Looks at the slots as all nodes see them; raises `ClusterNotSettled` if they differ."""
        if not self._view.masters:
            await self.refresh()
        nodes = self.nodes
        answers = await asyncio.gather(*map(self._state, nodes), return_exceptions=True)
        views = []
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, ConnectionFailed):
                continue  # it may be the one that failed: the others have agreed on that
            if isinstance(answer, ReplyError) and answer.transient:
                raise ClusterNotSettled(f"{node} says {answer}")
            if isinstance(answer, BaseException):
                raise answer
            state, view = answer
            if state != b"ok":
                raise ClusterNotSettled(f"{node} says cluster_state:{state.decode()}")
            views.append((node, view))
        if not views:
            raise ConnectionFailed("no node of the cluster can be reached")
        first, agreed = views[0]
        for node, view in views[1:]:
            if view.owners != agreed.owners:
                raise ClusterNotSettled(f"{first} and {node} do not agree on who serves the slots")
        self._see(agreed)

    async def _state(self, node: Endpoint) -> tuple[bytes, _View]:
        info = await query(node.named("slots"), b"CLUSTER", b"INFO")
        found = re.search(rb"cluster_state:(\w+)", info)
        return found[1] if found else b"unknown", await self._ask(node)


def _hosts(metadata: Any) -> list[str]:
    """Other hosts by which CLUSTER SLOTS calls a node: its address, or its name."""
    if not isinstance(metadata, dict):
        metadata = dict(zip(metadata[::2], metadata[1::2], strict=True))
    found = [metadata.get(b"hostname"), metadata.get(b"ip")]
    return [host.decode() for host in found if host]


# What knows where masters are.
MasterResolver = SlotTable | SentinelMaster | SharedAddress | None


async def unless_replaced(
    sending: Coroutine[Any, Any, list[Any]], guide: MasterResolver
) -> list[Any]:
    """The replies; raises `ConnectionLost` where another master took over meanwhile.

    A hung one that wakes up acknowledges what is lost as soon as it is told of that. Of one that
    wakes up just then it may not be known yet that another took over.
    """
    if guide is None or isinstance(guide, SharedAddress):  # nobody tells
        return await sending
    before = set(guide.masters)
    task = asyncio.ensure_future(sending)
    tasks: list[asyncio.Task[Any]] = [task]
    try:
        if not (await asyncio.wait(tasks, timeout=POLL_EVERY))[0]:
            tasks.append(asyncio.ensure_future(_look_for_ever(guide)))
            for ended in (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]:
                ended.result()
            await within(POLL_EVERY, guide.look())
            if not before <= set(guide.masters):
                raise ConnectionLost("another master took over before this one answered")
    finally:
        await cancel_and_wait(tasks)
    return task.result()


async def _look_for_ever(guide: SlotTable | SentinelMaster) -> None:
    while True:
        await guide.look()
        await asyncio.sleep(POLL_EVERY)


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
