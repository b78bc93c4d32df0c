"""Several private servers that belong together: a cluster, or a master watched by Sentinels.

    with Cluster() as cluster:
        print(cluster.url)  # redis://127.0.0.1:PORT/0, one node's
        cluster.master_of("key").kill()
        cluster.wait_ok()  # its replica was promoted

    with Sentinels() as sentinels:
        print(sentinels.url)  # redis+sentinel://HOST:PORT,HOST:PORT,HOST:PORT/SERVICE/0

Each server is a `relstream.server.Server`, on the loopback interface and ending with this process.
Break them at will: `restore` puts them back. POSIX only.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from relstream.server import START_TIMEOUT, Binary, Server, TLSFiles, find_binary

__all__ = ["Cluster", "Node", "Sentinels"]

SLOTS = 16384
ANSWER_TIMEOUT = 5.0  # seconds for an answer from a node that is not known to be paused

# A cluster's nodes talk to each other on their port + 10000. Both are chosen below the ports that
# the system hands out by itself, so that a node that was killed gets its own back.
_PORTS = range(10_000, 22_000)
_BUS = 10_000
_PORT_TRIES = 100
_PASSES = (ConnectionError, redis.RedisError, RuntimeError)  # a node is just dying, or loading


class Node(Server):
    """One server of several.

    Commands reach it through its unix socket, whatever happens to its port.
    """

    def __init__(self, *, password: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._password = password
        self._paused = False
        self._client: redis.Redis | None = None

    @property
    def living(self) -> bool:
        """It runs and is not paused."""
        return self._running() and not self._paused

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def role(self) -> str:
        """`master` or `slave`, as it believes."""
        role: str = self.call("ROLE")[0]
        return role

    @property
    def client(self) -> redis.Redis:
        """Over the unix socket; bytes that are no UTF-8 come and go as surrogates."""
        if self._directory is None:
            raise RuntimeError("the server was not started")
        if self._client is None:
            self._client = redis.Redis(
                unix_socket_path=str(self._socket(self._directory)),
                password=self._password,
                protocol=2,
                decode_responses=True,
                encoding_errors="surrogateescape",
                socket_timeout=ANSWER_TIMEOUT,
                # Should a test have killed this connection, too.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
        return self._client

    def call(self, *command: str | int) -> Any:
        """One command's reply. Raises what redis-py does."""
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        """SIGSTOP: connections stay, and nothing is answered until `resume`."""
        super().pause()
        self._paused = True

    def resume(self) -> None:
        """SIGCONT."""
        super().resume()
        self._paused = False

    def _end(self, by: Any) -> None:
        super()._end(by)
        self._paused = False
        if self._client is not None:
            self._client.close()
            self._client = None

    @staticmethod
    def _free_port() -> int:
        for port in random.sample(_PORTS, _PORT_TRIES):
            if _is_free(port) and _is_free(port + _BUS):
                return port
        raise RuntimeError("no free port found")

    def __repr__(self) -> str:
        return f"<Node {self.port}{'' if self.living else ' not'} living>"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do it
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait(trouble: Callable[[], str], timeout: float) -> None:
    """Return when there is no trouble. Raises TimeoutError with the last one."""
    deadline = time.monotonic() + timeout
    while reason := _told(trouble):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {reason}")
        time.sleep(0.02)


def _told(trouble: Callable[[], str]) -> str:
    try:
        return trouble()
    except _PASSES as error:
        return repr(error)


def _settles(trouble: Callable[[], str]) -> bool:
    """On a busy machine nodes may believe, for a moment, that others are dead."""
    try:
        _wait(trouble, 3)
    except TimeoutError:
        return False
    return True


def _start(nodes: Iterable[Node]) -> None:
    """At the same time; those that are running stay as they are."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(Node.start, nodes))


def _stop(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.kill()  # they persist nothing, and must not wait for their replicas
        node.stop()


def _empty(master: Node, replicas: int) -> None:
    master.call("FLUSHALL")
    master.call("WAIT", replicas, round(ANSWER_TIMEOUT * 500))


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
            **_replication(tls, password),
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
            _start(self._original)
            self._form()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGKILL to all, then remove their files."""
        _stop([*self._original, *self._added])
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
        _wait(self._trouble, timeout)

    def failover(self, replica: Node, timeout: float = START_TIMEOUT) -> None:
        """A graceful one: the replica and its master change places. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while replica.role != "master":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{replica} did not become a master within {timeout:g} s")
            replica.call("CLUSTER", "FAILOVER")
            with contextlib.suppress(TimeoutError):  # the server gives up after 5 s, silently
                _wait(lambda: "" if replica.role == "master" else "still a replica", 6)
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
        _wait(self._epochs_unknown, START_TIMEOUT)

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
                _empty(node, len(self._original) // self._masters - 1)
            return
        _stop(self._added)
        self._added.clear()
        self._removed.clear()
        for node in self._original:
            if node._running():
                node.resume()
        _start(self._original)
        for node in self._original:
            _wait(lambda node=node: self._reset(node), START_TIMEOUT)  # type: ignore[misc]
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
        _wait(self._strangers, START_TIMEOUT)
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
            and _settles(self._trouble)
        )

    @staticmethod
    def _reset(node: Node) -> str:
        with contextlib.suppress(redis.ReadOnlyError):  # a replica is emptied by the reset
            node.call("FLUSHALL")
        node.call("CLUSTER", "RESET", "HARD")
        return ""


class Sentinels:
    """A master with two replicas, and three Sentinels of which two must agree.

    `binary`: a Binary, or what `find_binary` takes. `tls`: all listen on TLS ports only.
    `password`: of the default user of the master and its replicas; Sentinels ask for none.
    `config`: directives for the master and its replicas. `down_after`, in seconds: an unreachable
    master is replaced one to three seconds after it.

    Raises ServerNotFound. Not thread-safe.
    """

    service_name = "relstream"
    _quorum = 2

    def __init__(
        self,
        *,
        binary: Binary | str | None = None,
        tls: TLSFiles | None = None,
        password: str | None = None,
        down_after: float = 1.0,
        config: Mapping[str, str | int] | None = None,
    ) -> None:
        self.binary = binary if isinstance(binary, Binary) else find_binary(binary)
        self._password = password
        self._settings: dict[str, str | int] = {
            "down-after-milliseconds": round(down_after * 1000),
            "failover-timeout": 3000,  # twice this, and a failed one is tried again
            **({} if password is None else {"auth-pass": password}),
        }
        replication = _replication(tls, password) | dict(config or {})
        self.nodes = [
            Node(binary=self.binary, tls=tls, password=password, config=replication)
            for _ in range(3)
        ]
        """The master and its replicas: at first the master is the first."""
        self.sentinels = [
            _Sentinel(
                binary=self.binary,
                tls=tls,
                config={} if tls is None else {"tls-replication": "yes"},
            )
            for _ in range(3)
        ]

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Of the Sentinels."""
        return [sentinel.address for sentinel in self.sentinels]

    @property
    def url(self) -> str:
        """`redis+sentinel://HOST:PORT,HOST:PORT,HOST:PORT/SERVICE/0`."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.addresses)
        return f"redis+sentinel://{hosts}/{self.service_name}/0"

    def master(self) -> Node:
        """Whom the first Sentinel that lives names. Raises LookupError."""
        sentinel = next(sentinel for sentinel in self.sentinels if sentinel.living)
        address = self._named_by(sentinel)
        for node in self.nodes:
            if node.address == address:
                return node
        raise LookupError(f"{sentinel} names {address}")

    def replicas(self) -> list[Node]:
        """Those living, the master left out."""
        master = self.master()
        return [node for node in self.nodes if node.living and node is not master]

    def start(self) -> None:
        """Return when all know each other. Raises ServerStartFailed, TimeoutError."""
        try:
            _start([*self.nodes, *self.sentinels])
            self._form()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGKILL to all, then remove their files."""
        _stop([*self.sentinels, *self.nodes])

    def __enter__(self) -> Sentinels:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_master(self, timeout: float = START_TIMEOUT) -> Node:
        """The living master that all living Sentinels name. Raises TimeoutError."""
        _wait(self._no_master, timeout)
        return self.master()

    def wait_ok(self, timeout: float = START_TIMEOUT) -> None:
        """As `wait_master`, and until all the others that live are its replicas, in step with it.

        A former master that is back, or was replaced while it was alive, stays a master for up to
        10 s. Raises TimeoutError, saying what is wrong.
        """
        _wait(self._trouble, timeout)

    def failover(self, timeout: float = START_TIMEOUT) -> Node:
        """Have a replica promoted, and return it. The former master is told later: `wait_ok`.

        Raises TimeoutError.
        """
        former = self.wait_master(timeout)
        sentinel = next(sentinel for sentinel in self.sentinels if sentinel.living)
        command = "SENTINEL", "FAILOVER", self.service_name
        # Refused while another is under way, or while no replica seems fit.
        _wait(lambda: "" if sentinel.call(*command) == "OK" else "refused", timeout)
        _wait(
            lambda: self._no_master() or ("none was promoted" if self.master() is former else ""),
            timeout,
        )
        return self.master()

    def restore(self) -> None:
        """The original roles, all living, and no data. Quick if nothing is changed."""
        nodes = [*self.nodes, *self.sentinels]
        if (
            all(node.living for node in nodes)
            and [node.role for node in self.nodes] == ["master", "slave", "slave"]
            and _settles(self._trouble)
        ):
            _empty(self.nodes[0], 2)
            return
        for node in nodes:
            if node._running():
                node.resume()
        _start(nodes)
        for sentinel in self.sentinels:
            with contextlib.suppress(
                redis.ResponseError
            ):  # it may be one that just came to know it
                sentinel.call("SENTINEL", "REMOVE", self.service_name)
        self._form()
        _empty(self.nodes[0], 2)

    def _form(self) -> None:
        """Of Sentinels that watch nothing."""
        master, *replicas = self.nodes
        master.call("REPLICAOF", "NO", "ONE")
        for replica in replicas:
            replica.call("REPLICAOF", *master.address)
        for sentinel in self.sentinels:
            sentinel.call("SENTINEL", "MONITOR", self.service_name, *master.address, self._quorum)
            for name, value in self._settings.items():
                sentinel.call("SENTINEL", "SET", self.service_name, name, value)
        self.wait_ok()

    def _named_by(self, sentinel: Node) -> tuple[str, int] | None:
        named = sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service_name)
        return named and (named[0], int(named[1]))

    def _no_master(self) -> str:
        named = {self._named_by(sentinel) for sentinel in self.sentinels if sentinel.living}
        living = {node.address: node for node in self.nodes if node.living}
        if len(named) != 1 or not named <= living.keys():
            return f"the living Sentinels name {sorted(map(str, named))}"
        (node,) = (living[address] for address in living.keys() & named)
        return "" if node.role == "master" else f"{node} is named, and is no master"

    def _trouble(self) -> str:
        if reason := self._no_master():
            return reason
        master = self.master()
        others = self.replicas()
        for node in others:
            link = node.call("INFO", "replication")
            if link["role"] != "slave" or link["master_port"] != master.port:
                return f"{node} is no replica of {master}"
            if link["master_link_status"] != "up":
                return f"{node} is not in step with {master}"
        for sentinel in self.sentinels:
            if not sentinel.living:
                continue
            fellows = [s for s in self.sentinels if s.living and s is not sentinel]
            for about, expected, flag in (
                ("MASTERS", [master], "master"),
                ("REPLICAS", others, "slave"),
                ("SENTINELS", fellows, "sentinel"),
            ):
                which = () if about == "MASTERS" else (self.service_name,)
                told = sentinel.call("SENTINEL", about, *which)
                rows = (dict(zip(row[::2], row[1::2], strict=True)) for row in told)
                flags = {int(row["port"]): row["flags"] for row in rows}
                if any(flags.get(node.port) != flag for node in expected):
                    return f"{sentinel} believes of {about}: {flags}"
        return ""


class _Sentinel(Node):
    _arguments = ("--sentinel",)


def _replication(tls: TLSFiles | None, password: str | None) -> dict[str, str | int]:
    return {
        "repl-ping-replica-period": 1,
        "repl-diskless-sync": "yes",
        "repl-diskless-sync-delay": 0,
        **({} if tls is None else {"tls-replication": "yes"}),
        **({} if password is None else {"requirepass": password, "masterauth": password}),
    }
