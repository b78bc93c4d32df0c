"""The steps of recovery for one page of pending entries (contract, section 4)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from relstream._core import Batch, EntryIds, Plan, pack
from relstream.config import check_name
from relstream.errors import AlreadyClaimed, ReplyError
from relstream.lbs.entries import ALIVE, LOST, REQUEUED
from relstream.lbs.failures import with_detail
from relstream.lbs.go_json import name_for_go
from relstream.lbs.locks import holders, raise_if_all
from relstream.lbs.names import REASON_MAX_RETRIES, REASON_UNPARSEABLE, Names, entry_id_of, lock_key
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.requeue import Requeuer
from relstream.lbs.stream import Entries, id_order, plan_for
from relstream.lbs.vanished import Vanished
from relstream.net.replies import raise_first
from relstream.notifications import LBSInfo
from relstream.recovery.grace import GracePeriods
from relstream.recovery.result import ScanResult

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig
    from relstream.lbs.entries import Fence, Returning
    from relstream.lbs.server_clock import ServerClock
    from relstream.net.topology import KeyConnection, Topology
    from relstream.recorder import SafeRecorder
    from relstream.recovery.term import Term

    # A stream's name, if one can be read, and its entry.
    DeadLetterEntry = tuple[str | None, Returning]

# Pages of all walks together that are recovered at the same time: twice those of one walk.
PAGES = 8


class _Pass:
    """A page that is being recovered, and what all passes have settled since it began.

    A scan, a probe and an expiry event may come upon the same entry, and act on it in any order.
    One of them requeues it; that the others are too late is no failure.
    """

    __slots__ = ("settled",)

    def __init__(self) -> None:
        self.settled: set[bytes] = set()
        """Ids of entries that were requeued, or recorded as requeued by somebody else."""


class Steps:
    """Looks at pending entries, and requeues those of dead owners, or routes them to the DLQ."""

    def __init__(
        self,
        topology: Topology,
        link: KeyConnection,
        names: Names,
        *,
        requeuer: Requeuer,
        vanished: Vanished,
        grace_periods: GracePeriods | None,
        term: Term,
        clock: ServerClock,
        recovery: RecoveryConfig,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._link = link
        self._names = names
        self._requeuer = requeuer
        self._vanished = vanished
        self._grace_periods = grace_periods
        self._term = term
        self._clock = clock
        self._recovery = recovery
        self._recorder = recorder
        self._logger = logger
        self._entries = Entries(link, names)
        self._pages = asyncio.Semaphore(PAGES)
        self._passes: set[_Pass] = set()
        # Entries that passes are requeuing at this moment, and how many of them.
        self._trying: dict[bytes, int] = {}
        self.complained: set[str] = set()
        """What was said to keep entries pending, and has not worked since."""
        self._routing: set[bytes] = set()  # entries on their way to the dead-letter stream
        self._no_mget = Denied(link)
        self.holding: dict[bytes, float] = {}
        """Consumers that held a sampled lock lately, and when that was (loop time)."""

    async def claim(self, lbs_info: LBSInfo) -> None:
        """Puts one entry back whose lock has expired. See `StreamClient.claim`."""
        check_name("lbs_info.data_stream_name", lbs_info.data_stream_name)
        entry_id = entry_id_of("lbs_info.id_in_lbs", lbs_info.id_in_lbs)
        lock = lock_key(lbs_info.data_stream_name, entry_id.decode())
        tally = await self.recover_page(
            EntryIds([entry_id]), locks={lock}, claimed=True, fenced=False
        )
        if tally.refusals:
            raise tally.refusals[0]
        if not tally.requeued and not tally.dead_letters:
            why = "another was first, or it is finished"
            if tally.alive:
                why = "its lock is held, or the entry announces another stream"
            raise AlreadyClaimed(f"{lbs_info.data_stream_name!r} ({lbs_info.id_in_lbs}): {why}")

    async def recover(self, ids: list[bytes]) -> None:
        """Takes the steps of recovery for these entries of our own, however long they were idle."""
        await self.recover_page(EntryIds(sorted(ids, key=id_order)), fenced=False)

    async def recover_page(
        self,
        ids: EntryIds,
        page_size: int | None = None,
        locks: Container[bytes] | None = None,
        *,
        claimed: bool = False,
        fenced: bool = True,
    ) -> ScanResult:
        """The steps for these; `fenced`: only as long as this consumer leads."""
        tally = ScanResult()
        if not len(ids):  # nor is it to wait for others' pages
            return tally
        async with self._pages:
            under_way = _Pass()
            self._passes.add(under_way)
            try:
                async for part, batches in self._entries.read(ids, page_size):
                    tally += await self._recover(
                        part, batches, locks, claimed=claimed, fenced=fenced, under_way=under_way
                    )
            finally:
                self._passes.discard(under_way)
        if tally.alive and self._recorder is not None:
            self._recorder.alive_skip(count=tally.alive)
        return tally

    async def recover_ids(
        self, ids: list[bytes], locks: Container[bytes] | None = None
    ) -> ScanResult:
        """Looks at these entries, in the order of ids, however long they were idle.

        With `locks` only at those that have one of them.
        """
        return await self.recover_page(EntryIds(ids), locks=locks)

    async def holders(self, mget: bytes, keys: Callable[[], list[bytes]]) -> list[bytes | None]:
        """Who holds these locks: asked by one MGET, packed, or by one GET for each key."""
        if self._topology.together and not self._no_mget:
            (values,) = await self._link.pipeline(mget, 1)
            await self._term.check_connection()
            if not isinstance(values, ReplyError):
                return cast("list[bytes | None]", values)
            if not refused(values):
                raise values
            if not values.about_keys:
                self._no_mget.remember()
        locks = keys()
        replies = await holders(self._topology, locks)
        if self._grace_periods is None:
            await self._term.check_connection()
            raise_if_all(replies)
        # Something that can't be read holds the lock: leave it alone, and go on with the others.
        values = [str(r).encode() if isinstance(r, ReplyError) else r for r in replies]
        if self._grace_periods is not None:
            failed = zip(locks, replies, strict=True)
            self._grace_periods.unreachable(
                [key for key, r in failed if isinstance(r, ReplyError) and r.code == "MASTERDOWN"]
            )
            free = [key for key, value in zip(locks, values, strict=True) if value is None]
            if free:
                await self._grace_periods.look_again(free)
            unverifiable = self._grace_periods.unverifiable(locks)
            for place in (i for i, key in enumerate(locks) if key in unverifiable):
                values[place] = values[place] or b"its master was silent"
        return values

    async def _recover(
        self,
        ids: EntryIds,
        batches: list[Batch],
        locks: Container[bytes] | None,
        *,
        claimed: bool,
        fenced: bool,
        under_way: _Pass,
    ) -> ScanResult:
        """The steps of recovery, for these entries; `claimed`: of which the application wants it.

        It has heard of an expired lock, and is told where one can't be read.
        """
        tally = ScanResult()
        # Whoever judges has to lead before, and until its judgement is carried out.
        leading = fenced and self._term.leading
        fence = self._term.leadership.fence if leading else None
        plan = plan_for(ids, batches)
        if plan.gone:
            self._term.check_leadership(leading)
            tally.vanished = await self._vanished.acknowledge(
                plan.gone, own=not fenced and not claimed, holding=self.holding
            )
        await self._route_to_dlq(
            await self._unreadable(plan, tally), REASON_UNPARSEABLE, tally, fence
        )
        if not len(plan):
            return tally
        if claimed:
            values = cast(
                "list[bytes | None]", raise_first(await holders(self._topology, plan.lock_keys()))
            )
        else:
            values = await self.holders(plan.mget(), plan.lock_keys)
        if locks is not None:
            values = [
                value if value is not None or lock in locks else b"not asked for"
                for lock, value in zip(plan.lock_keys(), values, strict=True)
            ]
        window, since = self._recovery.retry_window, 0
        if window is not None:
            since = max(self._clock.now_ms() - round(window * 1000), 0)
        alive, letters = plan.judge(values, self._recovery.max_retries, since)
        tally.alive += alive
        self._term.check_leadership(leading)
        with self._attempt(plan.ids() if self._recorder is not None else []):
            outcomes, refusal = await self._requeuer.requeue_planned(
                plan, counting=True, looked=True, fence=fence
            )
        if refusal is not None:
            tally.refusals.append(refusal)
            self.complain(len(plan), "put back", refusal)
        tally.requeued = outcomes.count(REQUEUED)
        if tally.requeued:
            self.complained.discard("put back")
        tally.alive += outcomes.count(ALIVE)
        if self._recorder is not None:
            told = list(zip(plan.ids(), plan.names(), outcomes, strict=True))
            self._record(self._recorder, told, under_way)
        detail = f"its owners died, or lost it, more than {self._recovery.max_retries} times"
        await self._route_to_dlq(
            [
                (name, (entry_id, with_detail(pairs, detail), lock))
                for name, (entry_id, pairs, lock) in letters
            ],
            REASON_MAX_RETRIES,
            tally,
            fence,
        )
        return tally

    async def _unreadable(self, plan: Plan, tally: ScanResult) -> list[DeadLetterEntry]:
        """Entries that can't be read, but for those that a consumer of the reference works on."""
        bad = [
            (entry_id, with_detail(pairs, why), name_for_go(pairs))
            for entry_id, pairs, why in plan.unparseable
        ]
        locks = [lock_key(name, entry_id.decode()) for entry_id, _, name in bad if name]
        if not locks:
            return [(None, (entry_id, pairs, None)) for entry_id, pairs, _ in bad]
        values = await self.holders(pack(b"MGET", *locks), lambda: locks)
        held = {lock for lock, value in zip(locks, values, strict=True) if value is not None}
        letters: list[DeadLetterEntry] = []
        for entry_id, pairs, name in bad:
            lock = lock_key(name, entry_id.decode()) if name else None
            if lock in held:
                tally.alive += 1
            else:
                letters.append((None, (entry_id, pairs, lock)))
        return letters

    @contextlib.contextmanager
    def _attempt(self, ids: list[bytes]) -> Iterator[None]:
        """Others that come upon these entries meanwhile may see them acknowledged by us."""
        trying = self._trying
        for entry_id in ids:
            trying[entry_id] = trying.get(entry_id, 0) + 1
        try:
            yield
        finally:
            for entry_id in ids:
                others = trying.pop(entry_id) - 1
                if others:
                    trying[entry_id] = others

    def _record(
        self, recorder: SafeRecorder, told: list[tuple[bytes, str, int]], under_way: _Pass
    ) -> None:
        """Tells the recorder what became of these entries: ids, names, outcomes."""
        requeued = [(entry_id, name) for entry_id, name, how in told if how == REQUEUED]
        # Where another pass of ours still tries, it is the one that may have been first.
        lost = [
            (entry_id, name)
            for entry_id, name, how in told
            if how == LOST and entry_id not in under_way.settled and entry_id not in self._trying
        ]
        for streams, success in ((requeued, True), (lost, False)):
            if streams:
                recorder.requeue(streams=[name for _, name in streams], success=success)
                for other in self._passes:
                    other.settled.update(entry_id for entry_id, _ in streams)

    def complain(self, count: int, what: str, error: ReplyError) -> None:
        """Says, once until it works again, what keeps entries pending."""
        if what not in self.complained:
            self.complained.add(what)
            self._logger.error(
                "some of %d entries stay pending, as they can't be %s: %s", count, what, error
            )

    async def _route_to_dlq(
        self,
        letters: Sequence[DeadLetterEntry],
        reason: bytes,
        tally: ScanResult,
        fence: Fence | None,
    ) -> None:
        # A scan and a look come upon the same ones: each would leave a copy if this ended now.
        letters = [each for each in letters if each[1][0] not in self._routing]
        if not letters:
            return
        where = f"moved to the dead-letter stream {self._names.dlq.decode()}"
        ids = {entry_id for _, (entry_id, _, _) in letters}
        self._routing |= ids
        try:
            outcomes = await self._requeuer.route_to_dlq(
                [letter for _, letter in letters],
                self._recovery.dlq_max_len,
                reason,
                fence=fence,
            )
        except ReplyError as error:
            if error.code == "FENCED":
                raise
            tally.refusals.append(error)
            self.complain(len(letters), where, error)
            return
        finally:
            self._routing -= ids
        self.complained.discard(where)
        tally.alive += outcomes.count(ALIVE)
        routed = [
            stream for (stream, _), how in zip(letters, outcomes, strict=True) if how == REQUEUED
        ]
        if not routed:
            return
        tally.dead_letters += len(routed)
        self._logger.warning("%d entries became dead letters: %s", len(routed), reason.decode())
        if self._recorder is not None:
            self._recorder.dlq_routing(streams=routed, reason=reason.decode())
