"""Reads the load balancer stream: what is announced becomes owned, and is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import orjson

from relstream._core import STREAMS, Batch, Entry, announcements, lock_keys, pack
from relstream.backoff import Backoff, Forbidden
from relstream.errors import (
    DeadlineExceeded,
    ProtocolError,
    RelstreamError,
    ReplyError,
    is_retriable,
)
from relstream.lbs.entries import REQUEUED, TOO_LATE
from relstream.lbs.failures import with_detail
from relstream.lbs.names import (
    INPUT_FIELD,
    REASON_UNPARSEABLE,
    REASON_WRONG_PARTITION,
    RETRY_FIELD,
    SEPARATOR,
    Names,
    partition_of,
)
from relstream.lbs.stream import fitting
from relstream.notifications import MAX_WAITING_BYTES
from relstream.repeats import Repeats
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig, RetryConfig
    from relstream.lbs.requeue import Requeuer
    from relstream.net.endpoint import Endpoint
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
# Entries that may wait for locks which are refused for now; with more, little is read.
MOST_REFUSED = 10_000
# Bad entries of a batch that are logged one by one.
TOLD = 5


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
        room: Capacity,
        take: Callable[..., Awaitable[tuple[list[Entry], list[tuple[Entry, ReplyError]]]]],
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
        self._capacity = room
        self._acquire_leases = take
        self._audit = audit
        self._hand_back = hand_back
        self._unlock = unlock
        self._retry = retry
        self._patience = patience
        self._recovery = recovery
        self._requeuer = requeuer
        self._recorder = recorder
        self._logger = logger
        # Small enough that two batches fit: one is read while the other is locked or told.
        self._largest = max(1, min(LARGEST_READ, notifications.room // 2))
        self._count = 1
        self._taking: deque[asyncio.Task[None]] = deque()
        # Entries whose locks were refused for now (OOM, say, or one master of several hangs). It is
        # tried again long before others may take them for a dead owner's.
        self._refused: list[Entry] = []
        self._refused_since = self._again_at = 0.0
        self._refused_asked_at = 0.0  # when the first of them was asked for
        soon = max(recovered_after, 0.1)
        self._refused_for = soon / 3
        self._refusals = Backoff(retry.initial_delay, min(retry.max_delay, 2.0, soon / 4))
        # The server lets us lock nothing, or too much waits: what is in hand is tried until it goes
        # back, and then one by one is read, to see whether that has changed.
        self._probing = False
        # Servers of locks that were refused since one was taken.
        self._refusing: set[Endpoint | None] = set()
        # Batches whose locks are being asked for: no audit may take these for strays.
        self._locking: list[list[Entry]] = []
        self._forbidden = Forbidden()
        self._backoff = Backoff(retry.initial_delay, retry.max_delay)
        self._reading_fails = Repeats("reading", logger)
        self._locking_fails = Repeats("locking", logger, logging.ERROR)
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
        self._dlq_failed = False

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
        return self._ended or not (self._blocked or self._locking or self._refused or taking)

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

    def in_hand(self) -> set[bytes]:
        """Ids of entries that were read, and are neither owned yet nor put back."""
        return {entry.id for entries in (*self._locking, self._refused) for entry in entries}

    async def leave(self) -> None:
        """Puts back what was refused; for after `run` has ended."""
        keys = lock_keys(self._refused)
        with contextlib.suppress(RelstreamError):  # locks taken unheard of, if any, expire
            await self._unlock(keys)
        self._refused_since = -math.inf
        await self._return_refused()

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
            self._count = max(self._count // 8, 1)  # it may have been too large a reply
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
        if self._probing:
            await asyncio.sleep(self._again_at - loop.time())
        if self._refused and loop.time() >= self._again_at:
            await self._finish_locking()
            await self._take_refused()
        if self._probing and self._refused:
            return
        if self._stopping:
            return
        room = self._capacity.available_for(self)
        wanted = 1 if self._probing else self._count
        if room < wanted and self._taking:
            await self._taking.popleft()  # rather than reading in small portions
            return
        block = BLOCK
        if self._taking:  # some of them may be refused
            block = min(block, self._refused_for / 2)
        if self._refused:
            block = min(block, max(self._again_at - loop.time(), 0.001))
        if room <= 0:
            self.failing = None
            self._worked()
            self._capacity.wait_turn(self)
            made = self._notifications.room_made.wait()
            try:
                await asyncio.wait({made}, timeout=block if self._refused else None)
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
        if self._taking or (len(batch) == count and not self._probing):
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
                if self._names.partitions > 1 and (elsewhere := self._of_others(good)):
                    misplaced.append((batch, elsewhere))
                    good = [entry for entry in good if entry not in elsewhere]
                entries += good
                if bad:
                    unreadable.append((batch, bad))
            if entries:
                new = await self._lock(entries, asked_at)
                if before is not None and not before.done():
                    await asyncio.wait({before})
                self._notifications.added(new)
            for batch, bad in unreadable:
                await self._route_to_dlq(batch, bad)
            for batch, elsewhere in misplaced:
                await self._route_misplaced(batch, elsewhere)
            self._worked()
        finally:
            self._capacity.release(sum(map(len, batches)))

    async def _lock(
        self, entries: list[Entry], asked_at: float, *, again: bool = False
    ) -> list[Entry]:
        """Takes locks; returns entries of new streams. What is refused for now is `_refused`."""
        self._locking.append(entries)
        try:
            new, refusals = await self._acquire_leases(entries, asked_at, again=again)
            late = [entry for entry, error in refusals if error is TOO_LATE]
            if late:
                self._count = max(self._count // 8, 1)  # it may have been too large a reply
                stay = set(await self._hand_back(late))
                refusals = [
                    (entry, error)
                    for entry, error in refusals
                    if error is not TOO_LATE or entry.id in stay
                ]
        except RelstreamError:  # the locks may be ours, or not
            self._keep(entries, asked_at)
            raise
        finally:
            self._locking.remove(entries)
        hopeless = next((error for _, error in refusals if not is_retriable(error)), None)
        if hopeless is not None:
            self._locking_fails.failed(
                "locks were refused, their entries stay pending: %s", hopeless
            )
        waiting = [entry for entry, error in refusals if is_retriable(error)]
        if waiting:
            if not self._refusals.failures:
                self._logger.warning("locks are refused for now, trying again: %s", refusals[-1][1])
            self._keep(waiting, asked_at)
            self._try_later()
        elif not self._refused:
            self._refusals.reset()
        if len(waiting) < len(entries):
            self._refusing.clear()
        else:
            self._refusing.update(self._topology.group_by_node(lock_keys(waiting)))
        self._probing = (
            (bool(self._refusing) and self._refusing >= self._topology.servers)
            or len(self._refused) > MOST_REFUSED
            or sum([entry.cost for entry in self._refused]) > MAX_WAITING_BYTES
        )
        return new

    def _keep(self, entries: list[Entry], asked_at: float) -> None:
        if not self._refused:
            self._refused_since = asyncio.get_running_loop().time()
            self._refused_asked_at = asked_at
        self._refused_asked_at = min(self._refused_asked_at, asked_at)
        self._refused += entries

    def _try_later(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._again_at:
            self._again_at = now + self._refusals.failed()

    async def _take_refused(self) -> None:
        """Tries once more to lock what was refused."""
        room = max(self._capacity.available_for(self), 0)
        since, asked_at = self._refused_since, self._refused_asked_at
        failure: RelstreamError | None = None
        fitting, self._refused = self._refused[:room], self._refused[room:]
        if fitting:
            self._capacity.reserve(len(fitting))
            try:
                self._notifications.added(await self._lock(fitting, asked_at, again=True))
            except RelstreamError as error:
                failure = error
            finally:
                self._capacity.release(len(fitting))
                self._refused_since = since
        await self._return_refused()
        if failure is not None:
            raise failure

    async def _return_refused(self) -> None:
        """Puts back what was refused for so long that it might be taken for a dead owner's.

        A retry would be counted then; and others may be able to lock what we are not.
        """
        now = asyncio.get_running_loop().time()
        if self._refused and now - self._refused_since >= self._refused_for:
            stay = set(await self._hand_back(self._refused))
            self._refused = [entry for entry in self._refused if entry.id in stay]
            self._refused_since = now
        if self._refused:
            self._try_later()

    def _of_others(self, entries: list[Entry]) -> list[Entry]:
        """Those whose streams are announced elsewhere by all who know how many partitions we have.

        Under that name a stream is looked for there, by whoever finishes it too.
        """
        ours, of = self._names.partition, self._names.partitions
        return [entry for entry in entries if partition_of(entry.data_stream_name, of) != ours]

    async def _route_misplaced(self, batch: Batch, entries: list[Entry]) -> None:
        places = {batch.id(index): index for index in range(len(batch))}
        names = {places[entry.id]: entry.data_stream_name for entry in entries}
        of = self._names.partitions
        bad = [
            (i, f"{name!r} is of partition {partition_of(name, of)}: give partitions={of}")
            for i, name in names.items()
        ]
        await self._route_to_dlq(batch, bad, REASON_WRONG_PARTITION, names)

    async def _route_to_dlq(
        self,
        batch: Batch,
        bad: list[tuple[int, str]],
        reason: bytes = REASON_UNPARSEABLE,
        names: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Moves what can't be served to the dead-letter stream; tells of it once a batch.

        `names` of data streams, by the same places in the batch as in `bad`.
        """
        what = "announce no stream" if reason == REASON_UNPARSEABLE else "are not of this partition"
        letters = [
            (batch.id(index), with_detail(batch.pairs(index) or [], why), None)
            for index, why in bad
        ]
        told = [f"{batch.id(index).decode()} ({why})" for index, why in bad[:TOLD]]
        which = ", ".join(told) + (f" and {len(bad) - TOLD} more" if len(bad) > TOLD else "")
        dlq = self._names.dlq.decode()
        try:
            outcomes = await self._requeuer.route_to_dlq(
                letters, self._recovery.dlq_max_len, reason
            )
        except ReplyError as error:
            if not self._dlq_failed:  # it is tried again as long as they are pending
                self._dlq_failed = True
                self._logger.error(
                    "the dead-letter stream %r can't be written (%s), so LBS entries that %s stay "
                    "pending: %s",
                    dlq, error, what, which,
                )  # fmt: skip
            return
        self._dlq_failed = False
        self._logger.warning(
            "LBS entries that %s went to the dead-letter stream %r: %s", what, dlq, which
        )
        if self._recorder is not None:
            routed = [
                names.get(i) for (i, _), how in zip(bad, outcomes, strict=True) if how == REQUEUED
            ]
            if routed:
                self._recorder.dlq_routing(streams=routed, reason=reason.decode())
