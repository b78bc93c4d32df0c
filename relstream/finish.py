"""The end of ownership: finishing streams, and handing them over, in batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import (
    ITEM,
    Endings,
    Entry,
    Ids,
    Template,
    entry_ids,
    id_range,
    key_slot,
    lock_keys,
    pack,
)
from relstream.errors import ClientClosed, RelstreamError, ReplyError, StreamNotOwned
from relstream.leases import pending_for
from relstream.net.connection import (
    Backoff,
    Forbidden,
    explained_by_failover,
    observe,
    raise_first,
)
from relstream.put_back import PUT, Entries
from relstream.scripts import FINISH, run
from relstream.tasks import end_all

if TYPE_CHECKING:
    from relstream.config import RetryConfig
    from relstream.keeper import Keeper
    from relstream.lbs import Names
    from relstream.leases import Leases
    from relstream.locks import Locks
    from relstream.net.topology import Topology
    from relstream.put_back import PutBack
    from relstream.recorder import SafeRecorder

    Future = asyncio.Future[None]

# Streams that are ended together, and batches of them under way at the same time: while the server
# works on one, the next is being prepared.
BATCH = 128
BATCHES = 4
# Milliseconds for which a call of the script whose answer got lost can be sent again.
RECEIPT_MS = 600_000


class _Call:
    """What tries to end the same batch share."""

    def __init__(self, receipt: bytes) -> None:
        self.receipt = receipt
        self.token = secrets.token_hex(8).encode() + b":"
        self.again = False
        self.in_steps = False


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
        put_back: PutBack,
        retry: RetryConfig,
        patience: float,
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
        self._patience = patience
        self._on_lost = on_lost
        self._put = put_back.put
        # One for each batch under way, and those that are on the server.
        self._receipts = [names.receipt(consumer, number) for number in range(BATCHES)]
        self._written: set[bytes] = set()
        # Where scripts or receipts are forbidden, or a receipt would be on another server.
        slots = {key_slot(key) for key in (names.lbs, *self._receipts)}
        self._in_steps = not topology.single and len(slots) > 1
        self._stored = Entries(self._link, names)
        self._recorder = recorder
        self._logger = logger
        self._failing = False
        self._ack = Template(b"XACK", names.lbs, names.group, ITEM)
        self._delete = Template(b"XDEL", names.lbs, ITEM)
        self._asked = asyncio.Event()
        self._done = Endings(self._asked.set)
        self._released = Endings(self._asked.set)
        self._abandoned = Endings(self._asked.set)
        self._others: dict[Entry, list[Entry]] = {}
        self.done = self._done.ask
        """Finishes the stream: XACK, XDEL, then the locks. Fails with `StreamNotOwned` if lost."""
        self.release = self._released.ask
        """Hands the stream over: its entries are put back as they are, then the locks released."""
        self._under_way: set[asyncio.Task[None]] = set()
        self._running = False
        self._failure: BaseException | None = None

    def abandon(self, head: Entry, others: list[Entry]) -> None:
        """A stream was lost by one of its entries: puts the others back, and releases its locks.

        There is nobody to wait for it: what fails here is recovered by others.
        """
        self._others[head] = others
        self._abandoned.ask(head).add_done_callback(observe)

    async def idle(self) -> None:
        """Waits until all that was asked for has ended, well or badly."""
        while True:
            if self._under_way:
                await asyncio.wait(self._under_way)
            elif self._running and (self._done or self._released or self._abandoned):
                await asyncio.sleep(0)
            else:
                return

    async def tidy(self) -> None:
        """Removes what only calls that are sent again would need; for when it is `idle`."""
        if self._written:
            with contextlib.suppress(RelstreamError):  # they expire
                await self._link.execute(b"DEL", *self._written)

    async def run(self) -> None:
        """Serves `done`, `release` and `abandon` until cancelled."""
        queues = (self._done, self._released, self._abandoned)
        for queue in queues:
            queue.open(asyncio.get_running_loop().create_future)
        self._running = True
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                if self._failure is not None:
                    raise self._failure
                ends = (self._finish, self._hand_over, self._hand_back_others)
                for queue, end in zip(queues, ends, strict=True):
                    while queue:
                        while len(self._under_way) >= BATCHES:
                            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                        task = asyncio.ensure_future(self._persist(end, queue.take(BATCH)))
                        self._under_way.add(task)
                        task.add_done_callback(self._batch_ended)
        finally:
            self._running = False
            await end_all(self._under_way)
            for queue in queues:
                _fail(queue.close(_closed), _closed())

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._asked.set()

    async def _persist(
        self,
        end: Callable[[Endings, list[Entry], _Call], Awaitable[None]],
        endings: Endings,
    ) -> None:
        """Tries until it works, as often as `retry` allows. Trying again is safe."""
        backoff = Backoff(self._retry.initial_delay, self._retry.max_delay)
        forbidden = Forbidden()
        entries = endings.entries()
        owned = end != self._hand_back_others
        call = _Call(self._receipts.pop())
        try:
            while True:
                # Not renewed meanwhile, so that a lock just released does not look lost.
                self._keeper.drop(entries)
                try:
                    if end == self._finish and not call.again and len(entries) > len(endings):
                        await self._keep_whole(endings)
                        entries = endings.entries()
                    if entries:
                        await end(endings, entries, call)
                    self._failing = False
                    return
                except RelstreamError as error:
                    if owned:
                        self._keeper.add(entries)
                    passing = explained_by_failover(error)
                    hopeless = isinstance(error, ReplyError) and not passing
                    patience = self._patience if passing else 0.0
                    if (
                        hopeless
                        or forbidden.exhausted(error)
                        or backoff.exhausted(self._retry.max_retries, patience)
                    ):
                        self._give_up(endings, error, owned)
                        return
                    pause = forbidden.pause(error, backoff.failed())
                    if not self._failing:  # once for all calls, until one works
                        self._failing = True
                        self._logger.warning("ending ownership failed, trying again: %s", error)
                    call.again = True
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            _fail(endings.futures, _closed())
            raise
        except Exception as error:
            if owned:
                self._keeper.add(entries)
            self._give_up(endings, RelstreamError(f"a mistake of ours: {error!r}"), owned)
            raise
        finally:
            self._receipts.append(call.receipt)

    def _give_up(self, endings: Endings, error: RelstreamError, owned: bool) -> None:
        """What could not be ended is owned as before; what was lost stays lost."""
        for head in endings.heads:
            if owned:
                head.finishing = False
                self._leases.keep(head)
            else:
                self._others.pop(head, None)
        _fail(endings.futures, error)

    async def _keep_whole(self, endings: Endings) -> None:
        """Takes out streams that were lost by one of several entries; the others go back.

        The lost one may have come to us again, under another id: finished by that and lost by the
        other, a stream would be nobody's.
        """
        entries = [entry for head in endings.heads if head.again for entry in _all(head)]
        lost = set(entries) - await self._pending(entries)
        for head in self._refuse(endings, lost):
            self.abandon(head, _all(head))

    async def _finish(self, endings: Endings, entries: list[Entry], call: _Call) -> None:
        lost: set[Entry] | None = None
        # What a try in steps may have acknowledged the script would take for lost.
        if not self._in_steps and not call.in_steps and len(entries) == len(endings):
            lost = await self._finish_at_once(entries, call)
        if lost is None:
            call.in_steps = True
            lost = await self._finish_in_steps(entries, call.again)
        self._settle(endings, lost)

    async def _finish_at_once(self, entries: list[Entry], call: _Call) -> set[Entry] | None:
        """Finishes by the script; returns entries that were lost, None where it can't be.

        A cluster has the locks elsewhere: they are released then.
        """
        self._written.add(call.receipt)
        locks = lock_keys(entries) if self._single else []
        keys = [self._names.lbs, call.receipt, *locks]
        args = [self._names.group, self._consumer.encode(), call.token, b"%d" % RECEIPT_MS]
        args += id_range(entries)
        (reply,) = await run(self._link, FINISH, [(keys, args + entry_ids(entries))])
        if isinstance(reply, ReplyError):
            if reply.code == "TRYAGAIN" and not call.again:
                return None  # its slot moves: receipt and stream are in different places
            if reply.code != "NOPERM":
                raise reply
            await self._forbidden(reply, call.receipt)
            return None
        missed = list(map(int, reply[len(call.token) :].split()))
        lost = {entries[-place - 1] for place in missed if place < 0}
        if not self._single:
            lost -= await self._lost_with_group([entry for entry in entries if entry in lost])
            await self._unlock([entry for entry in entries if entry not in lost])
        elif self._recorder is not None:
            missing = {abs(place) - 1 for place in missed}
            for place, entry in enumerate(entries):
                if entry not in lost:
                    self._recorder.lock_release(entry.data_stream_name, place not in missing)
        return lost

    async def _lost_with_group(self, entries: list[Entry]) -> set[Entry]:
        """Deletes those that are there and locked by us, and returns them.

        They were lost with their group: who puts an entry back deletes it in the same step.
        """
        held = await self._locks.held(lock_keys(entries), known=True)
        return await self._deleted([e for e, ours in zip(entries, held, strict=True) if ours])

    async def _deleted(self, entries: list[Entry]) -> set[Entry]:
        """Deletes entries; returns those that were there."""
        ids = entry_ids(entries)
        counts = (
            raise_first(await self._link.pipeline(self._delete.pack(ids), len(ids))) if ids else []
        )
        return {entry for entry, count in zip(entries, counts, strict=True) if count}

    async def _forbidden(self, refusal: ReplyError, receipt: bytes) -> None:
        """Whether it is for good that the script must not be run, or for one of these locks."""
        if not refusal.about_keys:
            self._in_steps = True  # who releases locks says so
            return
        (reply,) = await self._link.pipeline(pack(b"GET", receipt), 1)
        if isinstance(reply, ReplyError) and reply.code == "NOPERM":
            self._in_steps = True
            rule = receipt[: receipt.index(b"-finished-")] + b"-finished-*"
            self._logger.warning(
                "the key %r is forbidden: streams are finished in three steps; grant ~%s to make "
                "that one atomic step",
                receipt.decode(errors="replace"), rule.decode(),
            )  # fmt: skip

    async def _finish_in_steps(self, entries: list[Entry], again: bool) -> set[Entry]:
        """XACK first, then XDEL and the release for what was ours; returns what was lost."""
        asked = [entry for entry in entries if not entry.acked] if again else entries
        ids = entry_ids(asked)
        acked = raise_first(await self._link.pipeline(self._ack.pack(ids), len(ids)))
        lost: set[Entry] = set()
        if 0 in acked:
            lost = await self._lost(asked, acked, again)
            entries = [entry for entry in entries if entry not in lost]
        if entries:
            if again or lost:
                ids = entry_ids(entries)
            # Sent in this order, and not awaited in between: what has been acknowledged is nobody's
            # any more, locked or not, deleted or not.
            try:
                await _together(
                    self._link.execute(b"XDEL", self._names.lbs, *ids), self._unlock(entries)
                )
            except RelstreamError:
                for entry in entries:
                    entry.acked = True
                raise
        return lost

    async def _lost(self, entries: list[Entry], acked: list[int], again: bool) -> set[Entry]:
        """Those of `entries` that were not pending, and that we did not acknowledge before.

        If the lock of one is ours and it is still there, an earlier try, whose answer got lost, has
        acknowledged it, or the group is gone: what is put back for another owner is deleted. Where
        that takes several steps the lock alone proves nothing at first: it may have been taken anew
        just after it was seen free. In a second try one of the two is enough.
        """
        doubtful = [
            entry
            for entry, count in zip(entries, acked, strict=True)
            if not count and not entry.acked
        ]
        held = await self._locks.held(lock_keys(doubtful))
        pairs = list(zip(doubtful, held, strict=True))
        lost = {entry for entry, ours in pairs if not (again and ours)}
        return lost - await self._deleted([entry for entry, ours in pairs if again != ours])

    async def _hand_over(self, endings: Endings, entries: list[Entry], call: _Call) -> None:
        held = await self._locks.held(lock_keys(entries), known=True)
        doubtful = [entry for entry, locked in zip(entries, held, strict=True) if not locked]
        theirs = set(doubtful) - await self._pending(doubtful)
        ours = await self._put_back([entry for entry in entries if entry not in theirs])
        # What an earlier try has put back is not pending any more.
        lost = set() if call.again else {entry for entry in entries if entry not in ours}
        await self._unlock([entry for entry in entries if entry not in lost])
        self._settle(endings, lost)

    async def _hand_back_others(self, endings: Endings, entries: list[Entry], call: _Call) -> None:
        others = [entry for head in endings.heads for entry in self._others[head]]
        if others:
            ours = await self._pending(others)
            await self._put_back([entry for entry in others if entry in ours])
        await self._unlock(entries)
        for head in endings.heads:
            del self._others[head]
        self._settle(endings, set())

    async def _pending(self, entries: list[Entry]) -> set[Entry]:
        """Those pending for us: others' are theirs, under the same id even (XCLAIM)."""
        keys, ids = lock_keys(entries), entry_ids(entries)
        mine = await pending_for(self._link, self._names, self._consumer, keys, ids)
        return {entry for entry in entries if entry.lock_key in mine}

    async def _put_back(self, entries: list[Entry]) -> set[Entry]:
        """Puts entries back as they are; returns those that were still pending."""
        returned: set[Entry] = set()
        by_id = {entry.id: entry for entry in entries}
        async for part, batches in self._stored.read(Ids(entry_ids(entries))):
            there = [
                (by_id[entry_id], batch.pairs(0) or [])
                for entry_id, batch in zip(part, batches, strict=True)
                if len(batch)
            ]
            # Without their locks: these are ours.
            outcomes = await self._put([(entry.id, pairs, None) for entry, pairs in there])
            returned.update(
                entry for (entry, _), how in zip(there, outcomes, strict=True) if how == PUT
            )
        return returned

    async def _unlock(self, entries: list[Entry]) -> None:
        missed = await self._locks.release(lock_keys(entries))
        if self._recorder is not None:
            missing = set(missed)
            for entry in entries:
                self._recorder.lock_release(entry.data_stream_name, entry.lock_key not in missing)

    def _refuse(self, endings: Endings, lost: set[Entry]) -> list[Entry]:
        """Takes out what is lost, and tells those who wait for it; returns the first entries."""
        refused = []
        for i in reversed(range(len(endings.heads))):
            head = endings.heads[i]
            if lost.isdisjoint(_all(head)):
                continue
            future = endings.futures[i]
            del endings.heads[i], endings.futures[i]
            refused.append(head)
            self._on_lost(head)
            if not future.done():
                future.set_exception(
                    StreamNotOwned(
                        head.data_stream_name,
                        "was lost to another consumer before this, which is not disturbed",
                    )
                )
        return refused

    def _settle(self, endings: Endings, lost: set[Entry]) -> None:
        if lost:
            self._refuse(endings, lost)
        self._leases.drop(endings.heads)
        endings.succeed()


def _all(head: Entry) -> list[Entry]:
    """All entries by which a stream is owned."""
    return [head, *(head.again or ())]


async def _together(*awaitables: Awaitable[Any]) -> list[Any]:
    """What they return, or the first error, once all have ended."""
    outcomes = await asyncio.gather(*awaitables, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _closed() -> ClientClosed:
    return ClientClosed("the client was closed before the server confirmed this")


def _fail(futures: Sequence[Future], error: RelstreamError) -> None:
    for future in futures:
        if not future.done():
            # One each: an error raised in many places would collect their tracebacks.
            future.set_exception(type(error)(*error.args))
