"""The servers that the other tests here stand on do what they say."""

from __future__ import annotations

import redis.asyncio

from relstream.servers import Cluster


async def test_all_keys_are_served_by_the_master_that_is_named(cluster: Cluster) -> None:
    async with redis.asyncio.RedisCluster.from_url(cluster.url) as client:
        for i in range(20):
            await client.set(f"key{i}", i)
            assert await client.get(f"key{i}") == b"%d" % i
            assert cluster.master_of(f"key{i}").call("GET", f"key{i}") == str(i)
    assert len(cluster.masters()) == len(cluster.replicas()) == 3
