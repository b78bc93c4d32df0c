"""When to try again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relstream._core import backoff, jittered

chances = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("attempt", "expected"), [(-1, 0.1), (0, 0.1), (1, 0.2), (5, 3.2), (8, 25.6), (9, 30.0)]
)
def test_backoff_doubles_up_to_the_maximum(attempt: int, expected: float) -> None:
    assert backoff(attempt, 0.1, 30.0, 1.0) == pytest.approx(expected)
    assert backoff(attempt, 0.1, 30.0, 0.0) == pytest.approx(expected / 2)


@given(st.integers(-(2**31), 2**31 - 1), chances)
def test_backoff_stays_in_the_upper_half(attempt: int, chance: float) -> None:
    pause = min(30.0, 0.1 * 2.0 ** max(0, min(attempt, 60)))
    assert pause / 2 <= backoff(attempt, 0.1, 30.0, chance) <= pause


@given(st.floats(0.001, 1e6), st.floats(0, 1), chances)
def test_jitter_only_lengthens(interval: float, fraction: float, chance: float) -> None:
    assert interval <= jittered(interval, fraction, chance) <= interval * (1 + fraction)


def test_jitter_is_spread_evenly() -> None:
    spread = [jittered(60, 0.1, chance) for chance in (0, 0.25, 0.5)]
    assert spread == pytest.approx([60, 61.5, 63])
