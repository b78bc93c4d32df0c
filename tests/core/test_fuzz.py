"""The fuzz target works: a second of it here, a minute in CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def fuzz(*options: str) -> str:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz.py")), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{run.returncode}: {run.stdout}"


def test_the_core_stands_some_fuzzing() -> None:
    assert fuzz("--runs", "2000").startswith("0: 2000 runs passed")


def test_what_fails_is_named_to_be_run_again(tmp_path: Path) -> None:
    script = tmp_path / "fuzz.py"
    source = Path(__file__).with_name("fuzz.py")
    script.write_text(
        f"import sys; sys.path.insert(0, {str(source.parent)!r})\n"
        "import faulthandler, fuzz\n"
        "fuzz.TARGETS[:] = [(lambda rng: rng.random() < 0.01 and faulthandler._sigabrt(), 1)]\n"
        "sys.exit(fuzz.main())\n"
    )
    run = subprocess.run(
        [sys.executable, str(script), "--seed", "7"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    again = run.stdout.splitlines()[-1].split("again: ")[1].split()
    assert again[:3] == ["--seed", "7", "--first"]
    assert again[4:] == ["--runs", "1"]
    run = subprocess.run(
        [sys.executable, str(script), *again], capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines()[-1].endswith(" ".join(again))
