"""How long to wait before the next attempt, and for how long to try."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from relstream._core import backoff
from relstream.errors import RelstreamError, is_forbidden

if TYPE_CHECKING:
    pass

# Seconds for which a refusal of the user, or of a right, is waited out: rights may be on their way.
FORBIDDEN_FOR = 60.0


class Backoff:
    """How long to wait before the next try: doubling, capped, jittered. Times in seconds."""

    def __init__(self, initial: float, maximum: float) -> None:
        self._initial = initial
        self._maximum = maximum
        self._since = 0.0
        self.failures = 0

    def reset(self) -> None:
        """Something worked."""
        self.failures = 0

    def failed(self) -> float:
        """Counts one more failure; returns the pause to make before the next try."""
        if not self.failures:
            self._since = time.monotonic()
        pause = backoff(self.failures, self._initial, self._maximum, random.random())
        self.failures += 1
        return pause

    def exhausted(self, max_retries: int, patience: float = 0.0) -> bool:
        """Whether one more failure is one too many: -1 retries are for ever, 0 none.

        For `patience` seconds from the first failure no number of retries is too many.
        """
        if self.failures < max_retries or max_retries < 0:
            return False
        return not max_retries or time.monotonic() - self._since >= patience


class Forbidden:
    """Bounds the time for which refusals of the user, or of a right, are waited out.

    Counts the pauses after them: what an outage in between takes is no refusal.
    """

    def __init__(self) -> None:
        self._waited = 0.0

    def reset(self) -> None:
        """Something was allowed."""
        self._waited = 0.0

    def exhausted(self, error: RelstreamError) -> bool:
        """Whether this is a refusal, and they have lasted for too long."""
        return is_forbidden(error) and self._waited >= FORBIDDEN_FOR

    def pause(self, error: RelstreamError, seconds: float) -> float:
        """How much of a pause after this error to make, so that it ends in time."""
        if is_forbidden(error):
            seconds = min(seconds, FORBIDDEN_FOR - self._waited)
            self._waited += seconds
        return seconds
