"""The end of ownership: finishing streams, and handing them over, in batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from relstream._core import (
    CompletionQueue,
    Entry,
    first_error,
    lock_keys,
)
from relstream.backoff import Backoff, Forbidden
from relstream.errors import ClientClosed, RelstreamError, ReplyError, StreamNotOwned, is_retriable
from relstream.lbs.delayed import packed
from relstream.ownership.completion import BATCHES, Attempt, Completion, all_of
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

# Streams that are completed together.
BATCH = 128
# Of failed streams, whose entries go through here, about so many bytes at most.
BATCH_BYTES = 1 << 20


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
        self._locks = locks
        self._leases = leases
        self._renewer = renewer
        self._retry = retry
        self._patience = patience
        self._on_lost = on_lost
        self._dead_letters = requeuer.dead_letters
        self._dlq_max_len = dlq_max_len
        self._recorder = recorder
        self._logger = logger
        self._failing = False
        self._completion = Completion(
            topology,
            locks,
            names,
            consumer,
            requeuer=requeuer,
            recorder=recorder,
            logger=logger,
        )
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

    async def delete_receipts(self) -> None:
        """Deletes what only repeated calls would need; for when this is `idle`."""
        await self._completion.delete_receipts()

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
        end: Callable[[CompletionQueue, list[Entry], Attempt], Awaitable[None]],
        endings: CompletionQueue,
    ) -> None:
        """Tries until it works, as often as `retry` allows. Trying again is safe."""
        backoff = Backoff(self._retry.initial_delay, self._retry.max_delay)
        forbidden = Forbidden()
        entries = endings.entries()
        owned = end != self._hand_back_others
        handed_over = end in (self._hand_over, self._hand_back_others)
        failed = list(endings.heads) if self._failures else []
        call = self._completion.begin()
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
            self._completion.end(call)
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
        entries = [entry for head in endings.heads if head.again for entry in all_of(head)]
        lost = set(entries) - await self._completion.pending(entries)
        for head in self._refuse(endings, lost):
            self.requeue_rest(head, all_of(head))

    async def _finish(self, endings: CompletionQueue, entries: list[Entry], call: Attempt) -> None:
        self._complete(endings, await self._completion.finish(endings, entries, call), "done")

    async def _delay(self, endings: CompletionQueue, entries: list[Entry], call: Attempt) -> None:
        """Failed streams wait until they are due, each by its first entry; others are finished."""
        if call.delayed is None:
            fields = await self._completion.fields(endings.heads, self._failures)
            call.delayed = [
                (self._failures[head].due_ms, packed([head.id, *pairs]))
                for head, pairs in zip(endings.heads, fields, strict=True)
            ]
        due_now = any(self._failures[head].now for head in endings.heads)
        lost = await self._completion.finish(endings, entries, call, call.delayed)
        self._complete(endings, lost, "failed")
        if due_now:
            with contextlib.suppress(RelstreamError):  # the leader does it
                await self._completion.delayed_entries.move_due()

    async def _dead_letter(
        self, endings: CompletionQueue, entries: list[Entry], call: Attempt
    ) -> None:
        """Failed streams become dead letters, each by its first entry; others are finished.

        They are added there first: a crash may leave one twice, and can't lose it.
        """
        heads = list(endings.heads)
        reasons = [self._failures[head].reason or b"" for head in heads]
        if call.dead_letters is None:
            fields = await self._completion.fields(heads, self._failures)
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
        lost = await self._completion.finish(endings, entries, call)
        surplus = {h for h in heads if not lost.isdisjoint(all_of(h))}
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

    async def _hand_over(
        self, endings: CompletionQueue, entries: list[Entry], call: Attempt
    ) -> None:
        held = await self._locks.held(lock_keys(entries), known=True)
        doubtful = [entry for entry, locked in zip(entries, held, strict=True) if not locked]
        theirs = set(doubtful) - await self._completion.pending(doubtful)
        ours = await self._completion.requeue([entry for entry in entries if entry not in theirs])
        # What an earlier try has put back is not pending any more.
        lost = set() if call.again else {entry for entry in entries if entry not in ours}
        await self._completion.unlock([entry for entry in entries if entry not in lost])
        self._complete(endings, lost, "released")

    async def _hand_back_others(
        self, endings: CompletionQueue, entries: list[Entry], call: Attempt
    ) -> None:
        others = [entry for head in endings.heads for entry in self._others[head]]
        if others:
            ours = await self._completion.pending(others)
            await self._completion.requeue([entry for entry in others if entry in ours])
        await self._completion.unlock(entries)
        for head in endings.heads:
            del self._others[head]
        self._complete(endings, set(), "lost")

    def _refuse(self, endings: CompletionQueue, lost: set[Entry]) -> list[Entry]:
        """Takes out what is lost, and tells those who wait for it; returns the first entries."""
        refused = []
        for i in reversed(range(len(endings.heads))):
            head = endings.heads[i]
            if lost.isdisjoint(all_of(head)):
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


def _closed() -> ClientClosed:
    return ClientClosed("the client was closed before the server confirmed this")


def _fail(futures: Sequence[Future], error: RelstreamError) -> None:
    for future in futures:
        if not future.done():
            # One each: an error raised in many places would collect their tracebacks.
            future.set_exception(type(error)(*error.args))
