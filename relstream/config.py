"""Settings, their defaults and their bounds. All times are in seconds."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from relstream.errors import InvalidOption

__all__ = ["ClusterMode", "RecoveryConfig", "RetryConfig", "RetryDelay"]

# The longest time that a failed stream may wait, in seconds.
MAX_DELAY = 30 * 86_400.0


class ClusterMode(enum.Enum):
    """What kind of deployment the given Redis is."""

    SINGLE_SHARD = "single_shard"
    """One master holds everything."""
    OSS = "oss"
    """An open-source Redis Cluster."""


def check_seconds(option: str, value: object, least: float, most: float = 86_400.0) -> None:
    """Raises `InvalidOption` unless `value` is a number of seconds within the bounds."""
    # NaN is within no bounds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InvalidOption(option, value, f"a number of seconds from {least:g} to {most:g}")


def check_count(option: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    """Raises `InvalidOption` unless `value` is a whole number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidOption(option, value, f"a whole number from {least} to {most}")


def check_flag(option: str, value: object) -> None:
    """Raises `InvalidOption` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InvalidOption(option, value, "True or False")


def check_name(option: str, value: object) -> None:
    """Raises `InvalidOption` unless `value` is text that can name something in Redis."""
    try:
        if isinstance(value, str) and value.encode():
            return
    except UnicodeEncodeError:  # a lone surrogate
        pass
    raise InvalidOption(option, value, "a name: Unicode text that is not empty")


@dataclass(frozen=True)
class RetryConfig:
    """How often a failing read is tried again; the count starts anew with each good read.

    By default an outage of any length is waited out. Two failures end the client all the same, as
    waiting does not heal them: a load balancer stream that is no stream, at once, and a server that
    forbids reading (NOPERM, NOAUTH, a wrong password), after 60 s.
    """

    max_retries: int = -1
    """-1: for ever; 0: the first failure ends the client."""
    initial_delay: float = 0.1
    """Seconds before the first repetition; doubles with each further one."""
    max_delay: float = 5.0
    """Seconds that no pause exceeds."""

    def __post_init__(self) -> None:
        check_count("retry.max_retries", self.max_retries, -1)
        check_seconds("retry.initial_delay", self.initial_delay, 0.001)
        check_seconds("retry.max_delay", self.max_delay, 0.001)
        if self.max_delay < self.initial_delay:
            raise InvalidOption(
                "retry.max_delay",
                self.max_delay,
                f"no less than retry.initial_delay={self.initial_delay:g}",
            )


@dataclass(frozen=True)
class RetryDelay:
    """How long a failed stream waits before it is delivered again, see `StreamClient.fail`.

    Doubles with each retry; drawn uniformly from 0 up to that (full jitter), so that streams that
    failed together do not come back together.
    """

    initial_delay: float = 1.0
    """Seconds, at most, before the first retry."""
    max_delay: float = 60.0
    """Seconds that no delay exceeds."""

    def __post_init__(self) -> None:
        name = "recovery.retry_delay"
        check_seconds(f"{name}.initial_delay", self.initial_delay, 0.0, MAX_DELAY)
        check_seconds(f"{name}.max_delay", self.max_delay, self.initial_delay, MAX_DELAY)


@dataclass(frozen=True)
class RecoveryConfig:
    """How streams of dead consumers, and failed ones, come back, and when they are dead letters."""

    reconciliation_interval: float = 60.0
    """Seconds between two scans of the pending entries."""
    min_idle_time: float = 30.0
    """Seconds for which an entry must not have been delivered before a scan looks at it."""
    batch_size: int = 1000
    """Pending entries a page."""
    max_retries: int = 3
    """How often an entry is requeued, after a death or a failure, before it is a dead letter."""
    retry_window: float | None = 3600.0
    """Seconds within which retries count: an entry that was announced or requeued longer ago than
    this (its LBS id tells) starts again at 1. None: they count for the whole life of a stream, as
    for the Go client."""
    retry_delay: RetryDelay = RetryDelay()
    """How long a stream that failed without a delay of its own waits."""
    dlq_stream: str | None = None
    """Key of the dead-letter stream; `<service>-input-dlq` unless given."""
    dlq_max_len: int = 10_000
    """About how many dead letters are kept; 0: all."""

    def __post_init__(self) -> None:
        check_seconds("recovery.reconciliation_interval", self.reconciliation_interval, 0.1)
        check_seconds("recovery.min_idle_time", self.min_idle_time, 0.0)
        check_count("recovery.batch_size", self.batch_size, 1, 10_000)
        check_count("recovery.max_retries", self.max_retries, 0)
        if self.retry_window is not None:
            check_seconds("recovery.retry_window", self.retry_window, 0.0, 10 * 365 * 86_400.0)
        if not isinstance(self.retry_delay, RetryDelay):
            raise InvalidOption("recovery.retry_delay", self.retry_delay, "a RetryDelay")
        check_count("recovery.dlq_max_len", self.dlq_max_len, 0)
        if self.dlq_stream is not None:
            check_name("recovery.dlq_stream", self.dlq_stream)
