"""The slot map of a Redis Cluster: which master serves which slot (CLUSTER SLOTS)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
import weakref
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Protocol

from relstream._core import jittered
from relstream.errors import (
    ClusterNotSettled,
    ConnectionFailed,
    ConnectionLost,
    PermissionDenied,
    ProtocolError,
    RelstreamError,
    ReplyError,
)
from relstream.net.discovery import first_reply, query
from relstream.net.endpoint import Endpoint, Remap
from relstream.tasks import cancel_and_wait, consume_exception

SLOTS = 16384

# Seconds for which a node without slots is taken for a master after it was seen to import one.
IMPORTING = 60.0


@dataclass
class _View:
    """What one node says of the cluster."""

    owners: list[Endpoint | None] = field(default_factory=lambda: [None] * SLOTS)
    masters: list[Endpoint] = field(default_factory=list)
    replicas: list[Endpoint] = field(default_factory=list)


class Follower(Protocol):
    """Has connections to masters."""

    def leave_all_but(self, masters: list[Endpoint]) -> None:
        """Closes connections to all other servers."""


class SlotTable:
    """Which master serves which slot. Belongs to one event loop."""

    def __init__(
        self, common: Endpoint, seeds: tuple[Endpoint, ...], remap: Remap | None = None
    ) -> None:
        self._common = common
        self._seeds = seeds
        self._remap = remap
        self._view = _View()
        self._nodes: dict[tuple[str, int], Endpoint] = {}
        # Each node by its id, with all hosts under which it was named: some may name it otherwise.
        self._ids: dict[bytes, tuple[Endpoint, set[str]]] = {}
        # Masters to which slots are on their way, and when that was last seen (monotonic time).
        self._importing: dict[Endpoint, float] = {}
        self._topologies: weakref.WeakSet[Follower] = weakref.WeakSet()
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

    def join(self, topology: Follower) -> None:
        """Registers a topology that has to leave servers that are not masters any more."""
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
