"""How a batch of owned streams is completed: by one atomic script, or in steps; receipts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from relstream._core import (
    ITEM,
    CompletionQueue,
    Entry,
    EntryIds,
    Template,
    entry_ids,
    id_range,
    key_slot,
    lock_keys,
    pack,
)
from relstream.errors import RelstreamError, ReplyError
from relstream.lbs.delayed import DelayedEntries
from relstream.lbs.entries import REQUEUED
from relstream.lbs.names import known_fields, replace_fields
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import FAIL, FINISH, run
from relstream.lbs.stream import Entries
from relstream.net.replies import raise_first
from relstream.ownership.leases import pending_for

if TYPE_CHECKING:
    from relstream.lbs.failures import Failure
    from relstream.lbs.locks import Locks
    from relstream.lbs.names import Names
    from relstream.lbs.requeue import Requeuer
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

    Future = asyncio.Future[None]

# Batches under way at the same time: while the server works on one, the next is being prepared.
BATCHES = 4
# Milliseconds for which a call of the script whose answer got lost can be sent again.
RECEIPT_MS = 600_000


class Attempt:
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


class Completion:
    """Acknowledges, deletes and unlocks entries, or requeues them. Trying again is safe."""

    def __init__(
        self,
        topology: Topology,
        locks: Locks,
        names: Names,
        consumer: str,
        *,
        requeuer: Requeuer,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = topology.link(names.lbs)
        self._topology = topology
        self._locks = locks
        self._names = names
        self._consumer = consumer
        self._requeuer = requeuer
        self.delayed_entries = DelayedEntries(self._link, names, logger)
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
        self._ack = Template(b"XACK", names.lbs, names.group, ITEM)
        self._delete = Template(b"XDEL", names.lbs, ITEM)

    def begin(self) -> Attempt:
        """What all attempts to complete one batch share; at most `BATCHES` at a time."""
        return Attempt(self._receipts.pop())

    def end(self, call: Attempt) -> None:
        """The batch has ended, well or badly."""
        self._receipts.append(call.receipt)

    async def delete_receipts(self) -> None:
        """Deletes what only repeated calls would need; for when no batch is under way."""
        if self._written:
            with contextlib.suppress(RelstreamError):  # they expire
                await self._link.execute(b"DEL", *self._written)

    async def finish(
        self,
        endings: CompletionQueue,
        entries: list[Entry],
        call: Attempt,
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
            await self.delayed_entries.add(delayed)
            call.delayed_in_steps = True
        lost = await self._finish_in_steps(entries, call.again)
        surplus = [
            member
            for head, (_, member) in zip(endings.heads, delayed, strict=False)
            if not lost.isdisjoint(all_of(head))
        ]
        if surplus:
            await self.delayed_entries.remove(surplus)
        return lost

    async def fields(
        self, heads: list[Entry], failures: Mapping[Entry, Failure]
    ) -> list[list[bytes]]:
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
            fields.append(replace_fields(pairs, failures[head].fields))
        return fields

    async def _finish_at_once(
        self, entries: list[Entry], call: Attempt, delayed: Sequence[tuple[int, bytes]]
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
            await self.unlock([entry for entry in entries if entry not in lost])
        elif self._recorder is not None:
            self._released_locks(len(entries) - len(lost), len(missed) - len(lost), start)
        return lost

    async def _lost_with_group(
        self, entries: list[Entry], call: Attempt, delayed: Sequence[tuple[int, bytes]]
    ) -> set[Entry]:
        """Deletes those that are there and locked by us, and returns them; first they are delayed.

        They were lost with their group: who puts an entry back deletes it in the same step. The new
        group may have delivered them to another consumer, who could not lock them. In a second try
        the lock is enough: the first may have deleted them.
        """
        held = await self._locks.held(lock_keys(entries), known=True)
        locked = list(compress(entries, held))
        if delayed and locked and not call.delayed_in_steps:
            await self.delayed_entries.add(list(compress(delayed, held)))
            call.delayed_in_steps = True
        deleted = await self._deleted(locked)
        ours = set(locked) if call.again else deleted
        if delayed and len(ours) < len(locked):
            members = zip(locked, compress(delayed, held), strict=True)
            await self.delayed_entries.remove(
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
                    self._link.execute(b"XDEL", self._names.lbs, *ids), self.unlock(entries)
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

    async def pending(self, entries: list[Entry]) -> set[Entry]:
        """Those pending for us: others' are theirs, under the same id even (XCLAIM)."""
        keys, ids = lock_keys(entries), entry_ids(entries)
        mine = await pending_for(self._link, self._names, self._consumer, keys, ids)
        return {entry for entry in entries if entry.lock_key in mine}

    async def requeue(self, entries: list[Entry]) -> set[Entry]:
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
            outcomes = await self._requeuer.requeue(
                [(entry.id, pairs, None) for entry, pairs in there]
            )
            returned.update(
                entry for (entry, _), how in zip(there, outcomes, strict=True) if how == REQUEUED
            )
        return returned

    async def unlock(self, entries: list[Entry]) -> None:
        start = time.perf_counter()
        missed = await self._locks.release(lock_keys(entries))
        if self._recorder is not None:
            self._released_locks(len(entries), len(missed), start)

    def _released_locks(self, count: int, failed: int, start: float) -> None:
        assert self._recorder is not None
        if count:
            took = time.perf_counter() - start
            self._recorder.lock_release(succeeded=count - failed, failed=failed, duration=took)


def all_of(head: Entry) -> list[Entry]:
    """All entries by which a stream is owned."""
    return [head, *(head.again or ())]


async def _together(*awaitables: Awaitable[Any]) -> list[Any]:
    """What they return, or the first error, once all have ended."""
    outcomes = await asyncio.gather(*awaitables, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
