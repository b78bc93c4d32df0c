"""Bounds of every setting."""

from __future__ import annotations

import math

import pytest

from relstream import InvalidOption, RecoveryConfig, RetryConfig
from relstream.config import check_count, check_flag, check_name, check_seconds

DAY = 86_400
HUGE = 2**31 - 1


def make(option, value):
    if option == "retry.initial_delay" and value == DAY:
        return RetryConfig(initial_delay=value, max_delay=value)
    if option == "retry.max_delay":
        return RetryConfig(max_delay=value, initial_delay=0.001)
    kind, _, field = option.partition(".")
    return {"retry": RetryConfig, "recovery": RecoveryConfig}[kind](**{field: value})


BOUNDS = [
    ("retry.max_retries", -1, HUGE),
    ("retry.initial_delay", 0.001, DAY),
    ("retry.max_delay", 0.001, DAY),
    ("recovery.reconciliation_interval", 0.1, DAY),
    ("recovery.min_idle_time", 0, DAY),
    ("recovery.batch_size", 1, 10_000),
    ("recovery.max_retries", 0, HUGE),
    ("recovery.dlq_max_len", 0, HUGE),
]


@pytest.mark.parametrize(("option", "least", "most"), BOUNDS)
def test_bounds(option, least, most):
    for good in (least, most):
        assert getattr(make(option, good), option.partition(".")[2]) == good
    step = 0.0001 if isinstance(least, float) else 1
    for bad in (least - step, most + step, 10**400, -(10**400)):
        with pytest.raises(InvalidOption) as caught:
            make(option, bad)
        error = caught.value
        assert (error.option, error.value) == (option, bad)
        assert f"{least:g}" in error.expected
        assert isinstance(error, ValueError)


@pytest.mark.parametrize("option", [option for option, _, _ in BOUNDS])
@pytest.mark.parametrize("bad", ["1", None, True, False, math.nan, math.inf, -math.inf, 1j, [1]])
def test_wrong_types(option, bad):
    with pytest.raises(InvalidOption, match=rf"^{option}="):
        make(option, bad)


@pytest.mark.parametrize("option", ["retry.max_retries", "recovery.batch_size"])
def test_whole_numbers_are_whole(option):
    with pytest.raises(InvalidOption, match=f"{option}=2.0: expected a whole number from"):
        make(option, 2.0)


def test_the_largest_pause_is_no_less_than_the_first():
    assert RetryConfig(initial_delay=3, max_delay=3).max_delay == 3
    with pytest.raises(InvalidOption, match=r"^retry.max_delay=2.9.*retry.initial_delay=3"):
        RetryConfig(initial_delay=3, max_delay=2.9)


@pytest.mark.parametrize("bad", ["", "\ud800", b"dlq", 5, True])
def test_name_of_the_dead_letter_stream(bad):
    assert RecoveryConfig().dlq_stream is None
    assert RecoveryConfig(dlq_stream="d").dlq_stream == "d"
    with pytest.raises(InvalidOption, match=r"^recovery.dlq_stream=.*expected a name"):
        RecoveryConfig(dlq_stream=bad)


def test_defaults_are_those_of_the_contract():
    assert RetryConfig() == RetryConfig(max_retries=-1, initial_delay=0.1, max_delay=5.0)
    contract = {"reconciliation_interval": 60, "min_idle_time": 30, "max_retries": 3}
    contract |= {"dlq_stream": None, "dlq_max_len": 10_000}
    assert RecoveryConfig() == RecoveryConfig(**contract)


def test_configs_cannot_be_changed_past_the_checks():
    with pytest.raises(AttributeError):
        RetryConfig().max_retries = -5
    with pytest.raises(AttributeError):
        RecoveryConfig().batch_size = 0


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda v: check_seconds("o", v, 0.1, 5), [0.1, 1, 5.0], [0, 5.01, True, "1", math.nan]),
        (lambda v: check_count("o", v, 1, 5), [1, 5], [0, 6, 1.0, False, "1"]),
        (lambda v: check_flag("o", v), [True, False], [0, 1, None, "yes"]),
        (lambda v: check_name("o", v), ["a", "ä", " ", "\0"], ["", b"a", None, "\udc80"]),
    ],
)
def test_checks(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(InvalidOption, match=r"^o=.*: expected "):
            check(value)
