"""The benchmark at tiny sizes: that it runs, what it writes, and how it fails. No figures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import redis
from click.testing import CliRunner
from rich.console import Console

from relstream.bench import cli, runner
from relstream.bench.measure import ONE_SERVER, PEER, RELSTREAM, SIDES, Job, percentile
from relstream.bench.report import as_json, table
from relstream.bench.runner import Result
from relstream.bench.scenarios import SCENARIOS
from relstream.testing.server import Server

COMMON = {"per_second", "client_cpu_us", "server_cpu_us", "server_share"}
OF_ITS_OWN = {
    "hold": {"client_core", "server_core", "lost", "rss_mb"},
    "latency": {"p50_ms", "p99_ms", "max_ms", "xadd_p50_ms"},
    "recover": {"n"},
    "scan": {"n", "rss_mb"},
}


WORK = ("assign", "done", "hold", "recover")


@pytest.fixture(scope="module")
def url() -> Any:
    with Server() as server:
        yield server.url


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relstream.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.timeout(180)
def test_json_and_table(url: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    names = ["read", "assign", "done", "recover", "scan", "latency"]
    run = bench(*names, "--url", url, "-n", "40", "--rounds", "1", "--json", file)
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    assert set(report) == {"environment", "results"}
    assert {"python", "packages", "cpu", "server"} <= set(report["environment"])
    assert [result["scenario"] for result in report["results"]] == names
    for result in report["results"]:
        assert set(result) == {"scenario", "n", "rounds", *SIDES, "ratio"}
        assert (result["n"], result["rounds"]) == (40, 1)
        assert result["ratio"] > 0
        for side in SIDES:
            assert set(result[side]) == COMMON | OF_ITS_OWN.get(result["scenario"], set())
            assert result[side]["per_second"] > 0
        assert result["scenario"] in run.stdout
    latency = report["results"][-1]
    assert latency["ratio"] == latency[PEER]["p50_ms"] / latency[RELSTREAM]["p50_ms"]
    assert latency[PEER]["p50_ms"] <= latency[PEER]["p99_ms"] <= latency[PEER]["max_ms"]
    with redis.Redis.from_url(url) as client:
        assert client.dbsize() == 0, client.keys()


@pytest.mark.parametrize("side", SIDES)
def test_hold(url: str, side: str) -> None:
    hold = SCENARIOS["hold"]
    with runner.service(hold, 30, url) as service:
        figures = runner.work(
            Job(
                scenario="hold",
                side=side,
                url=url,
                service=service,
                n=30,
                private=True,
                seconds=1.0,
            )
        )
    assert set(figures) == COMMON | OF_ITS_OWN["hold"]
    assert figures["lost"] == 0
    assert 0 < figures["client_core"] < 1


@pytest.mark.timeout(180)
def test_cluster_beside_one_server(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    with mock.patch.dict(os.environ, {"COLUMNS": "200"}):
        run = bench("cluster", "-n", "200", "--rounds", "1", "--json", file)
    assert run.returncode == 0, run.stderr
    assert "relstream on three masters" in " ".join(run.stdout.split())
    results = {result["scenario"]: result for result in json.loads(file.read_text())["results"]}
    assert list(results) == [f"cluster {what}" for what in (*WORK, "spread")]
    for what in WORK:
        result = results[f"cluster {what}"]
        assert result[PEER] is None
        assert result["ratio"] > 0
        for side in (RELSTREAM, ONE_SERVER):
            assert set(result[side]) == COMMON | OF_ITS_OWN.get(what, set())
    assert results["cluster hold"][RELSTREAM]["lost"] == 0
    spread = results["cluster spread"]
    assert spread["ratio"] is None
    assert 0 <= spread[RELSTREAM]["idlest"] <= 1 <= spread[RELSTREAM]["busiest"] <= 3


@pytest.mark.parametrize("side", SIDES)
def test_scan_on_a_private_server(url: str, side: str) -> None:
    scan = SCENARIOS["scan"]
    with runner.service(scan, 2500, url) as service:
        figures = runner.work(
            Job(scenario="scan", side=side, url=url, service=service, n=2500, private=True)
        )
    assert set(figures) == COMMON | OF_ITS_OWN["scan"] | {"slowest_ms"}
    assert 0 < figures["slowest_ms"] < 1000
    assert figures["rss_mb"] >= 0
    with redis.Redis.from_url(url) as client:
        assert client.dbsize() == 0, client.keys()


def _nothing(number: int, side: str) -> None: ...


def test_peer_may_be_given_fewer(url: str) -> None:
    recover = dataclasses.replace(SCENARIOS["recover"], peer_n=20)
    result = runner.measure(
        recover,
        n=60,
        rounds=1,
        urls=dict.fromkeys(SIDES, url),
        private=False,
        on_step=_nothing,
    )
    assert [result.medians(side)["n"] for side in SIDES] == [60, 20]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_failover_has_no_peer(url: str) -> None:
    failover = SCENARIOS["failover"]
    result = runner.measure(
        failover,
        n=40,
        rounds=1,
        urls=dict.fromkeys(SIDES, url),
        private=False,
        on_step=_nothing,
    )
    (as_written,) = as_json([result])
    assert (as_written[PEER], as_written["ratio"]) == (None, None)
    figures = as_written[RELSTREAM]
    assert figures["lost"] == 0
    assert figures["twice"] >= 0  # on a busy machine the living lose locks, too
    for victim in ("", "few_"):
        assert 0 < figures[f"{victim}p50_ms"] <= figures[f"{victim}p99_ms"]
        assert figures[f"{victim}p99_ms"] <= figures[f"{victim}last_ms"]
        assert figures[f"{victim}last_after_ttl_ms"] == figures[f"{victim}last_ms"] - 2000
    assert table([result]).row_count == len(failover.metrics)
    with redis.Redis.from_url(url) as client:
        # What tells a killed consumer's name from a twin's expires, two heartbeats later, and what
        # tells that a leader has left does before.
        while left := client.keys("*-instance-*") + client.keys("*-reconciler"):
            time.sleep(max(client.pttl(left[0]), 1) / 1000)
        assert client.keys() == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_topology_kills_a_master() -> None:
    topology = SCENARIOS["topology"]
    assert topology.servers is not None
    with topology.servers() as urls:
        result = runner.measure(topology, n=1, rounds=1, urls=urls, private=True, on_step=_nothing)
    figures = result.medians(RELSTREAM)
    assert set(figures) == {metric.key for metric in topology.metrics}
    assert figures["cluster_failover_ms"] > 0
    for what in "delivered", "event":
        later = figures[f"{what}_ms"] - figures["cluster_failover_ms"]
        assert figures[f"{what}_after_ms"] == figures[f"{what}_after_max_ms"] == later


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["everything"], 2, "'everything' is not one of 'read', 'assign'"),
        (["read", "-n", "0"], 2, "-n"),
        (["read", "--rounds", "0"], 2, "--rounds"),
        (["read", "--json", "/nowhere/at/all.json"], 2, "/nowhere/at"),
        (["read", "--json", "/proc/all.json"], 2, "/proc/all.json"),
        (["read", "--url", "http://localhost"], 2, "redis://"),
        (["read", "--url", "redis+cluster://:secret@localhost"], 2, "//***@localhost' is none of"),
        (["read", "--url", "redis://127.0.0.1:1/0"], 1, "can't connect to redis://127.0.0.1:1"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(
    arguments: list[str], status: int, told: str
) -> None:
    run = bench(*arguments)
    assert run.returncode == status
    assert told in run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stdout == ""


@pytest.mark.timeout(180)
def test_interrupt_leaves_nothing_behind(url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "relstream.bench", "latency", "-n", "100000", "--url", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As where a shell's background job runs the tests, which ignores interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    me = psutil.Process(process.pid)
    deadline = time.monotonic() + 40
    try:
        while len(descendants := me.children(recursive=True)) < 2:
            assert time.monotonic() < deadline, "neither consumer nor announcer came up"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=40)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert err.strip().endswith("interrupted")
    _, alive = psutil.wait_procs(descendants, timeout=20)
    assert not alive


def test_interrupt_that_uvloop_can_not_cope_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**options: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("Cannot close a running event loop")

    monkeypatch.setattr(cli.command, "main", interrupted)
    assert cli.main() == 130
    assert capsys.readouterr().err == "relstream.bench: interrupted\n"


def test_failing_side_is_reported(url: str) -> None:
    job = Job(scenario="read", side=PEER, url=url, service="no:such", n=1, private=True)
    with pytest.raises(runner.MeasurementFailed, match="read, redis-py: ") as failure:
        runner.work(job)
    assert "Traceback" in failure.value.log


def test_ratio_and_medians() -> None:
    result = Result(SCENARIOS["read"], 1)
    result.rounds[RELSTREAM] += [{"x": 9.0}, {"x": 2.0}, {"x": 3.0}]
    result.rounds[PEER] += [{"x": 6.0}, {"x": 6.0}, {"x": 100.0}]
    assert result.medians(RELSTREAM) == {"x": 3.0}
    assert result.ratio("x", less_is_better=False) == 0.5
    assert result.ratio("x", less_is_better=True) == 2.0


def test_ratio_to_nothing_is_none() -> None:
    result = Result(SCENARIOS["read"], 1)
    result.rounds[RELSTREAM] += [{"x": 1.0}]
    result.rounds[PEER] += [{"x": 0.0}]
    assert result.ratio("x", less_is_better=False) is None


def test_percentile() -> None:
    values = list(range(1, 101))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7], 0.99) == 7


def test_a_scenario_that_loses_says_so() -> None:
    read = SCENARIOS["read"]
    figures = {metric.key: 1.0 for metric in read.metrics}
    for ours, said in ((0.5, "LOSES"), (2.0, "wins")):
        result = Result(read, 1000)
        result.rounds[RELSTREAM].append({**figures, "per_second": ours})
        result.rounds[PEER].append(figures)
        console = Console(file=io.StringIO(), width=100)
        console.print(table([result]))
        assert said in console.file.getvalue()


def test_without_arguments_all_that_do_with_one_server_are_measured(monkeypatch) -> None:
    chosen: list[str] = []

    def measured(scenarios, *args: object, **options: object) -> list[object]:
        chosen.extend(scenario.name for scenario in scenarios)
        return []

    monkeypatch.setattr(cli, "_measured", measured)
    assert CliRunner().invoke(cli.command, [], catch_exceptions=False).exit_code == 0
    assert chosen == ["read", "assign", "done", "hold", "latency", "recover", "scan", "failover"]
