"""One server of several, and what is done with some of them at the same time."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from relstream.testing.server import Server, TLSFiles

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
        # redis-py gives this one no types.
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


def wait(trouble: Callable[[], str], timeout: float) -> None:
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


def settles(trouble: Callable[[], str]) -> bool:
    """On a busy machine nodes may believe, for a moment, that others are dead."""
    try:
        wait(trouble, 3)
    except TimeoutError:
        return False
    return True


def start_all(nodes: Iterable[Node]) -> None:
    """At the same time; those that are running stay as they are."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(Node.start, nodes))


def stop_all(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.kill()  # they persist nothing, and must not wait for their replicas
        node.stop()


def empty(master: Node, replicas: int) -> None:
    master.call("FLUSHALL")
    master.call("WAIT", replicas, round(ANSWER_TIMEOUT * 500))


def replication(tls: TLSFiles | None, password: str | None) -> dict[str, str | int]:
    return {
        "repl-ping-replica-period": 1,
        "repl-diskless-sync": "yes",
        "repl-diskless-sync-delay": 0,
        **({} if tls is None else {"tls-replication": "yes"}),
        **({} if password is None else {"requirepass": password, "masterauth": password}),
    }
