"""What the measurements say: as JSON, and as a table for people."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table
from rich.text import Text

from relstream.bench.measure import ONE_SERVER, PEER, RELSTREAM, Metric, link
from relstream.bench.runner import Result
from relstream.tasks import HAS_UVLOOP

TRANSPORTS = {"redis": "TCP", "rediss": "TLS", "unix": "unix socket"}
ABSENT = "(not installed)"
PACKAGES = ("relstream", "redis", "hiredis", "uvloop", "orjson")


async def environment(url: str, *, private: bool) -> dict[str, Any]:
    """What the figures depend on. Has no address and no password."""
    async with link(url) as connection:
        server = (await connection.execute("INFO", "server")).decode()
    info = dict(re.findall(r"^(\w+):(.*?)\r?$", server, re.MULTILINE))
    name = info.get("server_name", "redis")  # Valkey has that field
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(os, "sched_getaffinity") else None,
        "memory_mb": psutil.virtual_memory().total // 10**6,
        "load_1min": os.getloadavg()[0],
        "server": {
            "name": name,
            "version": info.get(f"{name}_version", info.get("redis_version", "unknown")),
            "private": private,
            "transport": TRANSPORTS[url.partition("://")[0].lower()],
        },
    }


def _version(package: str) -> str:
    if package == "uvloop" and not HAS_UVLOOP:
        return ABSENT
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return ABSENT


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results; every figure is the median over the rounds."""
    return [
        {
            "scenario": result.scenario.name,
            "n": result.n,
            "rounds": len(result.rounds[RELSTREAM]),
            **{
                side: result.medians(side) or None
                for side in dict.fromkeys((RELSTREAM, PEER, *result.scenario.sides))
            },
            "ratio": _ratio(result, result.scenario.metrics[0]),
        }
        for result in results
    ]


def headline(environment: dict[str, Any]) -> str:
    """What was measured where, in two lines."""
    packages, server = environment["packages"], environment["server"]
    uvloop = packages["uvloop"]
    loop = "asyncio's event loop" if uvloop == ABSENT else f"uvloop {uvloop}"
    whose = "private" if server["private"] else "given by --url"
    return (
        f"relstream {packages['relstream']}; the peer: redis-py {packages['redis']},"
        f" hiredis {packages['hiredis']}; both on {loop},"
        f" {environment['python']}\n"
        f"{server['name']} {server['version']} ({whose}, over {server['transport']}),"
        f" {environment['cores']} cores of {environment['cpu']},"
        f" load {environment['load_1min']:.1f} at the start"
    )


def table(results: Sequence[Result]) -> Table:
    """Medians of both sides, and how many times better relstream is."""
    others = [side for result in results for side in result.scenario.sides[1:]]
    caption = "medians over the rounds; ratio: above 1, relstream is better"
    if ONE_SERVER in others:
        caption += f"; cluster: relstream on three masters beside relstream on {ONE_SERVER}"
    out = Table(caption=caption)
    out.caption_justify = "left"
    for column in ("scenario", "measured"):
        out.add_column(column)
    for column in (RELSTREAM, " / ".join(dict.fromkeys(others)) or PEER, "ratio"):
        out.add_column(column, justify="right")
    out.add_column("relstream")
    for result in results:
        sides = result.scenario.sides
        ours, theirs = result.medians(RELSTREAM), result.medians(sides[1] if sides[1:] else "")
        out.add_section()
        for place, metric in enumerate(result.scenario.metrics):
            out.add_row(
                _title(result, place),
                metric.label,
                _number(ours.get(metric.key), metric),
                _number(theirs.get(metric.key), metric),
                _times(_ratio(result, metric)),
                _verdict(_ratio(result, metric), first=place == 0) if PEER in sides else "",
            )
    return out


def _title(result: Result, place: int) -> Text:
    if place == 0:
        return Text(result.scenario.name, style="bold")
    if place == 1:
        return Text(f"n = {result.n:,}", style="dim")
    if place == 2:
        rounds = len(result.rounds[RELSTREAM])
        return Text(f"{rounds} round{'s' if rounds > 1 else ''}", style="dim")
    return Text()


def _ratio(result: Result, metric: Metric) -> float | None:
    if metric.less_is_better is None:
        return None
    return result.ratio(metric.key, less_is_better=metric.less_is_better)


def _number(figure: float | None, metric: Metric) -> str:
    return "" if figure is None else f"{figure:,.{metric.digits}f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _verdict(ratio: float | None, *, first: bool) -> Text:
    """That relstream loses, is said of every metric; that it wins, of the first."""
    if ratio is not None and ratio < 1:
        return Text("LOSES" if first else "worse", style="bold red" if first else "red")
    return Text("wins", style="green") if first and ratio is not None else Text()
