"""Whatever a caller hands in, or does in the middle of a call: an exception, and never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from core import misuse

# One such call, that should hang, ends with the whole group.
TIMEOUT = 240


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each, in a process of its own that goes on behind one that crashed."""
    found: dict[str, str] = {}
    while len(found) < len(misuse.ALL):
        try:
            run = subprocess.run(
                [sys.executable, str(Path(misuse.__file__)), str(len(found))],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
            said, why = run.stdout, f"ended the process: {run.returncode}\n{run.stderr[-2000:]}"
        except subprocess.TimeoutExpired as error:
            said, why = (error.stdout or b"").decode(), "never returned"
        for line in said.splitlines():
            name, outcome = [*json.loads(line), why][:2]
            found[name] = outcome
        assert said, why
    return found


@pytest.mark.timeout(2 * TIMEOUT)
def test_wrong_arguments_are_refused(outcomes: dict[str, str]) -> None:
    others = {name: outcomes[name] for name in misuse.REFUSED if outcomes[name] != "refused"}
    assert not others


@pytest.mark.timeout(2 * TIMEOUT)
def test_code_run_in_the_middle_of_a_call_does_no_harm(outcomes: dict[str, str]) -> None:
    others = {
        name: outcomes[name]
        for name in misuse.SURVIVED
        if outcomes[name] not in ("refused", "done")
    }
    assert not others
