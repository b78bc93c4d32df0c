"""Who gives credentials belongs to the application's event loop, and may be late."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis.asyncio
from helpers import TERMINATED, eventually, names, nothing_comes, take
from redis.credentials import CredentialProvider

HEARTBEAT = 1.0

pytestmark = pytest.mark.only("single", reason="gives a ready client of one server")


class OfOneLoop(CredentialProvider):
    """Can be asked on the loop it was made on only, as one with an HTTP session of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.password = "first"
        self.asked = 0

    def get_credentials(self) -> tuple[str, str]:
        raise AssertionError("this would block the event loop")

    async def get_credentials_async(self) -> tuple[str, str]:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("attached to a different loop")
        await asyncio.sleep(0.01)
        self.asked += 1
        return "joe", self.password


@pytest.fixture
async def provider(redis_sync):
    redis_sync.execute_command("ACL", "SETUSER", "joe", "on", ">first", "~*", "&*", "+@all")
    return OfOneLoop()


def cut(redis_sync) -> None:
    for kind in ("normal", "pubsub"):
        redis_sync.client_kill_filter(_type=kind, skipme=True)


async def test_leases_are_renewed_with_its_help(consumer, service, redis_url, provider):
    url = redis.asyncio.Redis.from_url(redis_url, credential_provider=provider)
    client = consumer(url=url, heartbeat_interval=HEARTBEAT)
    notes = await client.init()
    service.announce("s1")
    await take(notes, 1)
    for _ in range(2):
        provider.asked = 0
        cut(service.redis)
        await eventually(lambda: provider.asked > 2)
        await nothing_comes(notes, 1.5 * HEARTBEAT)
        assert len(service.locks()) == 1
    assert client.health().live
    await client.done_stream("s1")


async def test_leases_outlive_a_blocked_loop_that_gives_them(
    consumer, service, redis_url, provider, caplog
):
    """The renewal thread has to sign in anew, and can't ask: what was given last has to do."""
    url = redis.asyncio.Redis.from_url(redis_url, credential_provider=provider)
    client = consumer(url=url, heartbeat_interval=4.0)
    notes = await client.init()
    service.announce("s1")
    await take(notes, 1)
    await asyncio.sleep(1.0)
    cut(service.redis)
    time.sleep(6.0)  # noqa: ASYNC251 - an application that blocks its loop
    assert len(service.locks()) == 1
    await nothing_comes(notes, 1.0)
    assert "taken again" not in caplog.text
    await client.done_stream("s1")


async def test_a_new_password_may_be_known_late(consumer, service, redis_url, provider):
    url = redis.asyncio.Redis.from_url(redis_url, credential_provider=provider)
    client = consumer(url=url, heartbeat_interval=HEARTBEAT)
    notes = await client.init()
    service.redis.execute_command("ACL", "SETUSER", "joe", "resetpass", ">second")
    cut(service.redis)
    await asyncio.sleep(3.5)
    provider.password = "second"
    service.announce("s1")
    (got,) = await take(notes, 1)
    assert got.type is not TERMINATED
    assert names([got]) == ["s1"]
    await client.done_stream("s1")
