"""Failures that repeat: logged when they begin, by count while they last, and when they end."""

from __future__ import annotations

import logging
import time

# Seconds between two warnings of a failure that goes on.
REMIND_EVERY = 60.0


class Repeats:
    """Logs one kind of failure at `level` the first time, and once a minute by count after that.

    Each single one in between is logged for debugging.
    """

    def __init__(self, what: str, logger: logging.Logger, level: int = logging.WARNING) -> None:
        self._what = what
        self._logger = logger
        self._level = level
        self._since = self._reminded = 0.0
        self.failures = 0
        """How many there were since it worked last."""

    def failed(self, text: str, *args: object) -> None:
        """It failed; the text says how, and what follows."""
        now = time.monotonic()
        self.failures += 1
        if self.failures == 1:
            self._since = self._reminded = now
            self._logger.log(self._level, text, *args)
        elif now - self._reminded >= REMIND_EVERY:
            self._reminded = now
            self._logger.log(
                self._level,
                f"{text} (%s has failed for %.0f s, %d times so far)",
                *args, self._what, now - self._since, self.failures,
            )  # fmt: skip
        else:
            self._logger.debug(text, *args)

    def worked(self) -> None:
        """It works, again if it had failed."""
        if self.failures:
            self._logger.info(
                "%s works again after %d failures in %.1f s",
                self._what, self.failures, time.monotonic() - self._since,
            )  # fmt: skip
            self.failures = 0
