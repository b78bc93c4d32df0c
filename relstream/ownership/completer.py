"""The end of ownership: finishing streams, and handing them over, in batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from relstream._core import (
    ITEM,
    CompletionQueue,
    Entry,
    EntryIds,
    Template,
    entry_ids,
    first_error,
    id_range,
    key_slot,
    lock_keys,
    pack,
)
from relstream.backoff import Backoff, Forbidden
from relstream.errors import ClientClosed, RelstreamError, ReplyError, StreamNotOwned, is_retriable
from relstream.lbs.delayed import DelayedEntries, packed
from relstream.lbs.entries import REQUEUED
from relstream.lbs.names import known_fields, replace_fields
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import FAIL, FINISH, run
from relstream.lbs.stream import Entries
from relstream.net.replies import raise_first
from relstream.ownership.leases import pending_for
from relstream.tasks import cancel_and_wait, consume_exception

if TYPE_CHECKING:
    from relstream.config import RetryConfig
    from relstream.lbs.failures import Failure
    from relstream.lbs.locks import Locks
    from relstream.lbs.names import Names
    from relstream.lbs.requeue import Requeuer
    from relstream.net.topology import Topology
    from relstream.ownership.leases import Leases
    from relstream.ownership.renewer import LeaseRenewer
    from relstream.recorder import Outcome, SafeRecorder

    Future = asyncio.Future[None]

# Streams that are ended together, and batches of them under way at the same time: while the server
# works on one, the next is being prepared.
BATCH = 128
BATCHES = 4
# Of failed streams, whose entries go through here, about so many bytes at most.
BATCH_BYTES = 1 << 20
# Milliseconds for which a call of the script whose answer got lost can be sent again.
RECEIPT_MS = 600_000


class _Attempt:
    """What tries to end the same batch share."""

    def __init__(self, receipt: bytes) -> None:
        self.receipt = receipt
        self.token = secrets.token_hex(8).encode() + b":"
        self.again = False
        self.in_steps = False
        # Of streams that fail: what waits, and when it is due; or their copies among the dead.
        self.delayed: list[tuple[int, bytes]] | None = None
        self.delayed_in_steps = False
        self.dead_letters: list[bytes] | None = None


class Completer:
    """Ends ownership. Calls made in the same turn of the event loop share their commands."""

    def __init__(
        self,
        topology: Topology,
        locks: Locks,
        names: Names,
        consumer: str,
        leases: Leases,
        renewer: LeaseRenewer,
        *,
        requeuer: Requeuer,
        dlq_max_len: int,
        retry: RetryConfig,
        patience: float,
        on_lost: Callable[[Entry], None],
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = topology.link(names.lbs)
        self._topology = topology
        self._locks = locks
        self._names = names
        self._consumer = consumer
        self._leases = leases
        self._renewer = renewer
        self._retry = retry
        self._patience = patience
        self._on_lost = on_lost
        self._dead_letters = requeuer.dead_letters
        self._dlq_max_len = dlq_max_len
        self._put = requeuer.requeue
        self._delayed_entries = DelayedEntries(self._link, names, logger)
        # One for each batch under way, and those that are on the server.
        self._receipts = [names.receipt(consumer, number) for number in range(BATCHES)]
        self._written: set[bytes] = set()
        # Where scripts or receipts are forbidden, or a receipt would be on another server.
        slots = {key_slot(key) for key in (names.lbs, *self._receipts)}
        self._apart = not topology.single and len(slots) > 1
        self._no_scripts = Denied(self._link)
        self._stored = Entries(self._link, names)
        self._recorder = recorder
        self._logger = logger
        self._failing = False
        self._ack = Template(b"XACK", names.lbs, names.group, ITEM)
        self._delete = Template(b"XDEL", names.lbs, ITEM)
        self._asked = asyncio.Event()
        self._done = CompletionQueue(self._asked.set)
        self._released = CompletionQueue(self._asked.set)
        self._rest = CompletionQueue(self._asked.set)
        self._delayed = CompletionQueue(self._asked.set)
        self._dead = CompletionQueue(self._asked.set)
        # What becomes of those in each, and how many of them one batch takes, of how many bytes.
        self._queues = (
            (self._done, self._finish, 0),
            (self._released, self._hand_over, 0),
            (self._rest, self._hand_back_others, 0),
            (self._delayed, self._delay, BATCH_BYTES),
            (self._dead, self._dead_letter, BATCH_BYTES),
        )
        self._others: dict[Entry, list[Entry]] = {}
        self._failures: dict[Entry, Failure] = {}
        self.done = self._done.ask
        """Finishes the stream: XACK, XDEL, then the locks. Fails with `StreamNotOwned` if lost."""
        self.release = self._released.ask
        """Hands the stream over: its entries are put back as they are, then the locks released."""
        self._under_way: set[asyncio.Task[None]] = set()
        # One at most: where the dead-letter stream can't be written all else goes on.
        self._dead_under_way: asyncio.Task[None] | None = None
        self._running = False
        self._failure: BaseException | None = None

    def requeue_rest(self, head: Entry, others: list[Entry]) -> None:
        """A stream was lost by one of its entries: puts the others back, and releases its locks.

        There is nobody to wait for it: what fails here is recovered by others.
        """
        self._others[head] = others
        self._rest.ask(head).add_done_callback(consume_exception)

    def fail(self, head: Entry, failure: Failure) -> Future:
        """Ends ownership of a stream that failed: it waits until it is due, or is a dead letter."""
        future = (self._delayed if failure.reason is None else self._dead).ask(head)
        if not future.done():
            self._failures[head] = failure
        return future

    async def idle(self) -> None:
        """Waits until all that was asked for has ended, well or badly."""
        while True:
            if self._under_way:
                await asyncio.wait(self._under_way)
            elif self._running and any(queue for queue, _, _ in self._queues):
                await asyncio.sleep(0)
            else:
                return

    async def tidy(self) -> None:
        """Removes what only calls that are sent again would need; for when it is `idle`."""
        if self._written:
            with contextlib.suppress(RelstreamError):  # they expire
                await self._link.execute(b"DEL", *self._written)

    async def run(self) -> None:
        """Serves `done`, `release`, `fail` and `requeue_rest` until cancelled."""
        for queue, _, _ in self._queues:
            queue.open(asyncio.get_running_loop().create_future)
        self._running = True
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                if self._failure is not None:
                    raise self._failure
                for queue, end, most_bytes in self._queues:
                    while queue and not (queue is self._dead and self._dead_under_way):
                        while len(self._under_way) >= BATCHES:
                            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                        task = asyncio.ensure_future(
                            self._run_batch(end, queue.next_batch(BATCH, most_bytes))
                        )
                        self._under_way.add(task)
                        if queue is self._dead:
                            self._dead_under_way = task
                        task.add_done_callback(self._batch_ended)
        finally:
            self._running = False
            await cancel_and_wait(self._under_way)
            for queue, _, _ in self._queues:
                _fail(queue.close(_closed), _closed())

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if task is self._dead_under_way:
            self._dead_under_way = None
            self._asked.set()
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._asked.set()

    async def _run_batch(
        self,
        end: Callable[[CompletionQueue, list[Entry], _Attempt], Awaitable[None]],
        endings: CompletionQueue,
    ) -> None:
        """Tries until it works, as often as `retry` allows. Trying again is safe."""
        backoff = Backoff(self._retry.initial_delay, self._retry.max_delay)
        forbidden = Forbidden()
        entries = endings.entries()
        owned = end != self._hand_back_others
        handed_over = end in (self._hand_over, self._hand_back_others)
        failed = list(endings.heads) if self._failures else []
        call = _Attempt(self._receipts.pop())
        try:
            while True:
                # Not renewed meanwhile, so that a lock just released does not look lost.
                self._renewer.discard(entries)
                try:
                    if not handed_over and not call.again and len(entries) > len(endings):
                        await self._keep_whole(endings)
                        entries = endings.entries()
                    if entries:
                        await end(endings, entries, call)
                    self._failing = False
                    return
                except RelstreamError as error:
                    if owned:
                        self._renewer.add(entries)
                    passing = is_retriable(error)
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
                self._renewer.add(entries)
            self._give_up(endings, RelstreamError(f"a mistake of ours: {error!r}"), owned)
            raise
        finally:
            self._receipts.append(call.receipt)
            for head in failed:
                self._failures.pop(head, None)

    def _give_up(self, endings: CompletionQueue, error: RelstreamError, owned: bool) -> None:
        """What could not be ended is owned as before; what was lost stays lost."""
        for head in endings.heads:
            if owned:
                head.finishing = False
                self._leases.restore(head)
            else:
                self._others.pop(head, None)
        _fail(endings.futures, error)

    async def _keep_whole(self, endings: CompletionQueue) -> None:
        """Takes out streams that were lost by one of several entries; the others go back.

        The lost one may have come to us again, under another id: finished by that and lost by the
        other, a stream would be nobody's.
        """
        entries = [entry for head in endings.heads if head.again for entry in _all(head)]
        lost = set(entries) - await self._pending(entries)
        for head in self._refuse(endings, lost):
            self.requeue_rest(head, _all(head))

    async def _finish(self, endings: CompletionQueue, entries: list[Entry], call: _Attempt) -> None:
        self._complete(endings, await self._finish_all(endings, entries, call), "done")

    async def _finish_all(
        self,
        endings: CompletionQueue,
        entries: list[Entry],
        call: _Attempt,
        delayed: Sequence[tuple[int, bytes]] = (),
    ) -> set[Entry]:
        """Finishes these, and delays what is given, one for each stream; returns entries lost."""
        # What a try in steps may have acknowledged the script would take for lost.
        if not (self._apart or self._no_scripts or call.in_steps) and len(entries) == len(endings):
            lost = await self._finish_at_once(entries, call, delayed)
            if lost is not None:
                return lost
        call.in_steps = True
        # Only once: what is due may be gone again. A crash before the next step may let it come
        # twice, and can't lose it.
        if delayed and not call.delayed_in_steps:
            await self._delayed_entries.add(delayed)
            call.delayed_in_steps = True
        lost = await self._finish_in_steps(entries, call.again)
        surplus = [
            member
            for head, (_, member) in zip(endings.heads, delayed, strict=False)
            if not lost.isdisjoint(_all(head))
        ]
        if surplus:
            await self._delayed_entries.remove(surplus)
        return lost

    async def _delay(self, endings: CompletionQueue, entries: list[Entry], call: _Attempt) -> None:
        """Failed streams wait until they are due, each by its first entry; others are finished."""
        if call.delayed is None:
            fields = await self._fields(endings.heads)
            call.delayed = [
                (self._failures[head].due_ms, packed([head.id, *pairs]))
                for head, pairs in zip(endings.heads, fields, strict=True)
            ]
        due_now = any(self._failures[head].now for head in endings.heads)
        lost = await self._finish_all(endings, entries, call, call.delayed)
        self._complete(endings, lost, "failed")
        if due_now:
            with contextlib.suppress(RelstreamError):  # the leader does it
                await self._delayed_entries.move_due()

    async def _dead_letter(
        self, endings: CompletionQueue, entries: list[Entry], call: _Attempt
    ) -> None:
        """Failed streams become dead letters, each by its first entry; others are finished.

        They are added there first: a crash may leave one twice, and can't lose it.
        """
        heads = list(endings.heads)
        reasons = [self._failures[head].reason or b"" for head in heads]
        if call.dead_letters is None:
            fields = await self._fields(heads)
            ids = [head.id for head in heads]
            added = await self._dead_letters.add(
                list(zip(ids, fields, reasons, strict=True)), self._dlq_max_len
            )
            error = first_error(added)
            copies = [each for each in added if isinstance(each, bytes)]
            if error is not None:
                await self._dead_letters.delete(copies)
                raise error
            call.dead_letters = copies
        lost = await self._finish_all(endings, entries, call)
        surplus = {h for h in heads if not lost.isdisjoint(_all(h))}
        await self._dead_letters.delete(
            [copy for head, copy in zip(heads, call.dead_letters, strict=True) if head in surplus]
        )
        self._complete(endings, lost, "failed")
        for reason in set(reasons):
            names = [
                head.data_stream_name
                for head, why in zip(heads, reasons, strict=True)
                if why == reason and head not in surplus
            ]
            if not names:
                continue
            self._logger.warning("%d entries became dead letters: %s", len(names), reason.decode())
            if self._recorder is not None:
                self._recorder.dlq_routing(streams=names, reason=reason.decode())

    async def _fields(self, heads: list[Entry]) -> list[list[bytes]]:
        """Field names and values of failed entries, with what failed.

        Of those that have more fields than we know they are read; one that was trimmed consists of
        what we know.
        """
        stored: dict[bytes, list[bytes]] = {}
        unknown = [head for head in heads if head.announcement is None]
        async for part, batches in self._stored.read(EntryIds(entry_ids(unknown))):
            for entry_id, batch in zip(part, batches, strict=True):
                if len(batch):
                    stored[entry_id] = batch.pairs(0) or []
        fields = []
        for head in heads:
            pairs = stored.get(head.id) or known_fields(head)
            fields.append(replace_fields(pairs, self._failures[head].fields))
        return fields

    async def _finish_at_once(
        self, entries: list[Entry], call: _Attempt, delayed: Sequence[tuple[int, bytes]]
    ) -> set[Entry] | None:
        """Finishes by the script; returns entries that were lost, None where it can't be.

        A cluster has the locks elsewhere: they are released then.
        """
        self._written.add(call.receipt)
        together = self._topology.together
        locks = lock_keys(entries) if together else []
        keys = [self._names.lbs, call.receipt, *locks]
        args = [self._names.group, self._consumer.encode(), call.token, b"%d" % RECEIPT_MS]
        args += id_range(entries)
        args += [b"%d" % len(entries), *entry_ids(entries)]
        script = FINISH
        if delayed:
            script = FAIL
            keys.append(self._names.delayed)
            for due, member in delayed:
                args += (b"%d" % due, member)
        start = time.perf_counter()
        (reply,) = await run(self._link, script, [(keys, args)])
        if isinstance(reply, ReplyError):
            if reply.code == "TRYAGAIN" and not call.again:
                return None  # its slot moves: receipt and stream are in different places
            if not refused(reply):
                raise reply
            if script is FINISH:  # else it may be the right to delay that lacks
                await self._forbidden(reply, call.receipt)
            return None
        missed = list(map(int, reply[len(call.token) :].split()))
        lost = {entries[-place - 1] for place in missed if place < 0}
        if not together:
            doubtful = [place for place, entry in enumerate(entries) if entry in lost]
            lost -= await self._lost_with_group(
                [entries[place] for place in doubtful],
                call,
                [delayed[place] for place in doubtful] if delayed else (),
            )
            await self._unlock([entry for entry in entries if entry not in lost])
        elif self._recorder is not None:
            self._released_locks(len(entries) - len(lost), len(missed) - len(lost), start)
        return lost

    async def _lost_with_group(
        self, entries: list[Entry], call: _Attempt, delayed: Sequence[tuple[int, bytes]]
    ) -> set[Entry]:
        """Deletes those that are there and locked by us, and returns them; first they are delayed.

        They were lost with their group: who puts an entry back deletes it in the same step. The new
        group may have delivered them to another consumer, who could not lock them. In a second try
        the lock is enough: the first may have deleted them.
        """
        held = await self._locks.held(lock_keys(entries), known=True)
        locked = list(compress(entries, held))
        if delayed and locked and not call.delayed_in_steps:
            await self._delayed_entries.add(list(compress(delayed, held)))
            call.delayed_in_steps = True
        deleted = await self._deleted(locked)
        ours = set(locked) if call.again else deleted
        if delayed and len(ours) < len(locked):
            members = zip(locked, compress(delayed, held), strict=True)
            await self._delayed_entries.remove(
                [member for entry, (_, member) in members if entry not in ours]
            )
        if ours:
            ids = entry_ids(list(ours))
            raise_first(await self._link.pipeline(self._ack.pack(ids), len(ids)))
        return ours

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
            self._no_scripts.remember()  # who releases locks says so
            return
        (reply,) = await self._link.pipeline(pack(b"GET", receipt), 1)
        if isinstance(reply, ReplyError) and reply.code == "NOPERM":
            if not self._no_scripts.remember():
                return
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

    async def _hand_over(
        self, endings: CompletionQueue, entries: list[Entry], call: _Attempt
    ) -> None:
        held = await self._locks.held(lock_keys(entries), known=True)
        doubtful = [entry for entry, locked in zip(entries, held, strict=True) if not locked]
        theirs = set(doubtful) - await self._pending(doubtful)
        ours = await self._requeuer([entry for entry in entries if entry not in theirs])
        # What an earlier try has put back is not pending any more.
        lost = set() if call.again else {entry for entry in entries if entry not in ours}
        await self._unlock([entry for entry in entries if entry not in lost])
        self._complete(endings, lost, "released")

    async def _hand_back_others(
        self, endings: CompletionQueue, entries: list[Entry], call: _Attempt
    ) -> None:
        others = [entry for head in endings.heads for entry in self._others[head]]
        if others:
            ours = await self._pending(others)
            await self._requeuer([entry for entry in others if entry in ours])
        await self._unlock(entries)
        for head in endings.heads:
            del self._others[head]
        self._complete(endings, set(), "lost")

    async def _pending(self, entries: list[Entry]) -> set[Entry]:
        """Those pending for us: others' are theirs, under the same id even (XCLAIM)."""
        keys, ids = lock_keys(entries), entry_ids(entries)
        mine = await pending_for(self._link, self._names, self._consumer, keys, ids)
        return {entry for entry in entries if entry.lock_key in mine}

    async def _requeuer(self, entries: list[Entry]) -> set[Entry]:
        """Puts entries back as they are; returns those that were still pending."""
        returned: set[Entry] = set()
        by_id = {entry.id: entry for entry in entries}
        async for part, batches in self._stored.read(EntryIds(entry_ids(entries))):
            there = []
            for entry_id, batch in zip(part, batches, strict=True):
                entry = by_id[entry_id]
                stored = batch.pairs(0) if len(batch) else None
                there.append((entry, stored or known_fields(entry)))
            # Without their locks: these are ours.
            outcomes = await self._put([(entry.id, pairs, None) for entry, pairs in there])
            returned.update(
                entry for (entry, _), how in zip(there, outcomes, strict=True) if how == REQUEUED
            )
        return returned

    async def _unlock(self, entries: list[Entry]) -> None:
        start = time.perf_counter()
        missed = await self._locks.release(lock_keys(entries))
        if self._recorder is not None:
            self._released_locks(len(entries), len(missed), start)

    def _released_locks(self, count: int, failed: int, start: float) -> None:
        assert self._recorder is not None
        if count:
            took = time.perf_counter() - start
            self._recorder.lock_release(succeeded=count - failed, failed=failed, duration=took)

    def _refuse(self, endings: CompletionQueue, lost: set[Entry]) -> list[Entry]:
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

    def _complete(self, endings: CompletionQueue, lost: set[Entry], outcome: Outcome) -> None:
        if lost:
            self._refuse(endings, lost)
        self._leases.drop(endings.heads, outcome)
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
