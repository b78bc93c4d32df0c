"""Reads the load balancer stream: what is announced becomes owned, and is told."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson

from relstream._core import STREAMS, Batch, Entry, announcements, pack
from relstream.backoff import Backoff, Forbidden
from relstream.errors import (
    DeadlineExceeded,
    ProtocolError,
    RelstreamError,
    ReplyError,
    is_retriable,
)
from relstream.lbs.names import (
    INPUT_FIELD,
    RETRY_FIELD,
    SEPARATOR,
    Names,
)
from relstream.lbs.stream import fitting
from relstream.ownership.admission import Admission
from relstream.ownership.rejects import Rejects
from relstream.repeats import Repeats
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig, RetryConfig
    from relstream.lbs.requeue import Requeuer
    from relstream.net.topology import KeyConnection, Topology
    from relstream.notifications import Notifications
    from relstream.ownership.capacity import Capacity
    from relstream.recorder import SafeRecorder

# A read waits on the server for this long, in seconds: so long may closing take where the server
# does not let us cut the wait short.
BLOCK = 1.0
# And for this long where others, who read for the same consumer, get no room meanwhile.
BLOCK_OTHERS = 0.1
# Entries a read at most, and the bytes of reply that it should not exceed.
LARGEST_READ = 1000
READ_BYTES = 4 << 20


class Fetcher:
    """Reads, locks and tells, in batches, as long as there is room.

    While batches are being locked the next one is being read.
    """

    def __init__(
        self,
        reading: KeyConnection,
        topology: Topology,
        names: Names,
        consumer: str,
        *,
        notifications: Notifications,
        capacity: Capacity,
        acquire: Callable[..., Awaitable[tuple[list[Entry], list[tuple[Entry, ReplyError]]]]],
        audit: Callable[[], Awaitable[None]],
        hand_back: Callable[[list[Entry]], Awaitable[list[bytes]]],
        unlock: Callable[[list[bytes]], Awaitable[list[bytes]]],
        requeuer: Requeuer,
        recovered_after: float,
        retry: RetryConfig,
        patience: float,
        recovery: RecoveryConfig,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._reading = reading
        self._topology = topology
        self._link = topology.link(names.lbs)
        self._names = names
        self._consumer = consumer
        self._notifications = notifications
        self._capacity = capacity
        self._audit = audit
        self._retry = retry
        self._patience = patience
        self._logger = logger
        self._rejects = Rejects(names, requeuer, recovery, recorder, logger)
        self.admission = Admission(
            topology,
            notifications=notifications,
            capacity=capacity,
            acquire=acquire,
            hand_back=hand_back,
            unlock=unlock,
            on_late=self._read_less,
            recovered_after=recovered_after,
            retry=retry,
            logger=logger,
        )
        # Small enough that two batches fit: one is read while the other is locked or told.
        self._largest = max(1, min(LARGEST_READ, notifications.room // 2))
        self._count = 1
        self._taking: deque[asyncio.Task[None]] = deque()
        self._forbidden = Forbidden()
        self._backoff = Backoff(retry.initial_delay, retry.max_delay)
        self._reading_fails = Repeats("reading", logger)
        self._recreated = False  # the group, and nothing has worked since
        self._audited = False
        self._stopping = False
        self._blocked = False
        self._ended = False
        self.failing: str | None = None
        """Why the last read failed; None when it did not."""
        self.read_at: float | None = None
        """When the last read was answered, on the clock of time.monotonic(); None: none was yet."""
        self.asked: tuple[float, float] | None = None
        """When what has no answer yet was sent, on that clock, and for how many seconds the server
        may take its time; None: nothing is asked."""

    # --- from outside -------------------------------------------------------------------------

    async def stop(self) -> None:
        """Lets `run` return once the server has answered the read under way."""
        self._stopping = True
        self._notifications.room_made.set()
        await self._end_read(lambda: True)

    async def pause(self) -> None:
        """Ends the read under way, for when there is no room any more (`Capacity.close`)."""
        await self._end_read(lambda: self._capacity.closed)

    @property
    def settled(self) -> bool:
        """Whether nothing is being read, being locked, or waits for a lock."""
        taking = any(not task.done() for task in self._taking)
        return self._ended or not (self._blocked or taking or not self.admission.idle)

    async def _end_read(self, wanted: Callable[[], bool]) -> None:
        """Returns when the read under way is answered, or its end is `wanted` no more."""
        while self._blocked and wanted():
            try:
                # Where it waits, which need not be where it was sent first.
                for server, protocol in self._reading.waiting:
                    link = self._topology.to(server)
                    # ERROR, as Redis 7.0 may crash otherwise: where the read waits for the end of a
                    # pause, as in a failover.
                    await link.execute(b"CLIENT", b"UNBLOCK", protocol.client_id, b"ERROR")
            except RelstreamError:  # not allowed, or no connection: the read ends by itself
                await asyncio.sleep(BLOCK)
            await asyncio.sleep(0.01)

    # --- the loop -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads until `stop`. Raises the last error when reading failed too often in a row.

        Also an error that waiting does not heal: at once, or once it has lasted for too long.
        """
        try:
            while not self._stopping:
                try:
                    await self._step()
                except RelstreamError as error:
                    self._capacity.end_turn(self)
                    await asyncio.gather(*self._taking, return_exceptions=True)
                    self._taking.clear()
                    await self._repair(error)
            await self._finish_locking()
        finally:
            self._capacity.end_turn(self)
            await cancel_and_wait(self._taking)
            self._ended = True

    async def _repair(self, error: RelstreamError) -> None:
        """Answers a failure: by a pause, or by raising it again when there were too many."""
        if self._stopping:
            return
        gone = isinstance(error, ReplyError) and error.code == "NOGROUP"
        if gone:
            try:
                await self.create_group()
            except RelstreamError as failure:
                error, gone = failure, False
        if gone and not self._recreated:
            # At once, but for the first time only: it may be said of a group that is there.
            self._recreated = True
            self._reading_fails.failed(
                "the consumer group was gone and is created again: %s", error
            )
            return
        self.failing = str(error)
        if isinstance(error, (DeadlineExceeded, ProtocolError)):
            self._read_less()
        if isinstance(error, ReplyError) and error.code in ("NOPERM", "WRONGTYPE", "NOAUTH"):
            error = ReplyError(f"{error} ({self._names.lbs.decode()!r})")
            if error.code == "WRONGTYPE":
                raise error
        patience = self._patience if is_retriable(error) else 0.0
        if self._forbidden.exhausted(error) or self._backoff.exhausted(
            self._retry.max_retries, patience
        ):
            raise error
        pause = self._forbidden.pause(error, self._backoff.failed())
        self._reading_fails.failed("reading failed, trying again in %.2f s: %s", pause, error)
        await asyncio.sleep(pause)

    def _read_less(self) -> None:
        """The last reply may have been too large."""
        self._count = max(self._count // 8, 1)

    def _worked(self) -> None:
        """What was read is owned, or there was nothing to read."""
        self._backoff.reset()
        self._reading_fails.worked()
        self._recreated = False

    async def create_group(self) -> None:
        """Creates stream and group, at the first entry: what was announced before us counts too."""
        try:
            # Out of memory, a server would refuse to create even what is there already.
            await self._link.execute(
                b"XPENDING", self._names.lbs, self._names.group, b"0-0", b"0-0", 1
            )
            return
        except ReplyError as error:
            if error.code != "NOGROUP":
                raise
        try:
            await self._link.execute(
                b"XGROUP", b"CREATE", self._names.lbs, self._names.group, b"0", b"MKSTREAM"
            )
        except ReplyError as error:
            if error.code != "BUSYGROUP":
                raise

    async def _step(self) -> None:
        while self._taking and self._taking[0].done():
            self._taking.popleft().result()
        self._audited = self._audited and self._reading.alive
        if not self._reading.alive:
            self.asked = time.monotonic(), 0.0
        try:
            await self._reading.get()
        finally:
            self.asked = None
        if not self._audited:
            # The reply to a read may have been lost with the connection. Those in hand are known.
            await self._finish_locking()
            await self._audit()
            self._audited = True
        loop = asyncio.get_running_loop()
        if self.admission.probing:
            await asyncio.sleep(self.admission.again_at - loop.time())
        if self.admission.deferred and loop.time() >= self.admission.again_at:
            await self._finish_locking()
            await self.admission.retry()
        if self.admission.probing and self.admission.deferred:
            return
        if self._stopping:
            return
        room = self._capacity.available_for(self)
        wanted = 1 if self.admission.probing else self._count
        if room < wanted and self._taking:
            await self._taking.popleft()  # rather than reading in small portions
            return
        block = BLOCK
        if self._taking:  # some of them may be refused
            block = min(block, self.admission.defer_for / 2)
        if self.admission.deferred:
            block = min(block, max(self.admission.again_at - loop.time(), 0.001))
        if room <= 0:
            self.failing = None
            self._worked()
            self._capacity.wait_turn(self)
            made = self._notifications.room_made.wait()
            try:
                await asyncio.wait({made}, timeout=block if self.admission.deferred else None)
            finally:
                made.cancel()
            return
        count = min(room, wanted)
        asked_at = loop.time()
        batches: list[Batch] = []
        self._capacity.reserve(count)
        self._capacity.end_turn(self)
        if self._capacity.all_taken():
            block = min(block, BLOCK_OTHERS)
        try:
            batches = await self._read(count, block)
        finally:
            self._capacity.release(count - sum(map(len, batches)))
        if not batches:
            await self._finish_locking()
            self._worked()
            return
        batch = batches[0]
        # How large many of them are is not known from one.
        most = min(max(self._count, 2 * len(batch)), self._largest)
        self._count = min(most, fitting([batch], READ_BYTES))
        if self._taking or (len(batch) == count and not self.admission.probing):
            # There is more: it is read while these are being locked.
            before = self._taking[-1] if self._taking else None
            self._taking.append(asyncio.ensure_future(self._take(batches, asked_at, before)))
        else:
            await self._take(batches, asked_at)
            # Whoever waits for these hears of them before the next read is sent.
            await asyncio.sleep(0)

    async def _finish_locking(self) -> None:
        """Waits for the batches that are being locked."""
        outcomes = await asyncio.gather(*self._taking, return_exceptions=True)
        self._taking.clear()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _read(self, count: int, block: float) -> list[Batch]:
        command = pack(
            b"XREADGROUP", b"GROUP", self._names.group, self._consumer, b"COUNT", count,
            b"BLOCK", math.ceil(block * 1000), b"STREAMS", self._names.lbs, b">",
        )  # fmt: skip
        timeout = block + self._reading.endpoint.timeout
        protocol = await self._reading.get()
        received = protocol.received
        self._blocked = True
        self.asked = time.monotonic(), block
        try:
            (reply,) = await self._reading.pipeline(command, 1, decode=STREAMS, timeout=timeout)
        except DeadlineExceeded:
            if protocol.received != received:
                raise
            # Redis 7.2.0 to 7.2.4 starts the timer of a blocked read anew for each entry that
            # another gets. Whether the server hangs shows when the connection is opened again, and
            # is asked for what this read may have been given after all.
            self._logger.debug("a blocked read was not answered in time: it is sent again")
            return []
        finally:
            self._blocked = False
            self.asked = None
        if isinstance(reply, ReplyError):
            if reply.code == "UNBLOCKED":
                self._forbidden.reset()
                return []
            raise reply
        self._forbidden.reset()
        self.failing = None
        self.read_at = time.monotonic()
        batches: list[Batch] = reply
        return batches

    async def _take(
        self, batches: list[Batch], asked_at: float, before: asyncio.Task[None] | None = None
    ) -> None:
        """Locks the entries of these batches, and tells of those that are owned now.

        Not ahead of those read `before`, whose locks may be on a master that takes longer.
        """
        try:
            entries: list[Entry] = []
            unreadable: list[tuple[Batch, list[tuple[int, str]]]] = []
            misplaced: list[tuple[Batch, list[Entry]]] = []
            for batch in batches:
                good, bad, _ = announcements(
                    batch, INPUT_FIELD, RETRY_FIELD, SEPARATOR, orjson.loads
                )
                if self._names.partitions > 1 and (elsewhere := self._rejects.misplaced(good)):
                    misplaced.append((batch, elsewhere))
                    good = [entry for entry in good if entry not in elsewhere]
                entries += good
                if bad:
                    unreadable.append((batch, bad))
            if entries:
                new = await self.admission.lock(entries, asked_at)
                if before is not None and not before.done():
                    await asyncio.wait({before})
                self._notifications.added(new)
            for batch, bad in unreadable:
                await self._rejects.route(batch, bad)
            for batch, elsewhere in misplaced:
                await self._rejects.route_misplaced(batch, elsewhere)
            self._worked()
        finally:
            self._capacity.release(sum(map(len, batches)))
