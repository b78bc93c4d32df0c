"""Where Redis is, as URLs and ready clients say it; nothing is connected here."""

from __future__ import annotations

from typing import Any

import pytest
import redis.asyncio
import redis.asyncio.sentinel
from redis.asyncio.cluster import ClusterNode

from relstream import InvalidOption
from relstream.net.cluster.router import ClusterTopology
from relstream.net.cluster.slots import SlotTable
from relstream.net.connection import SharedAddress
from relstream.net.deployment import deployment_of
from relstream.net.endpoint import Endpoint
from relstream.net.sentinel import SentinelMaster
from relstream.net.topology import SingleTopology


def addresses(endpoints: tuple[Endpoint, ...]) -> list[tuple[str, int]]:
    return [(endpoint.host, endpoint.port) for endpoint in endpoints]


@pytest.mark.parametrize("url", ["redis://h:1/2", "rediss://h:1/2", "unix:///tmp/s?db=2"])
def test_a_single_server(url: str) -> None:
    deployment = deployment_of(url)
    assert (deployment.nodes, deployment.sentinels) == ((), ())
    assert not deployment.has_failover
    assert deployment.endpoint.db == 2
    assert (deployment.endpoint.tls is not None) == url.startswith("rediss")
    assert isinstance(deployment.guide(), SharedAddress)
    assert isinstance(deployment.open("r"), SingleTopology)


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("redis+cluster://h", [("h", 6379)]),
        ("redis+cluster://h:1", [("h", 1)]),
        ("redis+cluster://h:1,i:2,[::1]:3/", [("h", 1), ("i", 2), ("::1", 3)]),
        ("redis+cluster://h:1,i/0", [("h", 1), ("i", 6379)]),
    ],
)
def test_a_cluster(url: str, nodes: list[tuple[str, int]]) -> None:
    deployment = deployment_of(url)
    assert addresses(deployment.nodes) == nodes
    assert deployment.has_failover
    assert deployment.endpoint.username is deployment.endpoint.tls is None
    slots = deployment.guide()
    assert isinstance(slots, SlotTable)
    topology = deployment.open("r", slots)
    assert isinstance(topology, ClusterTopology)
    assert topology.slots is slots
    assert topology.endpoint.client_name == "relstream:r"


@pytest.mark.parametrize("url", ["redis+cluster://h:1,i:2/3", "redis+cluster://h:1,i:2?db=3"])
def test_a_clusters_database(url: str) -> None:
    deployment = deployment_of(url)
    assert addresses(deployment.nodes) == [("h", 1), ("i", 2)]
    assert [node.db for node in deployment.nodes] == [3, 3]
    slots = deployment.guide()
    assert isinstance(slots, SlotTable)
    assert slots.at("j", 3).db == 3


def test_addresses_are_translated_as_the_client_does_it() -> None:
    """Nodes behind NAT, and Sentinels, give addresses that lead nowhere from here."""
    cluster = redis.asyncio.RedisCluster(
        startup_nodes=[ClusterNode("h", 1)],
        address_remap=lambda address: (f"outside-{address[0]}", address[1] + 1000),
    )
    slots = deployment_of(cluster).guide()
    assert isinstance(slots, SlotTable)
    node = slots.at("10.0.0.1", 7000)
    assert (node.host, node.port) == ("outside-10.0.0.1", 8000)
    assert slots.at("10.0.0.1", 7000) is node
    sentinel = redis.asyncio.sentinel.Sentinel([("h", 1)], force_master_ip="outside")
    deployment = deployment_of(sentinel.master_for("m"))
    assert deployment.remap is not None
    assert deployment.remap(("10.0.0.1", 7000)) == ("outside", 7000)


def test_what_a_clusters_url_says_is_for_all_nodes() -> None:
    url = "rediss+cluster://jo%40e:p%2Fw@h:1,i:2?socket_timeout=7&client_name=me&protocol=2"
    for node in deployment_of(url).nodes:
        assert (node.username, node.password, node.timeout) == ("jo@e", "p/w", 7)
        assert (node.client_name, node.resp3) == ("me", False)
        assert node.tls is not None


@pytest.mark.parametrize(
    ("url", "sentinels", "db"),
    [
        ("redis+sentinel://h/m", [("h", 26379)], 0),
        ("redis+sentinel://h:1,i,[::1]:3/m/4", [("h", 1), ("i", 26379), ("::1", 3)], 4),
    ],
)
def test_sentinels(url: str, sentinels: list[tuple[str, int]], db: int) -> None:
    deployment = deployment_of(url)
    assert addresses(deployment.sentinels) == sentinels
    assert (deployment.master_name, deployment.endpoint.db) == ("m", db)
    assert deployment.has_failover
    assert isinstance(deployment.guide(), SentinelMaster)


def test_master_and_sentinels_have_settings_of_their_own() -> None:
    deployment = deployment_of(
        "redis+sentinel://joe:of-master@h:1,i:2/m?socket_timeout=7"
        "&sentinel_username=jim&sentinel_password=of-sentinels&sentinel_socket_timeout=3"
    )
    common = deployment.endpoint
    assert (common.username, common.password, common.timeout) == ("joe", "of-master", 7)
    for node in deployment.sentinels:
        assert (node.username, node.password, node.timeout) == ("jim", "of-sentinels", 3)


@pytest.mark.parametrize("tls", [False, True])
async def test_ready_clients(tls: bool) -> None:
    settings: dict[str, Any] = {"username": "joe", "password": "pw", "ssl": tls}
    cluster = redis.asyncio.RedisCluster(
        startup_nodes=[ClusterNode("h", 1), ClusterNode("i", 2)], **settings
    )
    deployment = deployment_of(cluster)
    assert sorted(addresses(deployment.nodes)) == [("h", 1), ("i", 2)]
    for node in deployment.nodes:
        assert (node.username, node.password, node.tls is not None) == ("joe", "pw", tls)
    await cluster.aclose()

    finder = redis.asyncio.sentinel.Sentinel(
        [("h", 1), ("i", 2)], sentinel_kwargs={"password": "of-sentinels"}
    )
    master = finder.master_for("m", db=3, **settings)
    deployment = deployment_of(master)
    common = deployment.endpoint
    assert (common.username, common.password, common.db) == ("joe", "pw", 3)
    assert (common.tls is not None) == tls
    assert addresses(deployment.sentinels) == [("h", 1), ("i", 2)]
    assert {node.password for node in deployment.sentinels} == {"of-sentinels"}
    assert deployment.master_name == "m"
    replica = finder.slave_for("m", **settings)
    with pytest.raises(InvalidOption, match="not slave_for"):
        deployment_of(replica)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+cluster://:hunter2@h/name", "by its number"),
        ("redis+cluster://h/1/2?password=hunter2", "by its number"),
        ("redis+cluster://:hunter2@h:1,i:99999", "port"),
        ("redis+cluster://:hun/ter2@h:1", "percent-encoded|by its number"),
        ("redis+cluster://:hunter2@h:1?socket_timeout=soon", "socket_timeout"),
        ("redis+cluster://:hunter2@h:1?socket_timeout=nan", "socket_timeout above 0 seconds"),
        ("redis+sentinel://:hunter2@h/m?socket_timeout=inf", "socket_timeout above 0 seconds"),
        ("redis+sentinel://h/m?sentinel_socket_timeout=-1", "socket_timeout above 0 seconds"),
        ("redis+sentinel://:hunter2@h:1", "master name"),
        ("redis+sentinel://:hunter2@h:1/?sentinel_password=hunter2", "master name"),
        ("redis+sentinel://:hunter2@h:port/m", "port"),
        ("redis+sentinel://:hunter2@h/m/first", "number of a database"),
        ("redis+sentinel://h/m?sentinel_nonsense=1&password=hunter2", "nonsense"),
        ("redis+else://:hunter2@h", "scheme"),
        ("http+cluster://:hunter2@h", "scheme"),
    ],
)
def test_what_can_not_be(url: str, said: str) -> None:
    with pytest.raises(InvalidOption, match=said) as caught:
        deployment_of(url)
    assert "ter2" not in str(caught.value)


def test_patience_bounds_every_wait() -> None:
    patient = deployment_of(
        "redis+cluster://h?socket_timeout=60&socket_connect_timeout=1"
    ).with_timeout(2)
    assert (patient.endpoint.timeout, patient.endpoint.connect_timeout) == (2, 1)
