"""One cluster and one set of Sentinels for all tests: started by the first that wants it.

A test may kill, pause and move what it likes: the next one finds the original layout, without data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import redis
from cluster.observing import ClusterService
from helpers import Service, connections_left, forget_settings

from relstream.server import Binary
from relstream.servers import Cluster, Node, Sentinels


@pytest.fixture(scope="session")
def shared_cluster(binary: Binary) -> Iterator[Cluster]:
    with Cluster(binary=binary) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared_sentinels(binary: Binary) -> Iterator[Sentinels]:
    with Sentinels(binary=binary) as sentinels:
        yield sentinels


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Three masters with a replica each, without data, users and settings of earlier tests."""
    shared_cluster.restore()
    for node in shared_cluster.nodes:
        forget_settings(node.client)
    yield shared_cluster
    nothing_connected(shared_cluster.nodes)


@pytest.fixture
def sentinels(shared_sentinels: Sentinels) -> Iterator[Sentinels]:
    """A master, two replicas, three Sentinels, without what earlier tests left."""
    shared_sentinels.restore()
    for node in shared_sentinels.nodes:
        forget_settings(node.client)
    yield shared_sentinels
    nothing_connected([*shared_sentinels.nodes, *shared_sentinels.sentinels])


def nothing_connected(nodes: Iterable[Node]) -> None:
    left = connections_left(node.client for node in nodes if node.living)
    assert not left, f"connections left behind: {left}"


@pytest.fixture
def service(cluster: Cluster) -> Iterator[Service]:
    """The state of service `svc` in the cluster."""
    with redis.RedisCluster.from_url(cluster.url) as client:
        yield ClusterService(client, cluster)
