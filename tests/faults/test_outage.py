"""The server is gone, or stands still, for longer than locks live: nobody dies of that."""

from __future__ import annotations

import asyncio

import pytest
import redis
from helpers import ADDED, EXPIRED, Service, eventually, take

from relstream import ConnectionFailed, RecoveryConfig, RetryConfig

# Shorter than the pauses of who waits for the server to come back.
TTL = 0.5
FOR_EVER = RetryConfig(max_retries=-1, max_delay=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "pause"])
async def test_an_outage_is_no_death(consumer, make_server, how):
    with make_server(config={"appendonly": "yes", "appendfsync": "always"}) as server:
        recovery = RecoveryConfig(min_idle_time=0.0, reconciliation_interval=0.5)
        clients = [
            consumer(
                f"c{i}",
                url=server.url,
                heartbeat_interval=TTL,
                retry=FOR_EVER,
                recovery=recovery,
                max_streams=100,
            )
            for i in range(3)
        ]
        notes = [await client.init() for client in clients]
        with redis.Redis.from_url(server.url) as admin:
            for i in range(300):
                Service(admin).announce(f"s{i}")
        for each in notes:
            await take(each, 100)
        if how == "restart":
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(5 * TTL)
            await asyncio.to_thread(server.restart)
        else:
            server.pause()
            await asyncio.sleep(5 * TTL)
            server.resume()
        with redis.Redis.from_url(server.url) as admin:
            service = Service(admin)
            await eventually(lambda: len(service.locks()) == 300, 20)
            await asyncio.sleep(3 * TTL)  # scans and looks go on
            assert len(service.pending()) == 300
            assert all(b"_retry_count" not in fields for _, fields in admin.xrange(service.lbs))
        for each in notes:
            told = []
            while each._waiting or each._urgent or each._items:
                told.append((await each.__anext__()).type)
            assert set(told) <= {EXPIRED}
        for client in clients:
            await client.done()


async def test_who_does_not_claim_leaves_others_to_look(consumer, service):
    """With `auto_claim` off a consumer leads until one comes that looks for deaths, too."""
    recovery = RecoveryConfig(min_idle_time=3600, reconciliation_interval=3600)
    await consumer("off", auto_claim=False, max_streams=1, recovery=recovery).init()
    await eventually(
        lambda: (service.redis.get("svc-input-reconciler") or b"").startswith(b"scans only: off#")
    )
    notes = await consumer("on", recovery=recovery).init()
    await eventually(lambda: (service.redis.get("svc-input-reconciler") or b"").startswith(b"on#"))
    del notes


async def test_done_raises_what_it_could_not_finish(consumer, make_server):
    with make_server() as server:
        client = consumer(url=server.url, retry=RetryConfig(max_retries=0))
        notes = await client.init()
        with redis.Redis.from_url(server.url) as admin:
            Service(admin).announce("s1")
        assert (await take(notes, 1, ADDED))[0].payload.data_stream_name == "s1"
        await asyncio.to_thread(server.kill)
        with pytest.raises(ConnectionFailed):
            await client.done()
        await client.aclose()
