"""The end of ownership: finishing streams, and handing them over, in batches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from relstream._core import ITEM, Entry, Template, entry_ids, lock_keys, pack
from relstream.errors import ClientClosed, RelstreamError, ReplyError, StreamNotOwned
from relstream.leases import pending_for
from relstream.net.connection import Backoff, raise_first
from relstream.recovery import PUT, PutBack, read_entries

if TYPE_CHECKING:
    from relstream.config import RetryConfig
    from relstream.lbs import Names
    from relstream.leases import Keeper, Leases, Locks
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

    Future = asyncio.Future[None]
    # The first entry of a stream, and the future of whoever waits for the end of its ownership.
    Ending = tuple[Entry, Future]

# Streams that are ended together, and batches of them under way at the same time: while the server
# works on one, the next is being prepared.
BATCH = 100
BATCHES = 4


class Finisher:
    """Ends ownership. Calls made in the same turn of the event loop share their commands."""

    def __init__(
        self,
        topology: Topology,
        locks: Locks,
        names: Names,
        consumer: str,
        leases: Leases,
        keeper: Keeper,
        *,
        retry: RetryConfig,
        on_lost: Callable[[Entry], None],
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = topology.link(names.lbs)
        self._single = topology.single
        self._locks = locks
        self._names = names
        self._consumer = consumer
        self._leases = leases
        self._keeper = keeper
        self._retry = retry
        self._on_lost = on_lost
        self._put = PutBack(topology, names, recorder, logger).put
        self._recorder = recorder
        self._logger = logger
        self._ack = Template(b"XACK", names.lbs, names.group, ITEM)
        self._done: deque[Ending] = deque()
        self._released: deque[Ending] = deque()
        self._abandoned: deque[Ending] = deque()
        self._others: dict[Entry, list[Entry]] = {}
        self._asked = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._running = False
        self._failure: BaseException | None = None

    def done(self, head: Entry) -> Future:
        """Finishes the stream: XACK, XDEL, then the locks. Fails with `StreamNotOwned` if lost."""
        return self._ask(self._done, head)

    def release(self, head: Entry) -> Future:
        """Hands the stream over: its entries are put back as they are, then the locks released."""
        return self._ask(self._released, head)

    def abandon(self, head: Entry, others: list[Entry]) -> None:
        """A stream was lost by one of its entries: puts the others back, and releases its locks.

        There is nobody to wait for it: what fails here is recovered by others.
        """
        self._others[head] = others
        self._ask(self._abandoned, head).add_done_callback(_observe)

    async def idle(self) -> None:
        """Waits until all that was asked for has ended, well or badly."""
        while True:
            if self._under_way:
                await asyncio.wait(self._under_way)
            elif self._running and (self._done or self._released or self._abandoned):
                await asyncio.sleep(0)
            else:
                return

    def _ask(self, queue: deque[Ending], head: Entry) -> Future:
        future: Future = self._loop.create_future()
        if not self._running:
            future.set_exception(_closed())
            return future
        head.finishing = True
        if not queue:
            self._asked.set()
        queue.append((head, future))
        return future

    async def run(self) -> None:
        """Serves `done`, `release` and `abandon` until cancelled."""
        self._loop = asyncio.get_running_loop()
        self._running = True
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                if self._failure is not None:
                    raise self._failure
                for queue, end in (
                    (self._done, self._finish),
                    (self._released, self._hand_over),
                    (self._abandoned, self._hand_back_others),
                ):
                    while queue:
                        while len(self._under_way) >= BATCHES:
                            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                        batch = [queue.popleft() for _ in range(min(BATCH, len(queue)))]
                        task = asyncio.ensure_future(self._persist(end, batch))
                        self._under_way.add(task)
                        task.add_done_callback(self._batch_ended)
        finally:
            self._running = False
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            _fail([*self._done, *self._released, *self._abandoned], _closed())

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._asked.set()

    async def _persist(
        self,
        end: Callable[[Sequence[Ending], list[Entry], bool], Awaitable[None]],
        endings: Sequence[Ending],
    ) -> None:
        """Tries until it works, as often as `retry` allows. Trying again is safe."""
        backoff = Backoff(self._retry.initial_delay, self._retry.max_delay)
        entries = _entries(endings)
        locks = lock_keys(entries)
        owned = end != self._hand_back_others
        try:
            while True:
                # Not renewed meanwhile, so that a lock just released does not look lost.
                self._keeper.drop(locks)
                try:
                    await end(endings, entries, backoff.failures > 0)
                    return
                except RelstreamError as error:
                    if owned:
                        self._keeper.add(locks)
                    hopeless = isinstance(error, ReplyError) and not error.transient
                    if hopeless or backoff.failures == self._retry.max_retries:
                        self._give_up(endings, error, owned)
                        return
                    self._logger.warning("ending ownership failed, trying again: %s", error)
                await asyncio.sleep(backoff.failed())
        except asyncio.CancelledError:
            _fail(endings, _closed())
            raise
        except Exception as error:
            if owned:
                self._keeper.add(locks)
            self._give_up(endings, RelstreamError(f"a mistake of ours: {error!r}"), owned)
            raise

    def _give_up(self, endings: Sequence[Ending], error: RelstreamError, owned: bool) -> None:
        """What could not be ended is owned as before; what was lost stays lost."""
        for head, _ in endings:
            if owned:
                head.finishing = False
                self._leases.keep(head)
            else:
                self._others.pop(head, None)
        _fail(endings, error)

    async def _finish(self, endings: Sequence[Ending], entries: list[Entry], again: bool) -> None:
        asked = [entry for entry in entries if not entry.acked] if again else entries
        ids = entry_ids(asked)
        acked = raise_first(await self._link.pipeline(self._ack.pack(ids), len(ids)))
        lost: set[Entry] = set()
        if 0 in acked:
            lost = await self._lost(asked, acked, again)
            entries = [entry for entry in entries if entry not in lost]
        if entries:
            try:
                if again or lost:
                    ids = entry_ids(entries)
                delete = pack(b"XDEL", self._names.lbs, *ids)
                if self._single:
                    # Over one connection in this order: nothing need be awaited in between.
                    protocol = await self._link.get()
                    deleting = protocol.send(delete, timeout=self._link.endpoint.timeout)
                    await self._unlock(entries)
                    raise_first(await deleting)
                else:
                    raise_first(await self._link.pipeline(delete, 1))
                    await self._unlock(entries)
            except RelstreamError:
                for entry in entries:
                    entry.acked = True
                raise
        self._settle(endings, lost)

    async def _lost(self, entries: list[Entry], acked: list[int], again: bool) -> set[Entry]:
        """Those of `entries` that were not pending, and that we did not acknowledge before.

        If the lock is ours still, nobody can have taken the entry: an earlier try, whose answer got
        lost, has acknowledged it. So it has if the entry is still there: what is put back for
        another owner is deleted in the same step.
        """
        doubtful = [entry for entry, count in zip(entries, acked, strict=True) if not count]
        held = await self._locks.held(lock_keys(doubtful))
        lost = {entry for entry, ours in zip(doubtful, held, strict=True) if not ours}
        if again:
            for entry in list(lost):
                if await self._link.execute(b"XDEL", self._names.lbs, entry.id):
                    lost.remove(entry)
        return lost

    async def _hand_over(
        self, endings: Sequence[Ending], entries: list[Entry], again: bool
    ) -> None:
        ours = await self._put_back(entries)
        # What an earlier try has put back is not pending any more.
        lost = set() if again else {entry for entry in entries if entry not in ours}
        await self._unlock([entry for entry in entries if entry not in lost])
        self._settle(endings, lost)

    async def _hand_back_others(
        self, endings: Sequence[Ending], entries: list[Entry], again: bool
    ) -> None:
        others = [entry for head, _ in endings for entry in self._others[head]]
        if others:
            keys = lock_keys(others)
            ids = entry_ids(others)
            # What is pending for somebody else is theirs, under the same id even (XCLAIM).
            mine = await pending_for(self._link, self._names, self._consumer, keys, ids)
            await self._put_back([entry for entry in others if entry.lock_key in mine])
        await self._unlock(entries)
        for head, _ in endings:
            del self._others[head]
        self._settle(endings, set())

    async def _put_back(self, entries: list[Entry]) -> set[Entry]:
        """Puts entries back as they are; returns those that were still pending."""
        batches = await read_entries(self._link, self._names, entry_ids(entries))
        there = [
            (entry, batch.pairs(0) or [])
            for entry, batch in zip(entries, batches, strict=True)
            if len(batch)
        ]
        # Without their locks: these are ours.
        outcomes = await self._put([(entry.id, pairs, None) for entry, pairs in there])
        return {entry for (entry, _), how in zip(there, outcomes, strict=True) if how == PUT}

    async def _unlock(self, entries: list[Entry]) -> None:
        missed = await self._locks.release(lock_keys(entries))
        if self._recorder is not None:
            missing = set(missed)
            for entry in entries:
                self._recorder.lock_release(entry.data_stream_name, entry.lock_key not in missing)

    def _settle(self, endings: Sequence[Ending], lost: set[Entry]) -> None:
        if lost:
            kept = []
            for head, future in endings:
                if lost.isdisjoint(_entries([(head, future)])):
                    kept.append((head, future))
                    continue
                self._on_lost(head)
                if not future.done():
                    future.set_exception(
                        StreamNotOwned(
                            head.data_stream_name,
                            "was lost to another consumer before this, which is not disturbed",
                        )
                    )
            endings = kept
        self._leases.drop([head for head, _ in endings])
        for _, future in endings:
            if not future.done():
                future.set_result(None)


def _entries(endings: Sequence[Ending]) -> list[Entry]:
    """All entries by which these streams are owned."""
    entries = [head for head, _ in endings]
    return entries + [entry for head in entries if head.again for entry in head.again]


def _observe(future: Future) -> None:
    if not future.cancelled():
        future.exception()


def _closed() -> ClientClosed:
    return ClientClosed("the client was closed before the server confirmed this")


def _fail(endings: Sequence[Ending], error: RelstreamError) -> None:
    for _, future in endings:
        if not future.done():
            # One each: an error raised in many places would collect their tracebacks.
            future.set_exception(type(error)(*error.args))
