"""A private Redis Cluster."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import redis
from redis.crc import key_slot

from relstream.testing.node import Node, empty, replication, settles, start_all, stop_all, wait
from relstream.testing.server import START_TIMEOUT, Binary, TLSFiles, find_binary

SLOTS = 16384


@dataclass(frozen=True)
class _Peer:
    """One line of CLUSTER NODES."""

    id: str
    flags: frozenset[str]
    master: str  # its id, or `-`
    epoch: int
    connected: bool
    slots: tuple[str, ...]  # ranges, and slots on the move

    @classmethod
    def parse(cls, line: str) -> _Peer:
        node_id, _, flags, master, _, _, epoch, state, *slots = line.split(" ")
        return cls(
            *(node_id, frozenset(flags.split(",")), master, int(epoch), state == "connected"),
            tuple(slots),
        )

    @property
    def owns(self) -> set[int]:
        ranges = (slots.split("-") for slots in self.slots if not slots.startswith("["))
        return {slot for ends in ranges for slot in range(int(ends[0]), int(ends[-1]) + 1)}


def _view(node: Node) -> dict[str, _Peer]:
    """What the node knows of all nodes, itself the first."""
    peers = [_Peer.parse(line) for line in node.call("CLUSTER", "NODES").splitlines()]
    peers.sort(key=lambda peer: "myself" not in peer.flags)
    return {peer.id: peer for peer in peers}


def _itself(node: Node) -> _Peer:
    return next(iter(_view(node).values()))


class Cluster:
    """Masters that share the slots evenly, each with its replicas.

    `binary`: a Binary, or what `find_binary` takes. `tls`: listen on TLS ports only, and speak TLS
    among each other. `password`: of the default user. `config`: directives for every node.
    `node_timeout`, in seconds: an unreachable master is replaced one to two seconds after it.

    Raises ServerNotFound. Not thread-safe.
    """

    def __init__(
        self,
        *,
        masters: int = 3,
        replicas: int = 1,
        binary: Binary | str | None = None,
        tls: TLSFiles | None = None,
        password: str | None = None,
        node_timeout: float = 1.5,
        config: Mapping[str, str | int] | None = None,
    ) -> None:
        self.binary = binary if isinstance(binary, Binary) else find_binary(binary)
        self._masters = masters
        self._tls = tls
        self._password = password
        self._config = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": round(node_timeout * 1000),
            # However long a replica was cut off from its master: there is no other.
            "cluster-replica-validity-factor": 0,
            **replication(tls, password),
            **({} if tls is None else {"tls-cluster": "yes"}),
            **(config or {}),
        }
        self._original = [self._make() for _ in range(masters * (1 + replicas))]
        self._added: list[Node] = []
        self._removed: list[Node] = []

    @property
    def nodes(self) -> list[Node]:
        """All, the dead ones too: at first the masters, then their replicas in the same order."""
        return [n for n in self._original if n not in self._removed] + self._added

    @property
    def url(self) -> str:
        """Of the first node that lives. Raises RuntimeError when there is none."""
        return self._any().url

    def masters(self) -> list[Node]:
        """Those living that believe themselves to be one, with slots or without."""
        return [node for node in self._living() if node.role == "master"]

    def replicas(self, of: Node | None = None) -> list[Node]:
        """Those living that believe themselves to be one; `of`: of this master only."""
        found = [node for node in self._living() if node.role == "slave"]
        if of is None:
            return found
        return [node for node in found if _itself(node).master == self.id_of(of)]

    def master_of(self, key: str | bytes | int) -> Node:
        """The living master that serves a key, or a slot. Raises LookupError."""
        slot = key if isinstance(key, int) else self.slot_of(key)
        believers = {
            node: peer
            for node in self.masters()
            if slot in (peer := _itself(node)).owns  # an old one may not yet know that it isn't
        }
        if not believers:
            raise LookupError(f"no living master serves slot {slot}")
        return max(believers, key=lambda node: believers[node].epoch)

    @staticmethod
    def slots_of(node: Node) -> set[int]:
        """Those that a living node believes to serve."""
        return _itself(node).owns

    @staticmethod
    def slot_of(key: str | bytes) -> int:
        slot: int = key_slot(key.encode() if isinstance(key, str) else key)
        return slot

    @staticmethod
    def id_of(node: Node) -> str:
        """The name by which the cluster knows a living node."""
        name: str = node.call("CLUSTER", "MYID")
        return name

    def start(self) -> None:
        """Return when all nodes serve. Raises ServerStartFailed, TimeoutError."""
        try:
            start_all(self._original)
            self._form()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGKILL to all, then remove their files."""
        stop_all([*self._original, *self._added])
        self._added.clear()
        self._removed.clear()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_ok(self, timeout: float = START_TIMEOUT) -> None:
        """Until all slots are served by living masters, and all living nodes say and know it.

        Their replicas are in step, too. Raises TimeoutError, saying what is wrong.
        """
        wait(self._trouble, timeout)

    def failover(self, replica: Node, timeout: float = START_TIMEOUT) -> None:
        """A graceful one: the replica and its master change places. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while replica.role != "master":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{replica} did not become a master within {timeout:g} s")
            replica.call("CLUSTER", "FAILOVER")
            with contextlib.suppress(TimeoutError):  # the server gives up after 5 s, silently
                wait(lambda: "" if replica.role == "master" else "still a replica", 6)
            # One that was elected a few seconds ago counts its old votes (Redis 7.0), and must give
            # way: then again.
            self.wait_ok(timeout)

    def add_master(self) -> Node:
        """One that serves no slots yet."""
        node = self._make()
        self._added.append(node)
        node.start()
        self._meet(node, [other for other in self._living() if other is not node])
        self.wait_ok()
        return node

    def remove(self, node: Node) -> None:
        """End a node that serves no slots, and make the others forget it."""
        peer = _itself(node)
        if peer.owns:
            raise ValueError("its slots must be moved to another node first")
        others = [other for other in self._living() if other is not node]
        node.kill()
        for other in others:
            other.call("CLUSTER", "FORGET", peer.id)
        if node in self._added:
            self._added.remove(node)
            node.stop()
        else:
            self._removed.append(node)
        self.wait_ok()

    def move_slots(self, slots: Iterable[int], source: Node, target: Node) -> None:
        """Hand slots over with their keys. Without any left, the source becomes a replica."""
        for slot in slots:
            self.start_move(slot, source, target)
            self.finish_move(slot, source, target)
        self.wait_ok()

    def start_move(self, slot: int, source: Node, target: Node) -> None:
        """From now on the source answers ASK for keys it doesn't have."""
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))

    def finish_move(self, slot: int, source: Node, target: Node) -> None:
        """Move the slot's keys and tell all masters. Return before their replicas know.

        But not before the masters know each other's epochs: news of the slot's last move that
        overtakes its next one can leave it with two masters that point at each other.
        """
        auth = () if self._password is None else ("AUTH", self._password)
        while keys := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.call("MIGRATE", *target.address, "", 0, 5000, *auth, "KEYS", *keys)
        owner = self.id_of(target)
        target.call("CLUSTER", "SETSLOT", slot, "NODE", owner)
        for node in self.masters():
            try:
                node.call("CLUSTER", "SETSLOT", slot, "NODE", owner)
            except redis.ResponseError as error:  # the source, just become a replica
                if "only with masters" not in str(error):
                    raise
        wait(self._epochs_unknown, START_TIMEOUT)

    def _epochs_unknown(self) -> str:
        masters = self.masters()
        views = [_view(master) for master in masters]
        ids = [self.id_of(master) for master in masters]
        told = [[view[i].epoch for i in ids if i in view] for view in views]
        if len(set(told[0])) < len(ids) or any(epochs != told[0] for epochs in told):
            return f"the masters have not agreed on their epochs: {told}"
        return ""

    def restore(self) -> None:
        """The original layout, all nodes living, and no data.

        Quick if nothing is changed. Else nodes get new ids, and keep their addresses.
        """
        if self._is_original():
            for node in self._original[: self._masters]:
                empty(node, len(self._original) // self._masters - 1)
            return
        stop_all(self._added)
        self._added.clear()
        self._removed.clear()
        for node in self._original:
            if node._running():
                node.resume()
        start_all(self._original)
        for node in self._original:
            wait(functools.partial(self._reset, node), START_TIMEOUT)
        self._form()

    def _make(self) -> Node:
        return Node(binary=self.binary, tls=self._tls, password=self._password, config=self._config)

    def _living(self) -> list[Node]:
        return [node for node in self.nodes if node.living]

    def _any(self) -> Node:
        node = next(iter(self._living()), None)
        if node is None:
            raise RuntimeError("no node is running")
        return node

    def _ranges(self) -> list[range]:
        bounds = [round(i * SLOTS / self._masters) for i in range(self._masters + 1)]
        return [range(*ends) for ends in itertools.pairwise(bounds)]

    def _form(self) -> None:
        """Of nodes that know neither slots nor each other."""
        masters, replicas = self._original[: self._masters], self._original[self._masters :]
        for epoch, node in enumerate(self._original, 1):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", epoch)  # no two alike: nothing to resolve
        for node, slots in zip(masters, self._ranges(), strict=True):
            node.call("CLUSTER", "ADDSLOTS", *slots)
        for i, node in enumerate(self._original):
            self._meet(node, self._original[:i])
        wait(self._strangers, START_TIMEOUT)
        for node, master in zip(replicas, itertools.cycle(masters), strict=False):
            node.call("CLUSTER", "REPLICATE", self.id_of(master))
        self.wait_ok()

    @staticmethod
    def _meet(node: Node, others: Iterable[Node]) -> None:
        for other in others:  # all of them: hearsay takes seconds
            node.call("CLUSTER", "MEET", *other.address)

    def _strangers(self) -> str:
        living = self._living()
        ids = {self.id_of(node) for node in living}
        for node in living:
            known = {peer.id for peer in _view(node).values() if "handshake" not in peer.flags}
            if ids - known:
                return f"{node} knows {len(ids & known)} of {len(ids)}"
        return ""

    def _trouble(self) -> str:
        living = self._living()
        views = {node: _view(node) for node in living}
        ids = {next(iter(view)) for view in views.values()}
        beliefs = []
        for node, view in views.items():
            if "cluster_state:ok" not in node.call("CLUSTER", "INFO"):
                return f"{node} says that the cluster is not ok"
            if not ids <= view.keys():
                return f"{node} does not know all others"
            for peer in view.values():
                if peer.id in ids and (
                    not peer.connected or peer.flags & {"fail", "fail?", "handshake"}
                ):
                    return f"{node} does not reach all others"
                if peer.id not in ids and peer.owns:
                    return f"{node} has slots served by one that does not live"
            if "slave" in view[next(iter(view))].flags:
                link = node.call("INFO", "replication")
                if link["master_link_status"] != "up":
                    return f"{node} is not in step with its master"
            beliefs.append({i: (view[i].master, view[i].owns) for i in ids})
        if any(belief != beliefs[0] for belief in beliefs):
            return "they disagree about who serves what"
        return "" if beliefs else "no node is living"

    def _is_original(self) -> bool:
        if self._added or self._removed or not all(node.living for node in self._original):
            return False
        peers = [_itself(node) for node in self._original]
        masters, replicas = peers[: self._masters], peers[self._masters :]
        expected = [(f"{slots[0]}-{slots[-1]}",) for slots in self._ranges()]
        return (
            [peer.slots for peer in masters] == expected
            and all(a.master == b.id for a, b in zip(replicas, itertools.cycle(masters)))
            and settles(self._trouble)
        )

    @staticmethod
    def _reset(node: Node) -> str:
        with contextlib.suppress(redis.ReadOnlyError):  # a replica is emptied by the reset
            node.call("FLUSHALL")
        node.call("CLUSTER", "RESET", "HARD")
        return ""
