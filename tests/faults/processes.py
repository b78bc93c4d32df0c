"""Processes to kill and to freeze, a server's connections to interrupt, and who owns what."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import redis
from helpers import SEPARATOR, Service, eventually
from wire import command, listening

import relstream
from relstream._core import pack

HERE = Path(__file__).parent
ROOT = Path(relstream.__file__).parents[1]


class Process:
    """A process of ours that prints JSON lines; they are collected in `lines`."""

    def __init__(self, script: str, *args: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )
        self.pid = self._process.pid
        self.lines: list[dict[str, Any]] = []
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    def _collect(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # else it was killed while it wrote
                self.lines.append(json.loads(line))

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> float:
        """Sends a signal; returns when."""
        at = time.monotonic()
        self._process.send_signal(number)
        return at

    def kill(self) -> float:
        """SIGKILL; returns when it was sent. The process is gone when this returns."""
        at = self.signal(signal.SIGKILL)
        self._process.wait()
        return at

    def freeze(self) -> float:
        """SIGSTOP; returns when. The process has stopped when this returns."""
        at = self.signal(signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        return at

    def thaw(self) -> float:
        """SIGCONT; returns when."""
        return self.signal(signal.SIGCONT)

    def close(self) -> None:
        """For after the test, however it went."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._collector.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def said(self, what: str, stream: str | None = None) -> list[dict[str, Any]]:
        lines = [line for line in list(self.lines) if line["what"] == what]
        return lines if stream is None else [line for line in lines if line["stream"] == stream]

    async def heard(
        self, what: str, count: int = 1, stream: str | None = None, timeout: float = 15.0
    ) -> list[dict[str, Any]]:
        """Waits until it has said this so often."""
        with contextlib.suppress(AssertionError):
            await eventually(lambda: len(self.said(what, stream)) >= count, timeout)
        said = self.said(what, stream)
        assert len(said) >= count, (what, len(said), self.lines[-3:])
        return said


class Consumer(Process):
    """A consumer process. `lines` tell what it heard, see `consumer_process.py`."""

    def __init__(self, url: str, name: str, **options: Any) -> None:
        self.name = name
        options = {"heartbeat_interval": 1.0, "consumer_id": name, "url": url, **options}
        super().__init__("consumer_process.py", json.dumps(options))

    @property
    def added(self) -> list[str]:
        """Streams it was told of, as often as it was."""
        return [line["stream"] for line in self.said("stream_added")]

    @property
    def lost(self) -> list[str]:
        return [line["stream"] for line in self.said("stream_disowned")]

    def owns(self) -> Counter[str]:
        """How often it believes to own each stream: never more than once, if all is well."""
        done = [line["stream"] for line in self.said("done") if line["error"] is None]
        owned = Counter(self.added)
        owned.subtract(self.lost)
        owned.subtract(done)
        assert min(owned.values(), default=0) >= 0, f"lost without being told of: {owned}"
        return +owned

    async def ready(self) -> Consumer:
        await self.heard("ready")
        return self


class Watch:
    """Looks at all locks many times a second: no stream may have two at any time.

    What is seen together was there together.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._task: asyncio.Task[None] | None = None
        self.looks = 0
        self.twice: dict[str, list[tuple[str, str]]] = {}

    async def __aenter__(self) -> Watch:
        self._task = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if exc_info[0] is None:
            assert self._task.cancelled(), self._task
            assert self.looks > 1
            assert not self.twice, dict(list(self.twice.items())[:5])

    async def _watch(self) -> None:
        while True:
            locks = self._service.locks_together()
            counts = Counter(key.rpartition(SEPARATOR)[0] for key in locks)
            for name, count in counts.items():
                if count > 1:
                    self.twice[name] = [
                        item for item in locks.items() if item[0].startswith(name + SEPARATOR)
                    ]
            self.looks += 1
            await asyncio.sleep(0.02)


# Whether to pass a command of a connection on; called before, with the connection's role.
Gate = Callable[[str, list[bytes]], Awaitable[bool]]


class Tap:
    """Stands between one client and the server, and lets `gate` see each command before it passes.

    Commands of one connection pass one after the other. A command for which `gate` returns False is
    swallowed, and so are all after it on this connection. Of a cluster it stands before every
    master: where these name their ports, its own are named.
    """

    def __init__(self, beyond: redis.Redis | redis.RedisCluster, gate: Gate) -> None:
        self._beyond = beyond
        self._gate = gate
        self._stack = contextlib.AsyncExitStack()
        self._ports: dict[int, int] = {}
        self.url = ""

    async def __aenter__(self) -> Tap:
        scheme = "redis"
        if isinstance(self._beyond, redis.RedisCluster):
            scheme = "redis+cluster"
            beyond = [node.port for node in self._beyond.get_primaries()]
        else:
            beyond = [self._beyond.connection_pool.connection_kwargs["port"]]
        for port in beyond:
            serve = functools.partial(self._serve, port)
            self._ports[port] = await self._stack.enter_async_context(listening(serve))
        self.url = f"{scheme}://127.0.0.1:{self._ports[port]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _serve(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, beyond = await asyncio.open_connection("127.0.0.1", port)
        answers = asyncio.ensure_future(self._answer(there, writer))
        role = ""
        try:
            while True:
                args = await command(reader)
                if b"SETNAME" in args:
                    role = args[args.index(b"SETNAME") + 1].decode().rpartition(":")[2]
                if not await self._gate(role, args):
                    await asyncio.Event().wait()
                beyond.write(pack(*args))
                await beyond.drain()
        finally:
            beyond.transport.abort()  # first: this may be cancelled while it waits
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65536):
            if len(self._ports) > 1:  # CLUSTER SLOTS, that is
                for port, ours in self._ports.items():
                    data = data.replace(b":%d\r\n" % port, b":%d\r\n" % ours)
            writer.write(data)
            await writer.drain()
