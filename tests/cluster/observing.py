"""What is where in a cluster, seen by asking every node directly."""

from __future__ import annotations

from typing import Any

import redis
from helpers import SEPARATOR, Service

from relstream import DeadLetters, Delayed, Producer
from relstream.testing import Cluster, Node, Sentinels


def locks_by_master(cluster: Cluster) -> dict[Node, dict[str, str]]:
    """Who holds which lock, for every living master."""
    found: dict[Node, dict[str, str]] = {}
    for master in cluster.masters():
        keys = list(master.client.scan_iter(match=f"*{SEPARATOR}*", count=10_000))
        pipe = master.client.pipeline(transaction=False)
        for key in keys:
            pipe.get(key)
        # Between the two a lock may have gone, or moved.
        values = pipe.execute(raise_on_error=False)
        held = zip(keys, values, strict=True)
        found[master] = {key: value for key, value in held if isinstance(value, str)}
    return found


def subscriptions(node: Node) -> dict[str, int]:
    """Patterns subscribed to, by the name of the connection, or else its address."""
    clients = node.client.client_list()
    return {c["name"] or c["addr"]: int(c["psub"]) for c in clients if int(c["psub"])}


async def announces(client: Producer | DeadLetters | Delayed) -> None:
    if isinstance(client, Producer):
        await client.announce("s")
    else:
        await (client.replay() if isinstance(client, DeadLetters) else client.requeue())


class EveryMaster(redis.RedisCluster):
    """Takes commands that belong to no key to all masters: lists are joined, numbers added up."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        command = " ".join(map(str, args[:2])).upper()
        if not command.startswith(("ACL ", "CLIENT ", "CONFIG ", "PUBSUB ", "SCRIPT ")):
            return super().execute_command(*args, **options)
        answers: list[Any] = []
        for node in self.get_primaries():
            client = self.get_redis_connection(node)
            answers.append(client.execute_command(*args, **options))
        first = answers[0]
        if isinstance(first, list) and command == "CLIENT LIST":
            return [row for answer in answers for row in answer]
        return sum(answers) if type(first) is int else first

    def close(self) -> None:
        # Which leaves to the garbage collector the connections of one made from a URL.
        for node in self.get_nodes():
            if node.redis_connection is not None:
                node.redis_connection.connection_pool.disconnect()
        super().close()


class ClusterService(Service):
    """As `Service`, where the keys are spread over masters."""

    def __init__(self, client: redis.RedisCluster, cluster: Cluster, name: str = "svc") -> None:
        super().__init__(client, name)
        self._cluster = cluster

    def other(self, name: str) -> Service:
        return ClusterService(self.redis, self._cluster, name)

    def announce_last(self, *names: str) -> list[str]:
        lbs_master = self.lbs_master
        for master in self._cluster.masters():
            if master is not lbs_master:
                master.client.config_set("maxmemory", 1)
        with redis.Redis(*lbs_master.address) as client:
            return Service(client, self.name).announce_last(*names)

    def ttls(self, keys: list[str]) -> list[int]:
        with self.redis.pipeline() as pipe:
            for key in keys:
                pipe.pttl(key)
            return pipe.execute()

    @property
    def lbs_master(self) -> Node:
        return self._cluster.master_of(self.lbs)

    def locks(self) -> dict[str, str]:
        return {k: v for held in locks_by_master(self._cluster).values() for k, v in held.items()}

    def locks_together(self) -> dict[str, str]:
        # Masters are asked one after the other: what is seen before and after was there in between.
        before = self.locks()
        return {key: value for key, value in self.locks().items() if key in before}


class SentinelService(Service):
    """As `Service`, at whom Sentinels name the master."""

    def __init__(self, sentinels: Sentinels) -> None:
        self._sentinels = sentinels
        super().__init__(redis.Redis.from_url(sentinels.master().url))

    def follow(self) -> None:
        """After a failover."""
        self.redis.close()
        self.redis = redis.Redis.from_url(self._sentinels.master().url)
