"""Whether a consumer lives and is ready, and why not; from what its parts know, without I/O."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relstream.engine.pausing import PAUSED
from relstream.engine.unrenewed import RENEWAL

if TYPE_CHECKING:
    from relstream.engine.partition import Partition
    from relstream.engine.twins import Twins
    from relstream.ownership.capacity import Capacity
    from relstream.ownership.renewer import LeaseRenewer

__all__ = ["Health"]

# Seconds between two pulses of the event loop at most; a quarter of a heartbeat if that is less.
PULSE = 1.0
# Pulses that the loop may miss.
MISSED = 2
# Seconds for which the answer to a read may be late; a quarter of a heartbeat if that is less.
LATE = 1.0


@dataclass(frozen=True)
class Health:
    """The state of one consumer at one moment. Ages are in seconds."""

    live: bool
    """The event loop answers, every background task runs, and leases were renewed, or could have
    been, within the last `heartbeat_interval`. When it stays False, restart the process."""
    ready: bool
    """The client is open, the consumer group can be reached, and nothing keeps it from reading,
    but that it may own as many streams as it may."""
    leader: bool
    """This consumer recovers for the service, or for a partition of it, at the moment."""
    owned: int
    """Owned streams, including those that wait or are being finished."""
    waiting: int
    """Owned streams whose `STREAM_ADDED` was not taken from the notifications yet."""
    last_renewal_age: float | None
    """Since leases were renewed last, or were found to be renewable; None: never."""
    last_read_age: float | None
    """Since the last read was answered; None: never. Grows while there is no room for more."""
    reasons: tuple[str, ...]
    """What is wrong, a text each; empty when all is well."""


class HealthMonitor:
    """Puts together what the parts of a client know. `health` may be called in any thread.

    A pulse on the event loop shows that it answers; nothing is left of it after `stop`.
    """

    def __init__(
        self,
        renewer: LeaseRenewer,
        partitions: Sequence[Partition],
        *,
        room: Capacity,
        twins: Twins,
        heartbeat: float,
        waiting: Callable[[], int],
    ) -> None:
        self._renewer = renewer
        self._partitions = partitions
        self._capacity = room
        self._twins = twins
        self._heartbeat = heartbeat
        self._waiting = waiting
        self._every = min(heartbeat / 4, PULSE)
        self._late = max(min(heartbeat / 4, LATE), 0.1)
        self._pulsed_at = 0.0
        self._thread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = "the client is not open yet: init() was not called, or has not returned"
        self._open = False
        self._closed = True
        self._failure: str | None = None

    # --- on the application's loop -------------------------------------------------------------

    def start(self) -> None:
        """The client is open."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._open, self._closed = True, False
        self._pulse()

    def _pulse(self) -> None:
        assert self._loop is not None
        self._pulsed_at = time.monotonic()
        self._timer = self._loop.call_later(self._every, self._pulse)

    def failed(self, reason: str) -> None:
        """A background task has ended, and with it the client."""
        self._failure = reason

    def closing(self) -> None:
        """The client begins to close."""
        self._open = False
        self._state = "the client is closing"

    def stop(self) -> None:
        """The client is closed."""
        self._open, self._closed = False, True
        self._state = "the client is closed"
        if self._timer is not None:
            self._timer.cancel()

    # --- in any thread -------------------------------------------------------------------------

    def health(self) -> Health:
        """How the consumer is at this moment. Does no I/O and waits for nothing."""
        now = time.monotonic()
        renewed_at = self._renewer.renewed_at
        renewal_age = None if renewed_at is None else max(now - renewed_at, 0.0)
        reads = [part.fetcher.read_at for part in self._partitions]
        read_at = min((at for at in reads if at is not None), default=None)
        lifeless, unready = self._lifeless(now, renewal_age), self._unready(now)
        owned = sum(len(part.leases) for part in self._partitions)
        twin = self._twins.other
        others = [] if twin is None or self._closed else [
            f"another living consumer has this consumer's name: {twin}"
        ]  # fmt: skip
        if not self._closed:
            others += [
                part.recoverer.lasting for part in self._partitions if part.recoverer.lasting
            ]
        unrenewed = [] if self._closed else self._unrenewed(now)
        return Health(
            live=not lifeless,
            ready=not lifeless and not unready,
            leader=any(part.recoverer.leads for part in self._partitions),
            owned=owned,
            waiting=min(self._waiting(), owned),
            last_renewal_age=renewal_age,
            last_read_age=None if read_at is None else max(now - read_at, 0.0),
            reasons=tuple(dict.fromkeys([*lifeless, *unready, *unrenewed, *others])),
        )

    def _lifeless(self, now: float, renewal_age: float | None) -> list[str]:
        if self._closed:
            return [self._state]
        reasons = []
        if self._failure is not None:
            reasons.append(f"the client has ended: {self._failure}")
        # Who asks on the loop itself has the answer.
        asleep = now - self._pulsed_at
        if threading.get_ident() != self._thread and asleep > (1 + MISSED) * self._every:
            reasons.append(
                f"the event loop has not run for {asleep:.1f} s: something blocks it, or it ended"
            )
        if renewal_age is None or renewal_age >= self._heartbeat:
            since = "never" if renewal_age is None else f"{renewal_age:.1f} s ago"
            reasons.append(f"leases were renewed last {since}: their locks may have expired")
        return reasons

    def _unready(self, now: float) -> list[str]:
        if not self._open:
            return [self._state]
        reasons = []
        if self._capacity.closed_for(PAUSED):
            reasons.append("reading is paused, by pause() or drain()")
        if self._capacity.closed_for(RENEWAL):
            reasons.append("nothing new is read, as leases can't be renewed")
        # Answers that came while the loop was blocked may not have been looked at.
        heard_until = min(now, self._pulsed_at + self._every)
        for part in self._partitions:
            if (error := part.fetcher.failing) is not None:
                reasons.append(f"reading {part.names.lbs.decode()!r} fails: {error}")
            elif (asked := part.fetcher.asked) is not None:
                asked_at, may_take = asked
                if heard_until - asked_at > may_take + self._late:
                    reasons.append(
                        f"reading {part.names.lbs.decode()!r} has had no answer for "
                        f"{heard_until - asked_at - may_take:.1f} s"
                    )
        return reasons

    def _unrenewed(self, now: float) -> list[str]:
        """Why leases are not renewed; of a server that is only slow not yet."""
        reasons = []
        for server, trouble in self._renewer.troubles(now).items():
            where = "" if server is None else f" on {server}"
            if trouble.error is not None:
                reasons.append(f"leases can't be renewed{where}: {trouble.error}")
            elif trouble.silent_since is not None:
                silent = now - trouble.silent_since
                if silent > self._late:
                    reasons.append(f"renewing leases{where} has had no answer for {silent:.1f} s")
        return reasons
