"""The table of owned streams.

A lease is the lock of one LBS entry, held by this consumer and renewed by its `LeaseRenewer`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from relstream._core import (
    ITEM,
    PENDING,
    Audit,
    Entry,
    EntryIds,
    Template,
    entry_ids,
    forget,
    grant,
    lock_keys,
)
from relstream.errors import ReplyError
from relstream.lbs.entries import TOO_LATE
from relstream.lbs.names import Names, split_lock_key, start_after
from relstream.lbs.stream import Entries
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream.lbs.locks import Locks
    from relstream.net.topology import KeyConnection
    from relstream.ownership.renewer import LeaseRenewer
    from relstream.recorder import Outcome, SafeRecorder

# Pending entries compared between two looks at what else there is to do.
AUDIT_PAGE = 1000
# Heartbeats between two looks whether an entry is ours that is not pending for us, as its group was
# lost: all that is owned may be such.
LOOK_ELSEWHERE_EVERY = 10
# The part of the time after which others recover an entry that was read and is not locked yet: from
# then on they may have.
DOUBTFUL_AFTER = 0.75
# Seconds within which an entry is always locked in time, on a cluster; else some settings would let
# nothing be owned at all.
SOONEST = 0.1


class OwnedStream(NamedTuple):
    """A data stream that this consumer owns, as `StreamClient.owned` lists it.

    Times are seconds on the clock of `time.monotonic()` of this process.
    """

    data_stream_name: str
    id_in_lbs: str
    """The id of the LBS entry, `<ms>-<seq>`: the fencing token."""
    since: float
    """When the lock was taken."""
    lease_deadline: float
    """When the lease ends unless it is renewed before, which happens every half
    `heartbeat_interval`. Counted from when the renewal was sent: the lock itself lives longer."""


async def pending_for(
    link: KeyConnection, names: Names, consumer: str, keys: list[bytes], ids: list[bytes]
) -> dict[bytes, int]:
    """Those of `keys` whose ids are pending for the consumer, and for how many ms they were.

    By XPENDING, ranges of one id.
    """
    ask = Template(b"XPENDING", names.lbs, names.group, ITEM, ITEM, 1)
    replies = await link.pipeline(ask.pack(ids), len(ids), decode=PENDING)
    me = consumer.encode()
    found = {}
    for key, page in zip(keys, replies, strict=True):
        if isinstance(page, ReplyError):
            if page.code == "NOGROUP":
                continue
            raise page
        if len(page) and page[0][1] == me:
            found[key] = page[0][2]
    return found


class Leases:
    """The table of owned streams. All of it happens on the application's loop.

    `recovered_after`: seconds for which an entry must have been delivered before others recover it.
    """

    def __init__(
        self,
        link: KeyConnection,
        locks: Locks,
        names: Names,
        consumer: str,
        *,
        together: Callable[[], bool],
        recovered_after: float,
        renewer: LeaseRenewer,
        on_drop: Callable[[], None],
        recorder: SafeRecorder | None,
    ) -> None:
        self._link = link
        self._locks = locks
        self._names = names
        self._consumer = consumer
        self._renewer = renewer
        self._together = together
        self._recovered_after_ms = max(recovered_after, SOONEST) * 1000
        self._doubtful_after = recovered_after * DOUBTFUL_AFTER
        self._on_drop = on_drop
        self._recorder = recorder
        self._born = math.inf
        # Locks of entries that are ours though not pending for us, and when that was seen last.
        self._elsewhere: dict[bytes, float] = {}
        self._owned: dict[str, Entry] = {}
        self.get: Callable[[Any], Entry | None] = self._owned.get
        """The entry by which a stream of this name is owned; None when it is not."""

    def __len__(self) -> int:
        return len(self._owned)

    @property
    def table(self) -> dict[str, Entry]:
        """The first entry of every owned stream, by its name; only to be read."""
        return self._owned

    def all(self) -> list[Entry]:
        """The first entry of every owned stream."""
        return list(self._owned.values())

    async def acquire(
        self, entries: list[Entry], asked_at: float, *, again: bool = False
    ) -> tuple[list[Entry], list[tuple[Entry, ReplyError]]]:
        """Locks entries just read; returns those that bring a new stream.

        An entry whose lock somebody holds stays pending, and so do those that the server refused,
        which are returned with these refusals, or with `TOO_LATE`. `asked_at` is when the read was
        sent (loop time): if that is long ago, others may have recovered the entries in the
        meantime. `again`: we may have locked them ourselves, and not heard of it.
        """
        start = time.perf_counter()
        sent_at = time.monotonic()
        keys = lock_keys(entries)
        replies = await self._locks.acquire(keys)
        late = asyncio.get_running_loop().time() - asked_at > self._doubtful_after
        if late or again:
            replies = await self._confirmed(entries, keys, replies)
        new, locked, refusal = grant(
            entries, replies, self._owned, time.monotonic(), sent_at + self._locks.ttl
        )
        if locked:
            self._renewer.add(locked)
        if None in replies and not late and not again:
            pairs = zip(entries, replies, strict=True)
            await self._locks.warn_of_holder([entry for entry, reply in pairs if reply is None])
        if self._recorder is not None:
            succeeded = replies.count(b"OK")
            self._recorder.lock_acquisition(
                succeeded=succeeded,
                failed=len(replies) - succeeded,
                duration=time.perf_counter() - start,
            )
        if refusal is None:
            return new, []
        pairs = zip(entries, replies, strict=True)
        return new, [(entry, reply) for entry, reply in pairs if isinstance(reply, ReplyError)]

    async def _confirmed(
        self, entries: list[Entry], keys: list[bytes], replies: list[Any]
    ) -> list[Any]:
        """`replies`, for what is locked by us and pending for us since.

        On a cluster not for longer than after which it may be recovered: `TOO_LATE`.
        """
        held = [key for key, reply in zip(keys, replies, strict=True) if reply is None]
        mine = list(compress(held, await self._locks.held(held, known=True) if held else ()))
        # Not just to be found: the renewer's next turn may come after their end.
        gone, taken, refusals = await self._locks.renew(mine) if mine else ([], [], [])
        raise_first(refusals)
        ours = set(mine).difference(gone, taken)
        replies = [b"OK" if key in ours else r for key, r in zip(keys, replies, strict=True)]
        ids = entry_ids(entries)
        still = await pending_for(self._link, self._names, self._consumer, keys, ids)
        most = math.inf if self._together() else self._recovered_after_ms
        late = {
            key: TOO_LATE if key in still else None
            for key, reply in zip(keys, replies, strict=True)
            if reply == b"OK" and still.get(key, math.inf) >= most
        }
        if late:
            await self._locks.release(list(late))
        return [late.get(key, reply) for key, reply in zip(keys, replies, strict=True)]

    async def unlock(self, keys: list[bytes]) -> list[bytes]:
        """Deletes locks that are ours; returns those that were not."""
        return await self._locks.release(keys) if keys else []

    def drop(self, heads: list[Entry], outcome: Outcome) -> None:
        """The ownership of the streams of these first entries ends, unless it has before."""
        ended: list[str] = []
        if self._recorder is not None:
            ended = [head.data_stream_name for head in heads if head.delivered and not head.ended]
        forget(heads, self._owned)
        self._on_drop()
        if self._recorder is not None and ended:
            self._recorder.stream_processing_end(streams=ended, outcome=outcome)

    def restore(self, head: Entry) -> None:
        """The stream of this entry could not be finished, and is owned as before."""
        other = self._owned.setdefault(head.data_stream_name, head)
        if other is head:
            return
        # It was announced, and taken, once more in the meantime.
        if head.delivered and not other.delivered:
            self._owned[head.data_stream_name] = head
            other.ended = True  # there is nothing to tell of it any more
            head, other = other, head
        other.again = [*(other.again or ()), head, *(head.again or ())]

    def by_lock(self, key: bytes) -> Entry | None:
        """The first entry of the owned stream that has this lock."""
        parts = split_lock_key(key)
        entry = self._owned.get(parts[0]) if parts is not None else None
        if entry is None or key not in locks_of(entry):
            return None
        return entry

    async def audit(self, min_idle: float) -> tuple[list[Entry], list[bytes], list[bytes]]:
        """Compares what is owned with what is pending for this consumer (XPENDING, by pages).

        Returns first entries of streams that are lost, and ids pending for this consumer, for at
        least `min_idle` seconds, which it does not own: those it has read itself, and those that
        were delivered under its name before the first audit, which comes before the first read.
        """
        first = self._born == math.inf
        if first:
            self._born = time.monotonic()
        entries = list(self._owned.values())
        entries += [entry for head in entries if head.again for entry in head.again]
        audit = Audit(entries)
        lost: dict[Entry, None] = {}
        strays: list[bytes] = []
        former: list[bytes] = []
        missed: set[bytes] = set()
        start: bytes | None = b"-"
        while start is not None:
            page = await self._link.execute(
                b"XPENDING", self._names.lbs, self._names.group, start, b"+", AUDIT_PAGE,
                self._consumer, decode=PENDING,
            )  # fmt: skip
            start = start_after(page[-1][0]) if len(page) == AUDIT_PAGE else None
            missing, found = audit.page(page, round(min_idle * 1000), start is None)
            if found:
                # Counted from here to the reply, so that what we have read is always younger.
                lived = 0 if first else math.ceil((time.monotonic() - self._born) * 1000) + 1
                older = set(page.idle(lived))
                strays += [entry_id for entry_id in found if entry_id not in older]
                former += [entry_id for entry_id in found if entry_id in older]
            missed.update(lock_keys(missing))
            for entry in await self._lost(missing):
                head = self._owned.get(entry.data_stream_name)
                if head is None or head in lost or head.finishing:
                    continue
                if entry.lock_key in locks_of(head):
                    lost[head] = None
        for key in self._elsewhere.keys() - missed:
            del self._elsewhere[key]
        return list(lost), strays, former

    async def _lost(self, missing: list[Entry]) -> list[Entry]:
        """Those of the entries not pending for this consumer that it has lost.

        Who puts an entry back deletes it. One that is still there, and locked by us, is ours: its
        group was destroyed, and the new one has not delivered it yet, or to another consumer, who
        can't lock it. One that was given to another (XCLAIM) was delivered more than once.
        """
        now = time.monotonic()
        recent = now - LOOK_ELSEWHERE_EVERY * self._locks.ttl
        doubtful = [
            entry for entry in missing if self._elsewhere.get(entry.lock_key, -math.inf) < recent
        ]
        lost: list[Entry] = []
        for start in range(0, len(doubtful), AUDIT_PAGE):
            some = doubtful[start : start + AUDIT_PAGE]
            ours = await self._ours_elsewhere(some)
            lost += [entry for entry in some if entry.lock_key not in ours]
            self._elsewhere.update(dict.fromkeys(ours, now))
        return lost

    async def _ours_elsewhere(self, entries: list[Entry]) -> set[bytes]:
        """Lock keys of the entries that are ours, though not pending for us."""
        held = await self._locks.held(lock_keys(entries), known=True)
        entries = list(compress(entries, held))
        ids = entry_ids(entries)
        pending = Template(b"XPENDING", self._names.lbs, self._names.group, ITEM, ITEM, 1)
        pages = raise_first(await self._link.pipeline(pending.pack(ids), len(ids), decode=PENDING))
        kept = {
            entry.id: entry.lock_key
            for entry, page in zip(entries, pages, strict=True)
            if not len(page) or page[0][3] == 1
        }
        ours: set[bytes] = set()
        async for _, batches in Entries(self._link, self._names).read(EntryIds(list(kept))):
            ours.update(kept[entry_id] for batch in batches for entry_id in batch.ids())
        return ours


def locks_of(head: Entry) -> list[bytes]:
    """The locks of all entries by which a stream is owned."""
    return [head.lock_key, *(entry.lock_key for entry in head.again or ())]
