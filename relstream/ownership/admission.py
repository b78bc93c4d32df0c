"""Locks what was read; entries whose locks are refused for now are deferred, and tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from relstream._core import Entry, lock_keys
from relstream.backoff import Backoff
from relstream.errors import (
    RelstreamError,
    ReplyError,
    is_retriable,
)
from relstream.lbs.entries import TOO_LATE
from relstream.notifications import MAX_WAITING_BYTES
from relstream.repeats import Repeats

if TYPE_CHECKING:
    from relstream.config import RetryConfig
    from relstream.net.endpoint import Endpoint
    from relstream.net.topology import Topology
    from relstream.notifications import Notifications
    from relstream.ownership.capacity import Capacity

# Entries that may be deferred; with more, little is read.
MOST_DEFERRED = 10_000


class Admission:
    """Locks batches of entries that were just read, and keeps those that it can't lock yet.

    Probe mode: all servers refuse locks, or too many entries are deferred. Then what is deferred
    is tried until it is requeued, and single entries are read until a lock succeeds.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        notifications: Notifications,
        capacity: Capacity,
        acquire: Callable[..., Awaitable[tuple[list[Entry], list[tuple[Entry, ReplyError]]]]],
        hand_back: Callable[[list[Entry]], Awaitable[list[bytes]]],
        unlock: Callable[[list[bytes]], Awaitable[list[bytes]]],
        on_late: Callable[[], None],
        recovered_after: float,
        retry: RetryConfig,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._notifications = notifications
        self._capacity = capacity
        self._acquire_leases = acquire
        self._hand_back = hand_back
        self._unlock = unlock
        self._on_late = on_late
        self._logger = logger
        self._fails = Repeats("locking", logger, logging.ERROR)
        self.deferred: list[Entry] = []
        """Entries whose locks were refused for now: OOM, say, or one master of several hangs. They
        are tried again long before others may take them for a dead owner's."""
        self._deferred_since = 0.0
        self._deferred_asked_at = 0.0  # when the first of them was asked for
        self.again_at = 0.0
        """When the deferred are tried again (loop time)."""
        soon = max(recovered_after, 0.1)
        self.defer_for = soon / 3
        """Seconds after which deferred entries are requeued."""
        self._refusals = Backoff(retry.initial_delay, min(retry.max_delay, 2.0, soon / 4))
        self.probing = False
        """Whether this is in probe mode."""
        # Servers of locks that were refused since one was taken.
        self._refusing: set[Endpoint | None] = set()
        # Batches whose locks are being asked for: no audit may take these for strays.
        self._locking: list[list[Entry]] = []

    @property
    def idle(self) -> bool:
        """Whether no entry is being locked, or deferred."""
        return not (self._locking or self.deferred)

    def in_hand(self) -> set[bytes]:
        """Ids of entries that were read, and are neither owned yet nor requeued."""
        return {entry.id for entries in (*self._locking, self.deferred) for entry in entries}

    async def leave(self) -> None:
        """Puts back what was refused; for after `run` has ended."""
        keys = lock_keys(self.deferred)
        with contextlib.suppress(RelstreamError):  # locks taken unheard of, if any, expire
            await self._unlock(keys)
        self._deferred_since = -math.inf
        await self._return_deferred()

    async def lock(
        self, entries: list[Entry], asked_at: float, *, again: bool = False
    ) -> list[Entry]:
        """Takes locks; returns entries of new streams. What is refused for now is `deferred`."""
        self._locking.append(entries)
        try:
            new, refusals = await self._acquire_leases(entries, asked_at, again=again)
            late = [entry for entry, error in refusals if error is TOO_LATE]
            if late:
                self._on_late()
                stay = set(await self._hand_back(late))
                refusals = [
                    (entry, error)
                    for entry, error in refusals
                    if error is not TOO_LATE or entry.id in stay
                ]
        except RelstreamError:  # the locks may be ours, or not
            self._defer(entries, asked_at)
            raise
        finally:
            self._locking.remove(entries)
        hopeless = next((error for _, error in refusals if not is_retriable(error)), None)
        if hopeless is not None:
            self._fails.failed("locks were refused, their entries stay pending: %s", hopeless)
        waiting = [entry for entry, error in refusals if is_retriable(error)]
        if waiting:
            if not self._refusals.failures:
                self._logger.warning("locks are refused for now, trying again: %s", refusals[-1][1])
            self._defer(waiting, asked_at)
            self._try_later()
        elif not self.deferred:
            self._refusals.reset()
        if len(waiting) < len(entries):
            self._refusing.clear()
        else:
            self._refusing.update(self._topology.group_by_node(lock_keys(waiting)))
        self.probing = (
            (bool(self._refusing) and self._refusing >= self._topology.servers)
            or len(self.deferred) > MOST_DEFERRED
            or sum([entry.cost for entry in self.deferred]) > MAX_WAITING_BYTES
        )
        return new

    def _defer(self, entries: list[Entry], asked_at: float) -> None:
        if not self.deferred:
            self._deferred_since = asyncio.get_running_loop().time()
            self._deferred_asked_at = asked_at
        self._deferred_asked_at = min(self._deferred_asked_at, asked_at)
        self.deferred += entries

    def _try_later(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self.again_at:
            self.again_at = now + self._refusals.failed()

    async def retry(self) -> None:
        """Tries once more to lock what was refused."""
        room = max(self._capacity.available_for(self), 0)
        since, asked_at = self._deferred_since, self._deferred_asked_at
        failure: RelstreamError | None = None
        fitting, self.deferred = self.deferred[:room], self.deferred[room:]
        if fitting:
            self._capacity.reserve(len(fitting))
            try:
                self._notifications.added(await self.lock(fitting, asked_at, again=True))
            except RelstreamError as error:
                failure = error
            finally:
                self._capacity.release(len(fitting))
                self._deferred_since = since
        await self._return_deferred()
        if failure is not None:
            raise failure

    async def _return_deferred(self) -> None:
        """Puts back what was refused for so long that it might be taken for a dead owner's.

        A retry would be counted then; and others may be able to lock what we are not.
        """
        now = asyncio.get_running_loop().time()
        if self.deferred and now - self._deferred_since >= self.defer_for:
            stay = set(await self._hand_back(self.deferred))
            self.deferred = [entry for entry in self.deferred if entry.id in stay]
            self._deferred_since = now
        if self.deferred:
            self._try_later()
