"""Pending entries: read, added anew under new ids, or routed in the dead-letter stream.

All who give an entry away do it by this: recovery, the owner that hands a stream over, and the
reader that can't lock what it read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from relstream._core import (
    ENTRIES,
    ITEM,
    PENDING,
    Batch,
    EntryIds,
    Plan,
    Template,
    key_slot,
    pack,
    scatter,
)
from relstream.backoff import Backoff
from relstream.errors import (
    ConnectionFailed,
    ConnectionLost,
    ProtocolError,
    RelstreamError,
    ReplyError,
    is_retriable,
)
from relstream.lbs.names import (
    DLQ_REASON_FIELD,
    INPUT_FIELD,
    REASON_EXHAUSTED,
    RETRY_FIELD,
    SEPARATOR,
    SOURCE_FIELD,
    Names,
    replace_fields,
    retry_count,
    start_after,
)
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import REQUEUE, SCRIPT_KEYS, run_packed
from relstream.net.replies import raise_first
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection, Topology
    from relstream.recorder import SafeRecorder

    # An entry's id, its field names and values, and the lock that must be free, if one must.
    Returning = tuple[bytes, list[bytes], bytes | None]

# A call of the script that puts back carries about this much at most.
SCRIPT_BYTES = 1 << 20
# Entries are read in portions of about so many bytes, and at most so many of them.
PORTION_BYTES = 1 << 20
LARGEST_PORTION = 1000
# Seconds after which something that failed between two steps is tried again, at first and at most.
DOUBT = 0.1
ADD_AGAIN = 2.0

# The part of `dlq_max_len` from which on it is said that it is near.
CAP_NEAR = 0.9

# No entry has this id but one that it was given by hand.
PROBED_ID = b"0-1"

REQUEUED, LOST, ALIVE, NOT_BY_SCRIPT, REFUSED = 1, 0, 2, -1, -2

# On a cluster, whoever recovers an entry sees that its lock is free a moment before it takes it
# away. One locked in between would have two owners: it goes back instead, by one of the two.
TOO_LATE = ReplyError("TRYAGAIN it may be recovered as a dead owner's just now")


async def read_entries(link: KeyConnection, names: Names, ids: Iterable[bytes]) -> list[Batch]:
    """Entries of the LBS by their ids, a batch of one or none each (XRANGE)."""
    ask = Template(b"XRANGE", names.lbs, ITEM, ITEM)
    ids = list(ids)
    return raise_first(await link.pipeline(ask.pack(ids), len(ids), decode=ENTRIES))


def fitting(batches: Sequence[Batch], most_bytes: int) -> int:
    """How many entries of the size that these have fit into so many bytes; 1 at least."""
    nbytes = sum(batch.nbytes for batch in batches)
    return max(1, sum(map(len, batches)) * most_bytes // max(1, nbytes))


class Entries:
    """Reads entries of the LBS in portions that fit into memory, whatever size they have."""

    def __init__(self, link: KeyConnection, names: Names) -> None:
        self._link = link
        self._names = names
        self._count = 1  # entries a portion, by the size of what came so far

    async def read(
        self, ids: EntryIds, page_size: int | None = None
    ) -> AsyncIterator[tuple[EntryIds, list[Batch]]]:
        """Portions of the ids, with their entries. `page_size`: they all come from one such page.

        Then they are mostly nearly one range.
        """
        start = 0
        while start < len(ids):
            count = self._count
            part = ids
            if count < len(ids) - start or start:
                part = EntryIds([ids[i] for i in range(start, min(start + count, len(ids)))])
            try:
                if page_size is None or 4 * len(ids) < page_size:
                    batches = await read_entries(self._link, self._names, part)
                else:
                    batches = await self._range(part)
            except (ConnectionFailed, ProtocolError):
                self._count = 1  # it may have been too large a reply
                raise
            start += len(part)
            came = sum(map(len, batches))
            # A small portion tells little of many, unless its entries are large.
            if came:
                self._count = min(
                    fitting(batches, PORTION_BYTES), max(self._count, 4 * came), LARGEST_PORTION
                )
            yield part, batches

    async def _range(self, ids: EntryIds) -> list[Batch]:
        batches: list[Batch] = []
        start: bytes | None = ids[0]
        last, size = ids[-1], len(ids)
        while start is not None:
            batch: Batch = await self._link.execute(
                b"XRANGE", self._names.lbs, start, last, b"COUNT", size, decode=ENTRIES
            )
            batches.append(batch)
            done = len(batch) < size or batch.id(-1) == last
            start = None if done else start_after(batch.id(-1))
        return batches


async def holders(topology: Topology, locks: list[bytes]) -> list[bytes | ReplyError | None]:
    """Who holds each lock, asked by its own GET, or what kept us from reading it.

    A key of another type is nobody's lock, as MGET says too.
    """
    replies = await topology.each(Template(b"GET", ITEM).pack, locks)
    return [None if isinstance(r, ReplyError) and r.code == "WRONGTYPE" else r for r in replies]


def raise_if_all(replies: list[bytes | ReplyError | None]) -> list[bytes | ReplyError | None]:
    """`replies` about locks; raises if no master could be asked for now, as in an outage."""
    refusals = [reply for reply in replies if isinstance(reply, ReplyError) and is_retriable(reply)]
    if refusals and len(refusals) == len(replies):
        raise refusals[0]
    return replies


def plan_for(ids: EntryIds, batches: list[Batch]) -> Plan:
    """What there is to do about pending entries, `batches` being where they are."""
    return Plan(ids, batches, INPUT_FIELD, SEPARATOR, RETRY_FIELD, orjson.loads)


class Fence(NamedTuple):
    """Proves that the leader that judged an entry leads still, and has since before it judged."""

    key: bytes
    value: bytes


class Requeuer:
    """Adds pending entries anew under new ids.

    One atomic step an entry (the script). Where scripts are forbidden XACK comes first, then XADD
    and XDEL for those that were won by it, and a crash between the two would lose them: such gaps
    are counted. As long as we live they are added, whatever happens to server and connection. So it
    is for an entry with more fields than a script can pass on.
    """

    def __init__(
        self,
        topology: Topology,
        names: Names,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._link = topology.link(names.lbs)
        self._names = names
        self._recorder = recorder
        self._logger = logger
        self._no_scripts = Denied(self._link)
        self._no_xlen = Denied(topology.link(names.dlq))
        self._cap_told = False
        # Between their two steps, and those among them that something keeps from the second.
        self._moving: set[asyncio.Task[list[int]]] = set()
        self._stuck: set[asyncio.Task[Any]] = set()

    async def requeue(
        self, entries: Sequence[Returning], *, fence: Fence | None = None
    ) -> list[int]:
        """For each entry REQUEUED, LOST (it was not pending) or ALIVE (locked).

        One without any fields is only acknowledged and deleted. Raises `ReplyError`, once all
        others are put back, when the server refuses that of some; they stay pending. With a `fence`
        nothing is done (FENCED) once that does not hold any more.
        """
        outcomes: list[int]
        if self._topology.together:
            outcomes, refusal = await self._put(self._calls(entries, fence), lambda: entries, fence)
        else:
            outcomes, refusal = await self._requeue_by_node(entries, fence)
        if refusal is not None:
            raise refusal
        return outcomes

    async def route_to_dlq(
        self,
        letters: Sequence[Returning],
        max_len: int,
        reason: bytes,
        *,
        fence: Fence | None = None,
    ) -> list[int]:
        """Moves pending entries to the dead-letter stream; returns what `put` does.

        They are added there before they are acknowledged here: a crash between may put one there
        twice, with the same `_source_id`, and can't lose it. Who finds that another was first, or
        that its owner lives, takes back what it has added. Raises `ReplyError` when the dead-letter
        stream can't be written; the entries stay pending.
        """
        copies = await self.add_dead_letters(
            [(entry_id, pairs, reason) for entry_id, pairs, _ in letters], max_len
        )
        ours: list[tuple[Returning, bytes]] = [
            ((entry_id, [], lock), copy)
            for (entry_id, _, lock), copy in zip(letters, copies, strict=True)
            if not isinstance(copy, ReplyError)
        ]
        outcomes: list[int] = []
        # One call at a time: where it is forbidden, nothing of it was done.
        for start in range(0, len(ours), SCRIPT_KEYS):
            entries = [entry for entry, _ in ours[start : start + SCRIPT_KEYS]]
            try:
                outcomes += await self.requeue(entries, fence=fence)
            except ReplyError as error:
                if error.code == "FENCED":  # another leader sees to them
                    await self.delete_dead_letters([copy for _, copy in ours[start:]])
                raise
        await self.delete_dead_letters(
            [c for (_, c), outcome in zip(ours, outcomes, strict=True) if outcome != REQUEUED]
        )
        raise_first(copies)
        return outcomes

    async def add_dead_letters(
        self, letters: Sequence[tuple[bytes, list[bytes], bytes]], max_len: int
    ) -> list[bytes | ReplyError]:
        """Adds entries, `(id, fields, reason)` each, to the dead-letter stream.

        Returns their ids there; of those that can't be added the error. In the load balancer stream
        they stay pending.
        """
        cap: tuple[bytes | int, ...] = (b"MAXLEN", b"~", max_len) if max_len else ()
        counting = bool(max_len) and not self._no_xlen
        xlen = pack(b"XLEN", self._names.dlq) if counting else b""
        adding = [
            pack(
                b"XADD", self._names.dlq, *cap, b"*",
                *replace_fields(
                    pairs,
                    {
                        RETRY_FIELD: b"%d" % retry_count(pairs),
                        DLQ_REASON_FIELD: reason,
                        SOURCE_FIELD: entry_id,
                    },
                ),
            )
            for entry_id, pairs, reason in letters
        ]  # fmt: skip
        replies = await self._at_dlq(b"".join([xlen, *adding, xlen]), len(adding) + 2 * counting)
        if counting:
            before, *replies, after = replies
            self._look_at_cap(before, replies, after, max_len)
        return replies

    def _look_at_cap(self, before: Any, added: list[Any], after: Any, max_len: int) -> None:
        """Tells of dead letters that were deleted for others, and of those that soon will be."""
        if isinstance(before, ReplyError) or isinstance(after, ReplyError):
            self._no_xlen.remember()
            return
        trimmed = before + sum(not isinstance(reply, ReplyError) for reply in added) - after
        if trimmed > 0 and self._recorder is not None:
            self._recorder.dead_letters_trimmed(count=trimmed)
        near = after >= CAP_NEAR * max_len
        if near and not self._cap_told:
            self._logger.warning(
                "the dead-letter stream %r holds %d of %d entries at most (dlq_max_len): the "
                "oldest are deleted as others come; replay or purge them, or raise dlq_max_len",
                self._names.dlq.decode(), after, max_len,
            )  # fmt: skip
        self._cap_told = near

    async def delete_dead_letters(self, ids: Sequence[bytes]) -> None:
        """Deletes what `add_dead_letters` added, as it was not ours to add."""
        if ids:
            raise_first(await self._at_dlq(pack(b"XDEL", self._names.dlq, *ids), 1))

    async def _at_dlq(self, packed: bytes, replies: int) -> list[Any]:
        """Commands on the dead-letter stream; that it can't be reached is but a refusal.

        Where it is on a master of its own, that may be gone while all else goes on.
        """
        try:
            return await self._topology.link(self._names.dlq).pipeline(packed, replies)
        except ConnectionFailed as error:
            if self._topology.single:
                raise
            raise ReplyError(f"MASTERDOWN {error}") from None

    async def requeue_planned(
        self,
        plan: Plan,
        *,
        counting: bool,
        looked: bool,
        locked: bool = True,
        fence: Fence | None = None,
    ) -> tuple[list[int], ReplyError | None]:
        """The same for what the plan says shall be put back; `counting`: with one more retry.

        `looked`: their locks were seen free just now, with nothing awaited since; not `locked`: no
        lock can be anybody's. What could not be put back is REFUSED, and the reason of one of these
        is returned as well.
        """
        together = self._topology.together

        def entries() -> Sequence[Returning]:
            returning: Sequence[Returning] = plan.returning(counting)
            if locked or together:
                return returning
            return [(entry_id, pairs, None) for entry_id, pairs, _ in returning]

        if not together and not looked:
            return await self._requeue_by_node(entries(), fence)
        here = self._here(fence)
        calls = plan.calls(
            REQUEUE.digest, self._names.lbs, self._names.group,
            counting=counting, locks=together, most=SCRIPT_KEYS, size=SCRIPT_BYTES,
            leader=here and here.key, fence=here.value if here else b"",
        )  # fmt: skip
        return await self._put(calls, entries, fence)

    def _here(self, fence: Fence | None) -> Fence | None:
        """The fence, if a script on the load balancer stream can look at it."""
        if fence is None or self._topology.together:
            return fence
        return fence if key_slot(fence.key) == key_slot(self._names.lbs) else None

    async def _check(self, fence: Fence | None) -> None:
        """Raises FENCED unless the fence holds; for what is done in several steps."""
        if fence is not None:
            value = await self._topology.link(fence.key).execute(b"GET", fence.key)
            if value != fence.value:
                raise ReplyError("FENCED another consumer leads by now")

    async def _requeue_by_node(
        self, entries: Sequence[Returning], fence: Fence | None
    ) -> tuple[list[int], ReplyError | None]:
        """The locks are on other servers than the script: they are looked at just before it."""
        taken = await self._taken(entries)
        free = [(entry_id, pairs, None) for entry_id, pairs, lock in entries if lock not in taken]
        told, refusal = await self._put(self._calls(free, fence), lambda: free, fence)
        outcomes = iter(told)
        return [ALIVE if lock in taken else next(outcomes) for _, _, lock in entries], refusal

    async def _put(
        self,
        calls: list[bytes],
        entries: Callable[[], Sequence[Returning]],
        fence: Fence | None,
    ) -> tuple[list[int], ReplyError | None]:
        outcomes: list[int] = []
        refusal: ReplyError | None = None
        denied = bool(self._no_scripts)
        if fence is not None and self._here(fence) is None:
            await self._check(fence)
        if not denied:
            for call, reply in zip(
                calls, await run_packed(self._link, REQUEUE, calls), strict=True
            ):
                if not isinstance(reply, ReplyError):
                    for outcome in reply:
                        if isinstance(outcome, bytes):
                            refusal = ReplyError(outcome.decode(errors="replace").removeprefix("-"))
                            outcome = REFUSED
                        outcomes.append(outcome)
                elif not refused(reply):
                    raise reply
                elif reply.about_keys:  # one of these locks: for once, in two steps
                    keys = int(call[:200].split(b"\r\n")[6]) - 1
                    if self._here(fence) is not None:
                        keys -= 1
                    if not keys:
                        raise reply
                    outcomes += [NOT_BY_SCRIPT] * keys
                else:
                    denied = True
                    if self._no_scripts.remember():
                        self._logger.warning(
                            "scripts are forbidden (%s): entries are put back in two steps; grant "
                            "+evalsha, +eval and +mget to make that one atomic step",
                            reply,
                        )
                    break
        if denied or NOT_BY_SCRIPT in outcomes:
            told = entries()
            outcomes += [NOT_BY_SCRIPT] * (len(told) - len(outcomes))
            others = [i for i, outcome in enumerate(outcomes) if outcome == NOT_BY_SCRIPT]
            try:
                steps = await self._in_two_steps([told[i] for i in others], fence)
            except ReplyError as error:
                # What shall become a dead letter still can where nothing can be added any more.
                if len(others) == len(outcomes) and not error.exhausted:
                    raise
                refusal = error
                steps = [REFUSED] * len(others)
            for i, outcome in zip(others, steps, strict=True):
                outcomes[i] = outcome
        return outcomes, refusal

    def _calls(self, entries: Sequence[Returning], fence: Fence | None) -> list[bytes]:
        here = self._here(fence)
        first = [self._names.lbs] if here is None else [self._names.lbs, here.key]
        value = b"" if here is None else here.value
        calls: list[tuple[list[bytes], list[Any]]] = []
        size = held = fields = 0
        for entry_id, pairs, lock in entries:
            if not calls or held >= SCRIPT_KEYS or size >= SCRIPT_BYTES or len(pairs) != fields:
                fields = len(pairs)
                calls.append(([*first], [self._names.group, fields, value]))
                size = held = 0
            keys, args = calls[-1]
            if lock is not None:
                keys.append(lock)
            args += (entry_id, *pairs)
            held += 1
            size += sum(map(len, pairs))
        return [pack(b"EVALSHA", REQUEUE.digest, len(keys), *keys, *args) for keys, args in calls]

    async def _taken(self, entries: Sequence[Returning]) -> set[bytes]:
        """The locks among those of the entries that somebody holds, or that we may not read."""
        locks = [lock for _, _, lock in entries if lock is not None]
        held = raise_if_all(await holders(self._topology, locks))
        return {key for key, value in zip(locks, held, strict=True) if value is not None}

    async def _in_two_steps(self, entries: Sequence[Returning], fence: Fence | None) -> list[int]:
        while self._stuck:
            await asyncio.wait(self._stuck)  # what was won before comes first
        # Before their locks are looked at: while writes are paused locks lapse.
        if any(pairs for _, pairs, _ in entries):
            await self._check_adding()
        else:
            await self._link.execute(b"XACK", self._names.lbs, self._names.group, b"0-0")
        taken = await self._taken(entries)
        await self._check(fence)
        free = [entry for entry in entries if entry[2] not in taken]
        # Whoever stops waiting does not stop it between its two steps.
        moving = asyncio.ensure_future(self._move(free))
        self._moving.add(moving)
        moving.add_done_callback(self._moving.discard)
        moving.add_done_callback(self._stuck.discard)
        counts = iter(await asyncio.shield(moving))
        return [ALIVE if lock in taken else next(counts) for _, _, lock in entries]

    async def _check_adding(self) -> None:
        """Raises what the server would answer now to any XADD (OOM, READONLY, MISCONF, …).

        The id is one that is too small in a stream that had an entry, which is found out after all
        of that. (0-0 would be refused in any, but even in one whose ids are used up.)
        """
        lbs = self._names.lbs
        (reply,) = await self._link.pipeline(
            pack(b"XADD", lbs, b"NOMKSTREAM", PROBED_ID, b"f", b"v"), 1
        )
        if reply == PROBED_ID:  # the stream was deleted just now, and made anew
            await self._link.execute(b"XDEL", lbs, PROBED_ID)
        if isinstance(reply, ReplyError) and (reply.code != "ERR" or reply.exhausted):
            raise reply

    async def _move(self, entries: list[Returning]) -> list[int]:
        """Acknowledges entries, then adds those anew that were won by it, however long it takes."""
        left = {entry_id: pairs for entry_id, pairs, _ in entries}
        ids = list(left)
        ack = Template(b"XACK", self._names.lbs, self._names.group, ITEM)
        broken: RelstreamError | None = None
        start = time.perf_counter()
        gaps = 0
        try:
            try:
                acked = await self._link.pipeline(ack.pack(ids), len(ids))
            except (ConnectionLost, ProtocolError) as error:
                broken = error
                acked = await self._acked(entries, error)
            except RelstreamError:
                left.clear()
                raise
            left = {i: left[i] for i, count in zip(ids, acked, strict=True) if count == 1}
            gaps = sum(1 for pairs in left.values() if pairs)
            await self._add(left)
        finally:
            if self._recorder is not None and gaps:
                self._recorder.ack_add_gap(count=gaps, duration=time.perf_counter() - start)
            if left:
                self._logger.error(
                    "given up: %d entries %s acknowledged and not added again; what is still in "
                    "%r has to be announced anew: %s",
                    len(left), "were" if gaps else "may have been", self._names.lbs.decode(),
                    ", ".join(f"{i.decode()} {_shown(pairs)}" for i, pairs in left.items()),
                )  # fmt: skip
        if broken is not None:
            raise broken
        raise_first(acked)
        return acked

    async def _acked(self, entries: list[Returning], error: RelstreamError) -> list[int]:
        """Whether our XACK was carried out, whose answer got lost: 1 or 0 for each entry.

        It was if an entry is there and not pending, as whoever else takes one away deletes it, too.
        Its owner may be about to: it is given some time, and as long as it has the lock.
        """
        ask = Template(b"XPENDING", self._names.lbs, self._names.group, ITEM, ITEM, 1)
        self._trouble(len(entries), error)
        backoff = Backoff(DOUBT, ADD_AGAIN)
        doubtful = list(entries)
        ours: set[bytes] = set()
        while doubtful:
            await asyncio.sleep(DOUBT + backoff.failed())
            ids = [entry_id for entry_id, _, _ in doubtful]
            try:
                pages = raise_first(
                    await self._link.pipeline(ask.pack(ids), len(ids), decode=PENDING)
                )
                there = await self._there(
                    [i for i, page in zip(ids, pages, strict=True) if not len(page)]
                )
                doubtful = [entry for entry in doubtful if entry[0] in there]
                taken = await self._taken(doubtful)
            except RelstreamError as another:
                self._logger.debug("still not known: %s", another)
                continue
            ours.update(entry_id for entry_id, _, lock in doubtful if lock not in taken)
            doubtful = [entry for entry in doubtful if entry[0] not in ours]
        return [int(entry_id in ours) for entry_id, _, _ in entries]

    async def _there(self, ids: list[bytes]) -> set[bytes]:
        """Those of the ids whose entries are in the stream."""
        there: set[bytes] = set()
        async for _, batches in Entries(self._link, self._names).read(EntryIds(ids)):
            there.update(entry_id for batch in batches for entry_id in batch.ids())
        return there

    async def _add(self, left: dict[bytes, list[bytes]]) -> None:
        """Adds entries that are acknowledged, deletes the old ones, and takes them out of `left`.

        Goes on until it has worked, as nobody else knows of them. If the answer to an XADD is lost,
        its entry is added again: twice, perhaps, rather than not at all.
        """
        backoff = Backoff(DOUBT, ADD_AGAIN)
        added: list[bytes] = []
        while left or added:
            try:
                ids = [entry_id for entry_id, pairs in left.items() if pairs]
                packed = [pack(b"XADD", self._names.lbs, b"*", *left[i]) for i in ids]
                replies = await self._link.pipeline(b"".join(packed), len(packed))
                hopeless = [
                    place
                    for place, reply in enumerate(replies)
                    if isinstance(reply, ReplyError) and reply.exhausted
                ]
                if hopeless:
                    letters = [
                        (ids[place], left[ids[place]], REASON_EXHAUSTED) for place in hopeless
                    ]
                    scatter(replies, hopeless, await self._route_acknowledged(letters))
                refused = {
                    i for i, r in zip(ids, replies, strict=True) if isinstance(r, ReplyError)
                }
                for entry_id in left.keys() - refused:
                    del left[entry_id]
                    added.append(entry_id)
                if added:
                    await self._link.execute(b"XDEL", self._names.lbs, *added)
                    added.clear()
                raise_first(replies)
            except RelstreamError as error:
                if not left and isinstance(error, ReplyError):
                    raise
                self._trouble(len(left), error)
                await asyncio.sleep(backoff.failed())

    async def _route_acknowledged(
        self, letters: list[tuple[bytes, list[bytes], bytes]]
    ) -> list[bytes | ReplyError]:
        """Where the last id went to another entry in between: dead letters, rather than lost."""
        copies = await self.add_dead_letters(letters, 0)
        routed = sum(not isinstance(copy, ReplyError) for copy in copies)
        if routed:
            self._logger.warning(
                "%d entries became dead letters: nothing can be added to %r any more, as an entry "
                "had the last possible id", routed, self._names.lbs.decode(),
            )  # fmt: skip
        return copies

    def _trouble(self, count: int, error: RelstreamError) -> None:
        task = asyncio.current_task()
        assert task is not None
        if task not in self._stuck:
            self._stuck.add(task)
            self._logger.warning(
                "%d entries are being put back in two steps, and the second one is tried until it "
                "works: %s", count, error,
            )  # fmt: skip

    async def wait_until_idle(self) -> None:
        """Waits until nothing is between its two steps."""
        while self._moving:
            await asyncio.wait(self._moving)

    async def close(self) -> None:
        """Gives up what is between its two steps still, and logs what is lost by that."""
        await cancel_and_wait(self._moving)


def _shown(pairs: list[bytes]) -> str:
    """An announcement, for a person to read."""
    return repr(dict(zip(pairs[::2], pairs[1::2], strict=True)).get(INPUT_FIELD, b"")[:100])


async def discard(link: KeyConnection, names: Names, ids: Sequence[bytes]) -> int:
    """Acknowledges and deletes LBS entries that nobody needs any more; how many were pending."""
    packed = pack(b"XACK", names.lbs, names.group, *ids) + pack(b"XDEL", names.lbs, *ids)
    acked: int = raise_first(await link.pipeline(packed, 2))[0]
    return acked
