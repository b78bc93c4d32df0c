"""These tests break clusters and sets of Sentinels: see the fixtures in tests/conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.observing import ClusterService, EveryMaster
from helpers import Service

from relstream.servers import Cluster


@pytest.fixture
def service(cluster: Cluster) -> Iterator[Service]:
    """The state of service `svc` in the cluster."""
    with EveryMaster.from_url(cluster.url) as client:
        yield ClusterService(client, cluster)
