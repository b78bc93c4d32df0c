"""A private master with replicas, watched by Sentinels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import redis

from relstream.testing.node import Node, empty, replication, settles, start_all, stop_all, wait
from relstream.testing.server import START_TIMEOUT, Binary, TLSFiles, find_binary


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
        directives = replication(tls, password) | dict(config or {})
        self.nodes = [
            Node(binary=self.binary, tls=tls, password=password, config=directives)
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
            start_all([*self.nodes, *self.sentinels])
            self._form()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGKILL to all, then remove their files."""
        stop_all([*self.sentinels, *self.nodes])

    def __enter__(self) -> Sentinels:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_master(self, timeout: float = START_TIMEOUT) -> Node:
        """The living master that all living Sentinels name. Raises TimeoutError."""
        wait(self._no_master, timeout)
        return self.master()

    def wait_ok(self, timeout: float = START_TIMEOUT) -> None:
        """As `wait_master`, and until all the others that live are its replicas, in step with it.

        A former master that is back, or was replaced while it was alive, stays a master for up to
        10 s. Raises TimeoutError, saying what is wrong.
        """
        wait(self._trouble, timeout)

    def failover(self, timeout: float = START_TIMEOUT) -> Node:
        """Have a replica promoted, and return it. The former master is told later: `wait_ok`.

        Raises TimeoutError.
        """
        former = self.wait_master(timeout)
        sentinel = next(sentinel for sentinel in self.sentinels if sentinel.living)
        command = "SENTINEL", "FAILOVER", self.service_name
        # Refused while another is under way, or while no replica seems fit.
        wait(lambda: "" if sentinel.call(*command) == "OK" else "refused", timeout)
        wait(
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
            and settles(self._trouble)
        ):
            empty(self.nodes[0], 2)
            return
        for node in nodes:
            if node._running():
                node.resume()
        start_all(nodes)
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.ResponseError):  # it may just have come to know it
                sentinel.call("SENTINEL", "REMOVE", self.service_name)
        self._form()
        empty(self.nodes[0], 2)

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
