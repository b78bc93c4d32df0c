"""`cluster`: what other scenarios do, on three masters beside one server of the same binary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from relstream.bench.measure import (
    ONE_SERVER,
    RELSTREAM,
    Figures,
    Job,
    Metric,
    Scenario,
    Window,
    announce,
    throughput,
)
from relstream.bench.scenarios.owning import ASSIGN, DONE, HOLD, LONG_HEARTBEAT, Relstream
from relstream.bench.scenarios.recovering import RECOVER
from relstream.testing import Cluster
from relstream.testing.server import Server

MASTERS = 3


@contextmanager
def both() -> Iterator[Mapping[str, str]]:
    """Three masters, and one server; all at once, as all share the machine anyway."""
    with Cluster(masters=MASTERS, replicas=0) as cluster, Server(binary=cluster.binary) as server:
        nodes = ",".join(f"{host}:{port}" for host, port in (n.address for n in cluster.nodes))
        yield {RELSTREAM: f"redis+cluster://{nodes}", ONE_SERVER: server.url}


async def _announce_spread(url: str, service: str, n: int) -> None:
    await announce(url, service, n, MASTERS)


async def spread(job: Job) -> Figures:
    """n streams of a service of three partitions become owned and are finished."""
    async with Window(job.url) as window:
        owner = Relstream(job, LONG_HEARTBEAT, MASTERS)
        names = await owner.own(job.n)
        await owner.finish(names)
    await owner.close()
    mean = window.server_cpu / MASTERS
    return {
        **window.figures(job.n),
        "busiest": max(window.cpu_of_each) / mean,
        "idlest": min(window.cpu_of_each) / mean,
    }


def _of_masters(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    return tuple(
        replace(metric, label=f"servers busy, limit {MASTERS}")
        if metric.key == "server_share"
        else metric
        for metric in metrics
    )


def _on_both(scenario: Scenario, n: int) -> Scenario:
    return replace(
        scenario,
        name=f"cluster {scenario.name}",
        work="assign, done, hold and recover on three masters beside one server; relstream alone",
        n=n,
        sides=(RELSTREAM, ONE_SERVER),
        servers=both,
        peer_n=None,
        metrics=_of_masters(scenario.metrics),
    )


CLUSTER = (
    _on_both(ASSIGN, 50_000),
    _on_both(DONE, 50_000),
    _on_both(HOLD, 10_000),
    _on_both(RECOVER, 50_000),
    Scenario(
        name="cluster spread",
        work="three partitions: assign and done, and what each master has to do",
        n=50_000,
        run=spread,
        prepare=_announce_spread,
        sides=(RELSTREAM,),
        servers=both,
        metrics=(
            *_of_masters(throughput("streams")),
            Metric(key="busiest", label="busiest master / mean", digits=2),
            Metric(key="idlest", label="idlest master / mean", digits=2),
        ),
    ),
)
