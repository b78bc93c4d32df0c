from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from faults.processes import Consumer, Process
from hypothesis import settings

from relstream import StreamClient

HEARTBEAT = 0.5

# Machines that run tests are often busy: a slow example is no failure.
settings.register_profile("faults", deadline=None)
settings.load_profile("faults")


@pytest.fixture
async def consumer(redis_url: str) -> AsyncIterator[Callable[..., StreamClient]]:
    """Makes clients of service `svc`, in this process, that are closed after the test."""
    made: list[StreamClient] = []

    def make(name: str = "c1", **options: Any) -> StreamClient:
        options = {"heartbeat_interval": HEARTBEAT, "consumer_id": name, **options}
        url, service = options.pop("url", redis_url), options.pop("service", "svc")
        made.append(StreamClient(url, service, **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


@pytest.fixture
def start(redis_url: str) -> Iterator[Callable[..., Consumer]]:
    """Starts consumers in processes of their own, with a heartbeat of 1 s unless told."""
    started: list[Consumer] = []

    def make(name: str, **options: Any) -> Consumer:
        started.append(Consumer(options.pop("url", redis_url), name, **options))
        return started[-1]

    yield make
    for process in started:
        process.close()


@pytest.fixture
def start_reference(
    redis_url: str, deployment: str, request: pytest.FixtureRequest
) -> Iterator[Callable[[], Process]]:
    """Starts recoverers that do it one by one, in two steps; see `reference_process.py`."""
    url = redis_url
    if deployment == "sentinel":
        url = request.getfixturevalue("sentinels").master().url
    started: list[Process] = []

    def make() -> Process:
        started.append(Process("reference_process.py", url, "svc"))
        return started[-1]

    yield make
    for process in started:
        process.close()
