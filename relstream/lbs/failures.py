"""What becomes of a stream whose work failed: when it comes back, and what its entry says then."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from relstream._core import backoff, parse_id
from relstream.config import MAX_DELAY
from relstream.errors import InvalidOption
from relstream.lbs.names import (
    ERROR_FIELD,
    ERROR_TYPE_FIELD,
    FAILED_AT_FIELD,
    OWNER_FIELD,
    REASON_MAX_RETRIES,
    REASON_REJECTED,
    RETRY_FIELD,
)

if TYPE_CHECKING:
    from relstream._core import Entry
    from relstream.config import RecoveryConfig
    from relstream.lbs.server_clock import ServerClock

# Bytes of an error's text that are kept.
ERROR_BYTES = 1024


@dataclass(frozen=True)
class Failure:
    """What becomes of one stream that failed."""

    reason: bytes | None
    """Why it is a dead letter; None: it comes back."""
    due_ms: int
    """When (ms, server time)."""
    now: bool
    """Whether it is due at once."""
    fields: dict[bytes, bytes]
    """What its entry says of this; in place of what it said of an earlier failure."""


class Failures:
    """Decides what becomes of streams that fail."""

    def __init__(self, consumer: str, recovery: RecoveryConfig, clock: ServerClock) -> None:
        self._owner = consumer.encode()
        self._recovery = recovery
        self._clock = clock

    def failed(self, head: Entry, error: object, delay: float | None) -> Failure:
        """The work on this stream failed; `delay` in seconds, None as `retry_delay` has it."""
        now = self._clock.now_ms()
        count = max(self._retries(entry, now) for entry in (head, *(head.again or ()))) + 1
        if delay is None:
            longest = self._recovery.retry_delay
            delay = random.random() * backoff(
                count - 1, longest.initial_delay, longest.max_delay, 1.0
            )
        reason = REASON_MAX_RETRIES if count > self._recovery.max_retries else None
        due = now + math.ceil(delay * 1000)
        fields = self._fields(error, now) | {RETRY_FIELD: b"%d" % count}
        return Failure(reason, due, delay == 0, fields)

    def rejected(self, head: Entry, error: object) -> Failure:
        """This stream shall not be delivered again."""
        now = self._clock.now_ms()
        fields = self._fields(error, now) | {RETRY_FIELD: b"%d" % head.retry_count}
        return Failure(REASON_REJECTED, now, False, fields)

    def _retries(self, entry: Entry, now: int) -> int:
        window = self._recovery.retry_window
        announced, _ = parse_id(entry.id) or (now, 0)
        if window is not None and announced < now - window * 1000:
            return 0
        return entry.retry_count

    def _fields(self, error: object, now: int) -> dict[bytes, bytes]:
        fields = {FAILED_AT_FIELD: b"%d" % now, OWNER_FIELD: self._owner}
        fields[ERROR_FIELD], fields[ERROR_TYPE_FIELD] = _described(error)
        return fields


class RecordedFailure(NamedTuple):
    """What the fields of an entry say of the last failure."""

    error: str
    error_type: str
    failed_at: int | None
    """ms since 1970, server time; None where it never failed, or that can't be read."""
    owner: str


def recorded_failure(fields: Mapping[bytes, bytes]) -> RecordedFailure:
    """The last failure, of which texts are empty where the fields say nothing."""
    error, error_type, owner = (
        fields.get(name, b"").decode(errors="replace")
        for name in (ERROR_FIELD, ERROR_TYPE_FIELD, OWNER_FIELD)
    )
    failed_at = fields.get(FAILED_AT_FIELD, b"")
    known = re.fullmatch(rb"[0-9]{1,19}", failed_at)
    return RecordedFailure(error, error_type, int(failed_at) if known else None, owner)


def check_delay(delay: object) -> None:
    """Raises `InvalidOption` unless a failed stream can wait for so many seconds."""
    number = isinstance(delay, (int, float)) and not isinstance(delay, bool)
    if delay is not None and not (number and 0 <= delay <= MAX_DELAY):  # type: ignore[operator]
        raise InvalidOption(
            "delay", delay, f"a number of seconds from 0 to {MAX_DELAY:.0f} (30 days), or None"
        )


def _described(error: object) -> tuple[bytes, bytes]:
    """Text and type of an error, bounded, as they can be stored; text alone has no type."""
    if error is None:
        return b"", b""
    kind = "" if isinstance(error, str) else _type_name(type(error))
    try:
        text = str(error)
    except Exception as another:  # noqa: BLE001 - whatever an application's error does
        text = f"its text can't be shown: {_type_name(type(another))}"
    return stored_text(text), stored_text(kind)


def _type_name(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def with_detail(pairs: list[bytes], detail: str) -> list[bytes]:
    """Fields of what becomes a dead letter, with the detail of why; what failed before stays."""
    if not detail or ERROR_FIELD in pairs[::2]:
        return pairs
    return [*pairs, ERROR_FIELD, stored_text(detail)]


def stored_text(text: str) -> bytes:
    """A text as it can be stored: cut at 1 KB, without what no field may have."""
    # A character takes a byte at least, so no more of them are looked at.
    encoded = text[:ERROR_BYTES].replace("\0", "\ufffd").encode(errors="replace")
    return encoded[:ERROR_BYTES].decode(errors="ignore").encode()
