"""These tests break clusters and sets of Sentinels: see the fixtures in tests/conftest.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cluster.observing import ClusterService, EveryMaster
from helpers import Service

from relstream import StreamClient
from relstream.testing import Cluster, Sentinels
from relstream.testing.server import Binary, ServerStartFailed, TLSFiles


@pytest.fixture
def service(cluster: Cluster) -> Iterator[Service]:
    """The state of service `svc` in the cluster."""
    with EveryMaster.from_url(cluster.url) as client:
        yield ClusterService(client, cluster)


@pytest.fixture
def url(cluster: Cluster) -> str:
    return cluster.url.replace("redis://", "redis+cluster://")


@pytest.fixture
async def consumer(
    url: str, request: pytest.FixtureRequest
) -> AsyncIterator[Callable[..., StreamClient]]:
    """Makes consumers, by default with the heartbeat interval that the module has."""
    made: list[StreamClient] = []
    heartbeat = getattr(request.module, "HEARTBEAT", 2.0)

    def make(name: str = "c1", **options: Any) -> StreamClient:
        options = {"heartbeat_interval": heartbeat, **options}
        made.append(StreamClient(options.pop("redis", url), "svc", consumer_id=name, **options))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


@pytest.fixture
def tls(tmp_path: Path) -> TLSFiles:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    return TLSFiles(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem")


@pytest.fixture
def make(binary: Binary) -> Iterator[Callable[..., Any]]:
    """Starts clusters and sets of Sentinels for this test alone."""
    made: list[Cluster | Sentinels] = []

    def make(group: type[Cluster] | type[Sentinels], **options: Any) -> Cluster | Sentinels:
        started = group(binary=binary, **options)
        try:
            started.start()
        except ServerStartFailed as error:
            if not any(sign in str(error) for sign in (">>> 'tls-", "Failed finding TLS support")):
                raise
            pytest.skip("this server was built without TLS")
        made.append(started)
        return started

    yield make
    for started in made:
        started.stop()
