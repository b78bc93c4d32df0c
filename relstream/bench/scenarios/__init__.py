"""The scenarios: one module a family. A new one is a `Scenario` that is listed here."""

from __future__ import annotations

from relstream.bench.measure import Scenario
from relstream.bench.scenarios.failover import FAILOVER
from relstream.bench.scenarios.latency import LATENCY
from relstream.bench.scenarios.owning import ASSIGN, DONE, HOLD
from relstream.bench.scenarios.reading import READ
from relstream.bench.scenarios.recovering import RECOVER, SCAN

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (READ, ASSIGN, DONE, HOLD, LATENCY, RECOVER, SCAN, FAILOVER)
}
