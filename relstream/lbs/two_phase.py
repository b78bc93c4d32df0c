"""Requeues by XACK, then XADD, where one atomic script can't do it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, PENDING, EntryIds, Template, pack, scatter
from relstream.backoff import Backoff
from relstream.errors import ConnectionLost, ProtocolError, RelstreamError, ReplyError
from relstream.lbs.dead_letter import DeadLetterQueue
from relstream.lbs.entries import ALIVE, Fence, Returning
from relstream.lbs.locks import held_locks
from relstream.lbs.names import INPUT_FIELD, REASON_EXHAUSTED, Names
from relstream.lbs.stream import Entries
from relstream.net.replies import raise_first
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

# Seconds after which an entry between its two steps is tried again, at first and at most.
DOUBT = 0.1
ADD_AGAIN = 2.0

# No entry has this id unless somebody chose it by hand.
PROBED_ID = b"0-1"


class TwoPhaseRequeue:
    """Requeues in two steps where scripts are forbidden, or an entry has too many fields for one.

    XACK comes first, then XADD and XDEL for the entries that it acknowledged. A crash between the
    two would lose them: such gaps are counted. While this process lives, acknowledged entries are
    re-added until that succeeds, across reconnects.
    """

    def __init__(
        self,
        topology: Topology,
        names: Names,
        dead_letters: DeadLetterQueue,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._link = topology.link(names.lbs)
        self._names = names
        self._dead_letters = dead_letters
        self._recorder = recorder
        self._logger = logger
        # Between their two steps, and those among them that something keeps from the second.
        self._moving: set[asyncio.Task[list[int]]] = set()
        self._stuck: set[asyncio.Task[Any]] = set()

    async def requeue(self, entries: Sequence[Returning], fence: Fence | None) -> list[int]:
        """For each entry REQUEUED, LOST or ALIVE, as `Requeuer.requeue` returns."""
        while self._stuck:
            await asyncio.wait(self._stuck)  # what was won before comes first
        # Before their locks are looked at: while writes are paused locks lapse.
        if any(pairs for _, pairs, _ in entries):
            await self._check_adding()
        else:
            await self._link.execute(b"XACK", self._names.lbs, self._names.group, b"0-0")
        taken = await held_locks(self._topology, entries)
        await check_fence(self._topology, fence)
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
                taken = await held_locks(self._topology, doubtful)
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
        copies = await self._dead_letters.add(letters, 0)
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


async def check_fence(topology: Topology, fence: Fence | None) -> None:
    """Raises FENCED unless the fence holds; for requeues that take several steps."""
    if fence is not None:
        value = await topology.link(fence.key).execute(b"GET", fence.key)
        if value != fence.value:
            raise ReplyError("FENCED another consumer leads by now")


def _shown(pairs: list[bytes]) -> str:
    """An announcement, for a person to read."""
    return repr(dict(zip(pairs[::2], pairs[1::2], strict=True)).get(INPUT_FIELD, b"")[:100])
