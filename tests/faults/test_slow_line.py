"""A line that needs longer for one large entry than a reply may take."""

from __future__ import annotations

import pytest
from helpers import eventually, names, take
from wire import Proxy

from relstream import RecoveryConfig
from relstream.net.endpoint import endpoint_of

pytestmark = pytest.mark.only("single", reason="behind a proxy")

SIZE = 2 << 20
RATE = 500_000  # so SIZE takes 4 s
# Longer than the line needs: the lock of an entry can't be taken before it was read.
HEARTBEAT = 10.0


def large(service, name):
    return service.announce(name, '{"a": "' + "x" * SIZE + '"}')


async def test_a_large_entry_is_notified_over_a_slow_line(consumer, service, redis_url):
    async with Proxy(endpoint_of(redis_url).port, rate=RATE) as proxy:
        proxy.piece = 16384
        large(service, "large")
        service.announce("small")
        url = f"{proxy.url}?socket_timeout=1"
        client = consumer(url=url, heartbeat_interval=HEARTBEAT)
        assert names(await take(await client.init(), 2, timeout=40)) == ["large", "small"]
        proxy.rate = float("inf")
        await client.aclose()


async def test_streams_beside_a_large_entry_are_recovered_over_a_slow_line(
    consumer, service, redis_url
):
    service.redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
    large(service, "large")
    for i in range(45):
        service.announce(f"s{i}")
    service.redis.xreadgroup(service.group, "ghost", {service.lbs: ">"}, count=50)
    async with Proxy(endpoint_of(redis_url).port, rate=RATE) as proxy:
        proxy.piece = 16384
        recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=1)
        client = consumer(
            url=f"{proxy.url}?socket_timeout=1", recovery=recovery, heartbeat_interval=HEARTBEAT
        )
        await client.init()
        await eventually(lambda: len(list(client.owned())) == 46, 60)
        assert not service.pending("ghost")
        proxy.rate = float("inf")
        await client.aclose()
