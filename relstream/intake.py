"""Reads the load balancer stream: what is announced becomes owned, and is told."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson

from relstream._core import STREAMS, Batch, Entry, announcements, entry_ids, pack
from relstream.errors import ProtocolError, RelstreamError, ReplyError
from relstream.lbs import INPUT_FIELD, SEPARATOR, UNPARSEABLE, Names
from relstream.net.connection import Backoff, explained_by_failover
from relstream.recovery import PUT, PutBack, discard, read_entries

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig, RetryConfig
    from relstream.net.topology import KeyLink, Topology
    from relstream.notifications import Notifications
    from relstream.recorder import SafeRecorder

# A read waits on the server for this long, in seconds: so long may closing take where the server
# does not let us cut the wait short.
BLOCK = 1.0
# Entries a read, at first and at most, and the bytes of reply that it should not exceed.
FIRST_READ = 100
LARGEST_READ = 1000
READ_BYTES = 4 << 20
# Bad entries of a batch that are logged one by one.
TOLD = 5


class Room:
    """How many more streams this consumer can take; shared by those that read for it.

    What is asked for is set aside, so that together they never take too many.
    """

    def __init__(
        self,
        notifications: Notifications,
        owned: Callable[[], int],
        max_streams: int | None,
        readers: int,
    ) -> None:
        self._notifications = notifications
        self._owned = owned
        self._max_streams = max_streams
        self._readers = readers
        self._in_hand = 0

    def share(self) -> int:
        """How many one reader may ask for now."""
        room = self._notifications.room - self._in_hand
        if self._max_streams is not None:
            room = min(room, self._max_streams - self._owned() - self._in_hand)
        return room if room <= 1 else max(1, room // self._readers)

    def set_aside(self, count: int) -> None:
        """So many are asked for, or taken."""
        self._in_hand += count

    def give_back(self, count: int) -> None:
        """So many did not come, or have got to where they count by themselves."""
        self._in_hand -= count
        if self._readers > 1:
            self._notifications.room_made.set()

    def full(self) -> bool:
        """Whether this consumer owns all that it may."""
        return self._max_streams is not None and self._owned() >= self._max_streams


class Intake:
    """Reads, locks and tells, in batches, as long as there is room.

    While batches are being locked the next one is being read.
    """

    def __init__(
        self,
        reading: KeyLink,
        topology: Topology,
        names: Names,
        consumer: str,
        *,
        notifications: Notifications,
        room: Room,
        take: Callable[
            [list[Entry], float], Awaitable[tuple[list[Entry], list[Entry], ReplyError | None]]
        ],
        refused: Callable[[bytes], Awaitable[bool]],
        strays: Callable[[], Awaitable[list[bytes]]],
        hand_back: Callable[[list[bytes]], Awaitable[None]],
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
        self._room = room
        self._take_leases = take
        self._still_refused = refused
        self._find_strays = strays
        self._hand_back = hand_back
        self._retry = retry
        self._patience = patience
        self._recovery = recovery
        self._put_back = PutBack(topology, names, recorder, logger)
        self._recorder = recorder
        self._logger = logger
        # Small enough that two batches fit: one is read while the other is locked or told.
        self._largest = max(1, min(LARGEST_READ, notifications.room // 2))
        self._count = min(FIRST_READ, self._largest)
        self._taking: deque[asyncio.Task[None]] = deque()
        # A lock that the server has refused for now (OOM): no failure to read, but a pause.
        self._refused: bytes | None = None
        self._refusals = Backoff(retry.initial_delay, min(retry.max_delay, 2.0))
        self._stopping = False
        self._blocked = False
        self._strays: list[bytes] = []
        self._dlq_failed = False

    # --- from outside -------------------------------------------------------------------------

    def adopt(self, strays: list[bytes]) -> None:
        """These entries are pending for this consumer, and it does not know of them."""
        self._strays = strays
        self._notifications.room_made.set()

    async def stop(self) -> None:
        """Lets `run` return once the server has answered the read under way."""
        self._stopping = True
        self._notifications.room_made.set()
        while self._blocked:
            try:
                # Where it waits, which need not be where it was sent first.
                for server, protocol in self._reading.waiting:
                    link = self._topology.to(server)
                    await link.execute(b"CLIENT", b"UNBLOCK", protocol.client_id)
            except RelstreamError:  # not allowed, or no connection: the read ends by itself
                await asyncio.sleep(BLOCK)
            await asyncio.sleep(0.01)

    # --- the loop -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads until `stop`. Raises the last error when reading failed too often in a row."""
        backoff = Backoff(self._retry.initial_delay, self._retry.max_delay)
        try:
            while not self._stopping:
                try:
                    await self._step()
                    backoff.reset()
                except RelstreamError as error:
                    # What could not be locked meanwhile is found among the pending entries.
                    await asyncio.gather(*self._taking, return_exceptions=True)
                    self._taking.clear()
                    await self._repair(error, backoff)
            await self._settle()
        finally:
            for task in self._taking:
                task.cancel()
            await asyncio.gather(*self._taking, return_exceptions=True)

    async def _repair(self, error: RelstreamError, backoff: Backoff) -> None:
        """Answers a failure: by a pause, or by raising it again when there were too many."""
        if self._stopping:
            return
        if isinstance(error, ReplyError) and error.code == "NOGROUP":
            self._logger.warning("the consumer group is gone and is created again: %s", error)
            try:
                await self.create_group()
                return
            except RelstreamError as failure:
                error = failure
        if isinstance(error, ProtocolError):
            self._count = max(self._count // 8, 1)  # it may have been too large a reply
        hopeless = isinstance(error, ReplyError) and error.code in ("NOPERM", "WRONGTYPE", "NOAUTH")
        if hopeless:
            raise ReplyError(f"{error} ({self._names.lbs.decode()!r})") from None
        patience = self._patience if explained_by_failover(error) else 0.0
        if backoff.exhausted(self._retry.max_retries, patience):
            raise error
        pause = backoff.failed()
        self._logger.warning("reading failed, trying again in %.2f s: %s", pause, error)
        await asyncio.sleep(pause)

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
        fresh = not self._reading.alive
        await self._reading.get()
        pausing = self._refused
        if pausing is not None:
            await asyncio.sleep(self._refusals.failed())
        if fresh or pausing is not None:
            # The reply to a read may have been lost with the connection, or locks were refused.
            # What is pending for us already comes before anything new.
            await self._settle()
            self._strays = await self._find_strays()
        if pausing is not None:
            if await self._still_refused(pausing):
                # Left pending, it would look like a dead owner's, and retries would be counted.
                strays, self._strays = self._strays, []
                await self._hand_back(strays)
                return
            self._refused = None
        self._notifications.room_made.clear()
        if self._stopping:  # it was set by this, perhaps, before it was cleared
            return
        room = self._room.share()
        if room < self._count and self._taking:
            await self._taking.popleft()  # rather than reading in small portions
            return
        if self._strays and self._room.full():
            strays, self._strays = self._strays, []
            await self._hand_back(strays)  # others may have room for them
            return
        if room <= 0:
            await self._notifications.room_made.wait()
            return
        if self._strays:
            await self._settle()
            await self._adopt(room)
            return
        if self._stopping:
            return
        count = min(room, self._count)
        asked_at = asyncio.get_running_loop().time()
        batches: list[Batch] = []
        self._room.set_aside(count)
        try:
            batches = await self._read(count)
        finally:
            self._room.give_back(count - sum(map(len, batches)))
        if not batches:
            await self._settle()
            return
        batch = batches[0]
        fitting = len(batch) * READ_BYTES // max(batch.nbytes, 1)
        self._count = max(1, min(2 * self._count, fitting, self._largest))
        if len(batch) == count:
            # There is more: it is read while these are being locked.
            before = self._taking[-1] if self._taking else None
            self._taking.append(asyncio.ensure_future(self._take(batches, asked_at, before)))
        else:
            await self._settle()
            await self._take(batches, asked_at)
            # Whoever waits for these hears of them before the next read is sent.
            await asyncio.sleep(0)

    async def _settle(self) -> None:
        """Waits for the batches that are being locked."""
        while self._taking:
            await self._taking.popleft()

    async def _read(self, count: int) -> list[Batch]:
        command = pack(
            b"XREADGROUP", b"GROUP", self._names.group, self._consumer, b"COUNT", count,
            b"BLOCK", round(BLOCK * 1000), b"STREAMS", self._names.lbs, b">",
        )  # fmt: skip
        timeout = BLOCK + self._reading.endpoint.timeout
        self._blocked = True
        try:
            (reply,) = await self._reading.pipeline(command, 1, decode=STREAMS, timeout=timeout)
        finally:
            self._blocked = False
        if isinstance(reply, ReplyError):
            if reply.code == "UNBLOCKED":
                return []
            raise reply
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
            gone: list[bytes] = []
            unreadable: list[tuple[Batch, list[tuple[int, str]]]] = []
            for batch in batches:
                good, bad, deleted = announcements(batch, INPUT_FIELD, SEPARATOR, orjson.loads)
                entries += good
                gone += deleted
                if bad and asked_at > -math.inf:  # else it failed before: the leader sees to it
                    unreadable.append((batch, bad))
            refusal = None
            if entries:
                new, refused, refusal = await self._take_leases(entries, asked_at)
                if before is not None and not before.done():
                    await asyncio.wait({before})
                self._notifications.added(new)
            for batch, bad in unreadable:
                await self._bury(batch, bad)
            if gone:
                await discard(self._link, self._names, gone)
            if refusal is None:
                self._refusals.reset()
            elif refusal.transient:
                if not self._refusals.failures:
                    self._logger.warning("locks are refused for now, trying again: %s", refusal)
                self._refused = refused[0].lock_key
                await self._hand_back(entry_ids(refused))
            else:
                self._logger.error("locks were refused, their entries stay pending: %s", refusal)
        finally:
            self._room.give_back(sum(map(len, batches)))

    async def _adopt(self, room: int) -> None:
        """Takes entries that are pending for this consumer already."""
        now = min(room, self._count)
        ids, self._strays = self._strays[:now], self._strays[now:]
        batches = await read_entries(self._link, self._names, ids)
        gone = [entry_id for entry_id, batch in zip(ids, batches, strict=True) if not len(batch)]
        if gone:
            await discard(self._link, self._names, gone)
        self._room.set_aside(sum(map(len, batches)))
        await self._take(batches, -math.inf)

    async def _bury(self, batch: Batch, bad: list[tuple[int, str]]) -> None:
        """Moves what announces nothing to the dead-letter stream; tells of it once a batch."""
        letters = [(batch.id(index), batch.pairs(index) or [], None) for index, _ in bad]
        told = [f"{batch.id(index).decode()} ({reason})" for index, reason in bad[:TOLD]]
        which = ", ".join(told) + (f" and {len(bad) - TOLD} more" if len(bad) > TOLD else "")
        dlq = self._names.dlq.decode()
        try:
            outcomes = await self._put_back.bury(letters, self._recovery.dlq_max_len, UNPARSEABLE)
        except ReplyError as error:
            if not self._dlq_failed:  # it is tried again as long as they are pending
                self._dlq_failed = True
                self._logger.error(
                    "the dead-letter stream %r can't be written (%s), so LBS entries that announce "
                    "no stream stay pending: %s",
                    dlq, error, which,
                )  # fmt: skip
            return
        self._dlq_failed = False
        self._logger.warning(
            "LBS entries that announce no stream went to the dead-letter stream %r: %s", dlq, which
        )
        if self._recorder is not None:
            for _ in range(outcomes.count(PUT)):
                self._recorder.dlq_routing(None, UNPARSEABLE.decode())
