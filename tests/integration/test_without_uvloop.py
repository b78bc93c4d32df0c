"""uvloop is an extra: without it, asyncio's own event loop does everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIFE = """
import asyncio, sys
import relstream
from relstream import NotificationType, Producer, StreamClient

assert "uvloop" not in sys.modules

async def main():
    assert "asyncio" in type(asyncio.get_running_loop()).__module__
    url = sys.argv[1]
    client = StreamClient(url, "svc", consumer_id="c1", heartbeat_interval=0.5)
    async with client as notes, Producer(url, "svc") as producer:
        await producer.announce("s1", {"n": 1})
        async for note in notes:
            if note.type is NotificationType.STREAM_ADDED:
                break
        until = next(client.owned()).lease_deadline
        # The thread that renews has a loop of its own.
        while next(client.owned()).lease_deadline <= until:
            await asyncio.sleep(0.05)
        await client.done_stream(note.payload)
    return note.payload.data_stream_name

print(relstream.run(main()))
"""


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds no uvloop, and neither do those that it starts."""
    (tmp_path / "uvloop.py").write_text("raise ModuleNotFoundError(name='uvloop')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def run(env: dict[str, str], *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=50, env=env
    )
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
    return ended.stdout


def test_a_life(redis_url: str, without: dict[str, str]) -> None:
    assert run(without, "-W", "error", "-c", LIFE, redis_url) == "s1\n"


@pytest.mark.only("single", reason="brings servers of its own")
def test_the_benchmark(redis_url: str, without: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    names = ("read", "latency")
    said = run(
        without, "-m", "relstream.bench", *names, "--url", redis_url,
        "-n", "40", "--rounds", "1", "--json", str(file),
    )  # fmt: skip
    assert "both on asyncio's event loop" in " ".join(said.split())
    report = json.loads(file.read_text())
    assert report["environment"]["packages"]["uvloop"] == "(not installed)"
    assert [result["scenario"] for result in report["results"]] == list(names)
    assert all(result["ratio"] > 0 for result in report["results"])
