"""Where Redis is, read off a URL or a client: one server, one that Sentinels name, or a cluster."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import redis.asyncio
from redis.asyncio.sentinel import SentinelConnectionPool

from relstream.errors import InvalidOption
from relstream.net.cluster.router import ClusterTopology
from relstream.net.cluster.slots import SlotTable
from relstream.net.connection import Connection, SharedAddress
from relstream.net.credentials import OnLoop
from relstream.net.endpoint import Endpoint, Remap, endpoint_of
from relstream.net.failover import MasterResolver
from relstream.net.secrets import shown_client, without_secrets
from relstream.net.sentinel import SentinelMaster
from relstream.net.topology import SingleTopology, Topology


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where Redis is, and what kind of it. Holds no connection; may be shared between threads."""

    endpoint: Endpoint
    """What all servers have in common; of a single server also its address."""
    nodes: tuple[Endpoint, ...] = ()
    """Nodes of a cluster to start from."""
    sentinels: tuple[Endpoint, ...] = ()
    master_name: str = ""
    """What the Sentinels call the master."""
    remap: Remap | None = None

    @property
    def has_failover(self) -> bool:
        """Whether a lost master is replaced: then it is worth waiting for."""
        return bool(self.nodes or self.sentinels)

    def with_timeout(self, timeout: float) -> Deployment:
        """The same, waiting for so many seconds at most, for a connection as for a reply."""
        bounded = replace(
            self.endpoint,
            timeout=min(self.endpoint.timeout, timeout),
            connect_timeout=min(self.endpoint.connect_timeout, timeout),
        )
        return replace(self, endpoint=bounded)

    def asking_on(self, loop: asyncio.AbstractEventLoop) -> Deployment:
        """The same for another thread, where credential providers are asked on this loop."""
        return replace(
            self,
            endpoint=_asking_on(loop, self.endpoint),
            nodes=tuple(_asking_on(loop, node) for node in self.nodes),
            sentinels=tuple(_asking_on(loop, sentinel) for sentinel in self.sentinels),
        )

    def guide(self, other: MasterResolver = None) -> MasterResolver:
        """What knows where masters are, for all that is opened on one event loop.

        `other` belongs to another loop: what it has found may be asked, too.
        """
        if self.nodes:
            known = other.nodes if isinstance(other, SlotTable) else []
            return SlotTable(self.endpoint, (*self.nodes, *known), self.remap)
        return self._sentinel_master() if self.sentinels else SharedAddress()

    def _sentinel_master(self) -> SentinelMaster:
        return SentinelMaster(self.endpoint, self.sentinels, self.master_name, self.remap)

    def open(self, role: str, guide: MasterResolver = None) -> Topology:
        """What carries commands, over connections that CLIENT LIST shows under this role.

        Nothing is connected yet. What is opened on one event loop may share a `guide`.
        """
        if self.nodes:
            slots = guide
            if not isinstance(slots, SlotTable):
                slots = SlotTable(self.endpoint, self.nodes, self.remap)
            return ClusterTopology(self.endpoint.named(role), slots)
        return SingleTopology(self.link(role, guide=guide))

    def link(
        self, role: str, on_push: Callable[[Any], None] | None = None, guide: MasterResolver = None
    ) -> Connection:
        """A link to the master, where there is but one."""
        master = guide if isinstance(guide, SentinelMaster) else None
        if master is None and self.sentinels:
            master = self._sentinel_master()
        address = guide if isinstance(guide, SharedAddress) else None
        return Connection(
            self.endpoint.named(role), on_push=on_push, master=master, address=address
        )


def _asking_on(loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> Endpoint:
    if endpoint.credential_provider is None:
        return endpoint
    provider = OnLoop(endpoint.credential_provider, loop)
    return replace(endpoint, credential_provider=provider)


def deployment_of(source: object) -> Deployment:
    """Reads off a URL or a `redis.asyncio` client where Redis is, and whether it is a cluster.

    URLs: those of `endpoint_of`; `redis+sentinel://[user:password@]host:port,host:port/name[/db]`;
    `redis+cluster://[user:password@]host:port,host:port[/db]`; `rediss+…` for TLS. Raises
    `InvalidOption`, as `endpoint_of` does.
    """
    if isinstance(source, str):
        scheme, plus, rest = source.partition("+")
        kind, _, rest = rest.partition("://")
        if plus and scheme in ("redis", "rediss") and kind in ("sentinel", "cluster"):
            return _of_many_hosts(source, scheme, kind, rest)
    if isinstance(source, redis.asyncio.RedisCluster):
        return _of_cluster(source)
    if isinstance(source, redis.asyncio.Redis):
        pool = source.connection_pool
        if isinstance(pool, SentinelConnectionPool):
            return _of_sentinel(source, pool)
    return Deployment(endpoint=endpoint_of(cast("str | redis.asyncio.Redis", source)))


def _of_many_hosts(url: str, scheme: str, kind: str, rest: str) -> Deployment:
    credentials, at, address = rest.rpartition("@")
    hosts, _, path = re.sub(r"\?.*", "", address).partition("/")
    query = address.partition("?")[2]
    sentinel_query = "&".join(
        part.removeprefix("sentinel_") for part in query.split("&") if part.startswith("sentinel_")
    )
    query = "&".join(part for part in query.split("&") if not part.startswith("sentinel_"))
    shown = without_secrets(url)
    name, _, db = path.partition("/")
    if kind == "cluster" and not re.fullmatch(r"\d*/?", path):
        # Not quoted: it may be the end of a password that should have been percent-encoded.
        expected = f"{scheme}+cluster://host:port,host:port/database, by its number"
        raise InvalidOption("redis", shown, expected)
    if kind == "sentinel" and not name:
        raise InvalidOption("redis", shown, f"{scheme}+sentinel://host:port,host:port/master name")

    def endpoint(host: str, login: str, path: str, settings: str) -> Endpoint:
        part = f"{scheme}://{login}{host}{path}{'?' if settings else ''}{settings}"
        return endpoint_of(part, given=url)

    every = hosts.split(",")
    if not all(every) or re.search("@.*,", credentials):
        wanted = f"{scheme}+{kind}://user:password@host:port,host:port: the password once"
        raise InvalidOption("redis", shown, wanted)
    if kind == "cluster":
        # Only Valkey 9 has others than 0 in a cluster; where there are none SELECT says so.
        db = f"/{path.strip('/')}" if path.strip("/") else ""
        nodes = tuple(endpoint(host, credentials + at, db, query) for host in every)
        return Deployment(endpoint=nodes[0], nodes=nodes)
    default = [host if re.search(r":\d+$", host) else f"{host}:26379" for host in every]
    sentinels = tuple(endpoint(host, "", "", sentinel_query) for host in default)
    common = endpoint("localhost", credentials + at, f"/{db}" if db else "", query)
    return Deployment(endpoint=common, sentinels=sentinels, master_name=name)


def _of_cluster(client: redis.asyncio.RedisCluster) -> Deployment:
    nodes = []
    for node in client.nodes_manager.startup_nodes.values():
        pool = redis.asyncio.ConnectionPool(
            connection_class=node.connection_class, **node.connection_kwargs
        )
        nodes.append(endpoint_of(redis.asyncio.Redis(connection_pool=pool)))
    remap = client.nodes_manager.address_remap
    return Deployment(endpoint=nodes[0], nodes=tuple(nodes), remap=remap)


def _of_sentinel(client: redis.asyncio.Redis, pool: SentinelConnectionPool) -> Deployment:
    if not pool.is_master:
        raise InvalidOption(
            "redis", shown_client(client), "a client made by master_for, not slave_for"
        )
    settings = dict(pool.connection_kwargs)
    settings.pop("connection_pool", None)
    tls = issubclass(pool.connection_class, redis.asyncio.SSLConnection)
    plain = redis.asyncio.ConnectionPool(
        connection_class=redis.asyncio.SSLConnection if tls else redis.asyncio.Connection,
        **settings,
    )
    forced = pool.sentinel_manager._force_master_ip
    return Deployment(
        endpoint=endpoint_of(redis.asyncio.Redis(connection_pool=plain)),
        remap=(lambda address: (forced, address[1])) if forced else None,
        sentinels=tuple(endpoint_of(sentinel) for sentinel in pool.sentinel_manager.sentinels),
        master_name=pool.service_name,
    )
