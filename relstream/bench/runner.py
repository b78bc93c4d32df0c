"""Takes the measurements: each in a process of its own, the sides in turns."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median

from relstream.bench.measure import PEER, RELSTREAM, Figures, Job, Scenario, topology
from relstream.tasks import run_async

PATIENCE = 60.0
"""Seconds that a measurement may take, and ten more for each 1000 items, which `latency` needs."""


class MeasurementFailed(Exception):
    """A side did not do its work. The message is one line; `log` what its process wrote."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Result:
    """What one scenario gave: the figures of every round."""

    scenario: Scenario
    n: int
    rounds: defaultdict[str, list[Figures]] = field(default_factory=lambda: defaultdict(list))

    def medians(self, side: str) -> Figures:
        """Each figure's median over the rounds; none where that side does not take part."""
        rounds = self.rounds[side]
        if not rounds:
            return {}
        return {key: median(figures[key] for figures in rounds) for key in rounds[0]}

    def ratio(self, key: str, *, less_is_better: bool | None) -> float | None:
        """How many times better relstream is; None where there is nothing to divide by, or with."""
        other = self.medians(self.scenario.sides[-1])
        if len(self.scenario.sides) == 1 or key not in other:
            return None
        ours, others = self.medians(RELSTREAM)[key], other[key]
        if less_is_better:
            ours, others = others, ours
        return ours / others if others else None


def measure(
    scenario: Scenario,
    *,
    n: int,
    rounds: int,
    urls: Mapping[str, str],
    private: bool,
    on_step: Callable[[int, str], None],
) -> Result:
    """Runs a scenario, with the server at `urls[side]`.

    `on_step(round, side)` is called before each measurement.
    """
    result = Result(scenario, n)
    for number in range(rounds):
        # Who comes first changes, so that neither profits from what drifts.
        for side in scenario.sides if number % 2 == 0 else reversed(scenario.sides):
            on_step(number + 1, side)
            many = min(n, scenario.peer_n or n) if side == PEER else n
            with service(scenario, many, urls[side]) as name:
                job = Job(
                    scenario=scenario.name,
                    side=side,
                    url=urls[side],
                    service=name,
                    n=many,
                    private=private,
                )
                result.rounds[side].append(work(job))
    return result


@contextlib.contextmanager
def service(scenario: Scenario, n: int, url: str) -> Iterator[str]:
    """The name of a service of our own, with what the scenario wants to be there."""
    name = f"relstream-bench-{secrets.token_hex(4)}"
    try:
        if scenario.prepare is not None:
            run_async(scenario.prepare(url, name, n))
        yield name
    finally:
        # The locks are released when a client closes; those of a killed one expire by themselves.
        run_async(_remove(url, name))


async def _remove(url: str, name: str) -> None:
    if not url:  # its servers are its own, and gone
        return
    async with topology(url) as servers:
        for key in f"{name}-input", f"{name}-input-dlq":
            await servers.link(key.encode()).execute("UNLINK", key)


def work(job: Job) -> Figures:
    """Does one measurement in a new process."""
    who = f"{job.scenario}, {job.side}"
    with subprocess.Popen(
        [sys.executable, "-m", "relstream.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches only us, and we end it
    ) as process:
        # Taken from the process, whose `communicate` would close it: to the worker, that its
        # standard input closes is the sign to end.
        lifeline, process.stdin = process.stdin, None
        assert lifeline is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # why it has ended is said below
                print(json.dumps(asdict(job)), file=lifeline, flush=True)
            out, log = process.communicate(timeout=PATIENCE + job.n / 100)
        except subprocess.TimeoutExpired as error:
            raise MeasurementFailed(f"{who}: not done within {error.timeout:.0f} s", "") from None
        finally:
            process.kill()
            lifeline.close()
    if process.returncode:
        last = log.strip().splitlines()[-1:] or [f"ended with status {process.returncode}"]
        raise MeasurementFailed(f"{who}: {last[0]}", log)
    figures: Figures = json.loads(out)
    return figures
