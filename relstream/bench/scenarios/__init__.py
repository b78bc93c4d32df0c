"""The scenarios: one module a family. A new one is a `Scenario` that is listed here."""

from __future__ import annotations

from relstream.bench.measure import Scenario
from relstream.bench.scenarios.cluster import CLUSTER
from relstream.bench.scenarios.failover import FAILOVER
from relstream.bench.scenarios.latency import LATENCY
from relstream.bench.scenarios.owning import ASSIGN, DONE, HOLD
from relstream.bench.scenarios.reading import READ
from relstream.bench.scenarios.recovering import RECOVER, SCAN
from relstream.bench.scenarios.topology import TOPOLOGY

FAMILIES: dict[str, tuple[Scenario, ...]] = {
    **{
        scenario.name: (scenario,)
        for scenario in (READ, ASSIGN, DONE, HOLD, LATENCY, RECOVER, SCAN, FAILOVER)
    },
    "cluster": CLUSTER,
    "topology": (TOPOLOGY,),
}
"""What can be chosen: a scenario, or several that belong together."""

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for members in FAMILIES.values() for scenario in members
}
