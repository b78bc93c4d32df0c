"""The options of a client, validated, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from relstream.config import RecoveryConfig, RetryConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """The validated options of a client. Times are in seconds."""

    consumer: str
    heartbeat: float
    queue_size: int
    max_streams: int | None
    retry: RetryConfig
    patience: float
    """For so long no number of retries is too many, as a lost master is being replaced."""
    recovery: RecoveryConfig
    auto_claim: bool
    force_config_override: bool
    renew_in_thread: bool
