"""Applications in processes of their own, to be ended by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from helpers import eventually

import relstream

HERE = Path(__file__).parent
ROOT = Path(relstream.__file__).parents[1]
HOLDING = str(HERE / "holding_consumer.py")

# A process of this command is process 1 in a world of its own.
AS_PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_not_process_1() -> str:
    """What keeps us from making one; empty where nothing does."""
    try:
        run = subprocess.run([*AS_PROCESS_1, "true"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unshare can't be run: {error}"
    return run.stderr.strip() if run.returncode else ""


def readme(heading: str, url: str) -> str:
    """README's code below this heading, with another address."""
    text = (ROOT / "README.md").read_text()
    code = text[text.index(heading) :].split("```python\n", 1)[1].split("```", 1)[0]
    assert code.count("redis://localhost:6379") == 1
    return code.replace("redis://localhost:6379", url)


class Application:
    """Python code in a process; what it prints is collected."""

    def __init__(self, *args: str, before: tuple[str, ...] = ()) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [*before, sys.executable, "-u", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            start_new_session=True,
        )
        self._wrapped = before == AS_PROCESS_1
        self.out: list[str] = []
        self.err: list[str] = []
        streams = ((self._process.stdout, self.out), (self._process.stderr, self.err))
        self._collectors = [
            threading.Thread(target=self._collect, args=each, daemon=True) for each in streams
        ]
        for collector in self._collectors:
            collector.start()

    @staticmethod
    def _collect(stream: IO[str], lines: list[str]) -> None:
        for line in stream:  # not in one go: it is looked at meanwhile
            lines.append(line.rstrip("\n"))  # noqa: PERF401

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    async def says(self, line: str, timeout: float = 20.0) -> None:
        """Waits until it has printed this line."""

        def said() -> bool:
            assert self.running or line in self.out, (self.out, self.err)
            return line in self.out

        await eventually(said, timeout)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        pid = self._process.pid
        if self._wrapped:
            (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if self.running:
            os.kill(pid, number)

    async def ended(self, timeout: float = 20.0) -> int:
        """Waits until it has ended; returns its exit code, negative by a signal."""
        await eventually(lambda: not self.running, timeout)
        for collector in self._collectors:
            await asyncio.to_thread(collector.join)
        return self._process.returncode

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for collector in self._collectors:
            collector.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


Launch = Callable[..., Application]
