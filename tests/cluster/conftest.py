"""One cluster and one set of Sentinels for all tests: started by the first that wants it.

A test may kill, pause and move what it likes: the next one finds the original layout, without data.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import connections_left, forget_settings

from relstream.server import Binary
from relstream.servers import Cluster


@pytest.fixture(scope="session")
def shared_cluster(binary: Binary) -> Iterator[Cluster]:
    with Cluster(binary=binary) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Three masters with a replica each, without data, users and settings of earlier tests."""
    shared_cluster.restore()
    for node in shared_cluster.nodes:
        forget_settings(node.client)
    yield shared_cluster
    living = [node.client for node in shared_cluster.nodes if node.living]
    assert not (left := connections_left(living)), f"connections left behind: {left}"
