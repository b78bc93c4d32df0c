from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from helpers import HEARTBEAT

from relstream import StreamClient


@pytest.fixture
async def consumer(redis_url: str) -> AsyncIterator[Callable[..., StreamClient]]:
    """Makes clients of service `svc` that are closed after the test."""
    made: list[StreamClient] = []

    def make(name: str = "c1", **options: Any) -> StreamClient:
        options = {"heartbeat_interval": HEARTBEAT, "consumer_id": name, **options}
        made.append(StreamClient(options.pop("url", redis_url), "svc", **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()
