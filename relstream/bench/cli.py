"""The command line."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relstream.bench.measure import SIDES, Scenario
from relstream.bench.report import TRANSPORTS, as_json, environment, headline, table
from relstream.bench.runner import MeasurementFailed, Result, measure
from relstream.bench.scenarios import FAMILIES
from relstream.errors import RelstreamError, UsageError
from relstream.net.secrets import without_secrets
from relstream.tasks import run_async
from relstream.testing.server import Server, ServerNotFound, ServerStartFailed

BAD_USAGE = 2
FAILED = 1
INTERRUPTED = 130

ON_OWN_SERVERS = [name for name, members in FAMILIES.items() if members[0].servers is not None]


@click.command(
    name="python -m relstream.bench",
    epilog="Scenarios: "
    + "; ".join(f"{family}: {members[0].work}" for family, members in FAMILIES.items())
    + f". {' and '.join(ON_OWN_SERVERS)} run only when named, and on private servers always: "
    "what --url gives is for the others.",
)
@click.argument("scenarios", nargs=-1, type=click.Choice(list(FAMILIES)), metavar="[SCENARIO ...]")
@click.option("--url", help="A Redis to measure on, instead of a private one: redis://…, unix://…")
@click.option("-n", "n", type=click.IntRange(min=1), help="How many, in each scenario.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Rounds to repeat.  [default: 3; hold, latency, failover, topology: 1]",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the figures to this file, too.",
)
def command(
    scenarios: Sequence[str],
    url: str | None,
    n: int | None,
    rounds: int | None,
    json_file: Path | None,
) -> None:
    """Measures relstream beside redis-py at the same work.

    Without arguments: every scenario that does with one server, for about a minute, on a private
    one.
    """
    if json_file is not None and (json_file.is_file() or not json_file.exists()):
        try:
            json_file.open("a").close()  # before measuring, and what is there stays until then
        except OSError as error:
            raise click.BadParameter(f"can't be written: {error}", param_hint="--json") from None
    families = dict.fromkeys(scenarios or [name for name in FAMILIES if name not in ON_OWN_SERVERS])
    chosen = [scenario for name in families for scenario in FAMILIES[name]]
    if url is not None and url.partition("://")[0].lower() not in TRANSPORTS:
        wanted = ", ".join(f"{scheme}://…" for scheme in TRANSPORTS)
        raise click.BadParameter(
            f"{without_secrets(url)!r} is none of {wanted}", param_hint="--url"
        )
    with _server(url) as address:
        around = run_async(environment(address, private=url is None))
        results: list[Result] = []
        failure = None
        try:
            for result in _measured(chosen, n, rounds, address, private=url is None):
                results.append(result)  # noqa: PERF402 - those before a failure are kept
        except MeasurementFailed as error:
            failure = error  # what was measured by then is worth having
    console = Console()
    console.print(headline(around), highlight=False, soft_wrap=True)
    console.print(table(results))
    if json_file is not None:
        report = {"environment": around, "results": as_json(results)}
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with Server() as server:
        yield server.url


def _measured(
    chosen: Sequence[Scenario], n: int | None, rounds: int | None, url: str, *, private: bool
) -> Iterator[Result]:
    """Takes the measurements, showing how far they are."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(
            "", total=sum((rounds or each.rounds) * len(each.sides) for each in chosen)
        )
        steps = -1

        def on_step(scenario: Scenario, times: int, number: int, side: str) -> None:
            nonlocal steps
            steps += 1
            what = f"{scenario.name}, round {number} of {times}, {side}"
            progress.update(task, completed=steps, description=f"{what:34}")

        for servers, members in itertools.groupby(chosen, lambda each: each.servers):
            given = contextlib.nullcontext(dict.fromkeys(SIDES, url))
            with given if servers is None else servers() as urls:
                for scenario in members:
                    times = rounds or scenario.rounds
                    yield measure(
                        scenario,
                        n=n or scenario.n,
                        rounds=times,
                        urls=urls,
                        private=private or servers is not None,
                        on_step=functools.partial(on_step, scenario, times),
                    )


def main() -> int:
    """Runs the command; whatever goes wrong is said in one line. Returns the exit status."""
    try:
        command.main(standalone_mode=False)
    except click.Abort:
        return _say("interrupted", INTERRUPTED)
    except RuntimeError as error:
        # A loop of uvloop that was interrupted as it started can't be closed.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return _say("interrupted", INTERRUPTED)
    except (click.UsageError, UsageError) as error:
        message = error.format_message() if isinstance(error, click.UsageError) else str(error)
        return _say(f"{message} (--help tells more)", BAD_USAGE)
    except MeasurementFailed as error:
        sys.stderr.write(error.log)
        return _say(str(error), FAILED)
    except (
        click.ClickException,
        RelstreamError,
        ServerNotFound,
        ServerStartFailed,
        OSError,
    ) as error:
        return _say(str(error), FAILED)
    return 0


def _say(message: str, status: int) -> int:
    click.echo(f"relstream.bench: {message}", err=True)
    return status
