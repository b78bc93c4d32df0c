"""Recovery: entries whose owners died are put back, or become dead letters.

Of all consumers of a service one leads, and works for all: it scans the whole pending entries list
now and then, looks several times a second whether each consumer is alive, and takes up what expiry
events tell. Every entry goes through the same steps, `Recoverer._recover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from relstream._core import PENDING, Batch, EntryIds, PendingPage, Plan, jittered, pack, parse_id
from relstream.backoff import Backoff
from relstream.config import check_name
from relstream.errors import (
    AlreadyClaimed,
    ConnectionLost,
    DeadlineExceeded,
    RelstreamError,
    ReplyError,
    is_retriable,
)
from relstream.lbs.consumers import Group
from relstream.lbs.delayed import DelayedEntries
from relstream.lbs.entries import ALIVE, LOST, REFUSED, REQUEUED
from relstream.lbs.failures import with_detail
from relstream.lbs.go_json import name_for_go
from relstream.lbs.locks import holders, raise_if_all
from relstream.lbs.names import (
    REASON_MAX_RETRIES,
    REASON_UNPARSEABLE,
    Names,
    entry_id_of,
    lock_key,
    start_after,
)
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.requeue import Requeuer
from relstream.lbs.stream import Entries, plan_for
from relstream.net.cluster.router import ClusterTopology
from relstream.net.identity import Server
from relstream.net.replies import raise_first
from relstream.notifications import LBSInfo
from relstream.recovery.election import Leadership
from relstream.recovery.grace import GracePeriods
from relstream.recovery.lasting import LastingLocks
from relstream.recovery.vanished import Vanished
from relstream.repeats import Repeats
from relstream.tasks import cancel_and_wait, run_until_first_exit

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig
    from relstream.lbs.entries import Fence, Returning
    from relstream.lbs.server_clock import ServerClock
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

    # A stream's name, if one can be read, and its entry.
    DeadLetterEntry = tuple[str | None, Returning]

# Pages that are recovered while the next one is read.
PAGES_AHEAD = 4
# Pages of all walks together that are recovered at the same time.
PAGES = 2 * PAGES_AHEAD
# Seconds between two looks of the leader.
PROBE_EVERY = 0.2
# Seconds before a consumer is looked at again whose entries could not be recovered, and before a
# scan that broke off is repeated; longer each time.
LOOK_AGAIN = 0.5
SCAN_AGAIN = 1.0
# Locks that are looked at of each consumer: a dead one loses all of them together.
SAMPLE = 3
# Seconds for which a consumer counts as living that held a sampled lock.
HELD = 3.0
# Expired locks that may wait to be looked at; what comes beyond is found by looking anyway.
MAX_EXPIRED = 100_000


class ScanResult:
    """What became of the entries that were looked at."""

    __slots__ = ("alive", "dead_letters", "refusals", "requeued", "vanished")

    def __init__(self) -> None:
        self.requeued = self.alive = self.dead_letters = self.vanished = 0
        self.refusals: list[ReplyError] = []
        """Why entries stay pending whose turn it was, one a batch."""

    def __iadd__(self, other: ScanResult) -> ScanResult:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class _Pass:
    """A page that is being recovered, and what all passes have settled since it began.

    A scan, a probe and an expiry event may come upon the same entry, and act on it in any order.
    One of them requeues it; that the others are too late is no failure.
    """

    __slots__ = ("settled",)

    def __init__(self) -> None:
        self.settled: set[bytes] = set()
        """Ids of entries that were requeued, or recorded as requeued by somebody else."""


class Recoverer:
    """Recovers for all consumers of the service while it leads, and waits while another does."""

    def __init__(
        self,
        topology: Topology,
        names: Names,
        consumer: str,
        *,
        leading: Topology,
        clock: ServerClock,
        heartbeat: float,
        recovery: RecoveryConfig,
        auto_claim: bool,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._link = topology.link(names.lbs)
        # A cluster's masters are looked after by `GracePeriods`.
        self._server = Server(topology.to(self._link.endpoint)) if topology.single else None
        # It is not kept waiting by what is being recovered.
        self._leadership = Leadership(
            leading,
            names,
            consumer.encode(),
            heartbeat,
            scans_only=not auto_claim,
            logger=logger,
        )
        self._leading_server = Server(leading.to(self._link.endpoint)) if leading.single else None
        # Seconds without an answer in which no lock is lost: it is renewed every half heartbeat.
        self._bearable = min(self._leadership.lasts, heartbeat / 2)
        self.resign = self._leadership.resign
        self._clock = clock
        self._names = names
        self._ttl_ms = round(heartbeat * 1000)
        self._recovery = recovery
        self._auto_claim = auto_claim
        self._recorder = recorder
        self._logger = logger
        self._requeuer = Requeuer(topology, names, recorder, logger)
        self._entries = Entries(self._link, names)
        self._group = Group(topology, names, consumer, logger)
        self._vanished = Vanished(self._link, names, self._group, recorder, logger)
        self._delayed = DelayedEntries(self._link, names, logger)
        self._grace_periods: GracePeriods | None = None
        if isinstance(topology, ClusterTopology):
            self._grace_periods = GracePeriods(topology, names.lbs, heartbeat)
        self.wait_until_idle = self._requeuer.wait_until_idle
        self.close = self._requeuer.close
        self._expired: dict[bytes, bytes] = {}  # locks, and the ids of their entries
        self._pages = asyncio.Semaphore(PAGES)
        self._passes: set[_Pass] = set()
        # Entries that passes are requeuing at this moment, and how many of them.
        self._trying: dict[bytes, int] = {}
        self._leading = False
        self._succeeding = True  # another led just before, or may have
        self._lasting = LastingLocks(topology, self._link, heartbeat, logger)
        self._known: dict[bytes, bytes] = {}  # sampled entries: id, lock
        # Consumers whose entries are being looked at.
        self._walks: dict[bytes, asyncio.Task[None]] = {}
        # Consumers looked at in vain: when they are looked at again, and the pause after that.
        self._fruitless: dict[bytes, tuple[float, float]] = {}
        # Where sampling of each begins: about what is before that nothing can be done.
        self._passed: dict[bytes, bytes] = {}
        # Of each consumer sampled entries whose locks were held, when some were last; and of whom
        # some were in the last few looks, by when that was (loop time).
        self._held: dict[bytes, set[bytes]] = {}
        self._holding: dict[bytes, float] = {}
        self._patient_until = 0.0
        # Of an outage, since recovery was done last; none where locks are known to be lost, as then
        # their owners have the whole time anew.
        self._first_sign = math.inf
        # The locks of the living may be gone: there was an outage, and it is not over for long.
        self._outage = False
        self._next_scan = 0.0
        self._scanned = False
        self._scans_failed = Backoff(SCAN_AGAIN, recovery.reconciliation_interval)
        # Of these the first repeats while others lead in turn, who fail as well.
        self._leading_fails = Repeats("recovery", logger)
        self._choosing_fails = Repeats("choosing a leader", logger)
        self._scanning_fails = Repeats("scanning", logger)
        self._complained: set[str] = set()
        self._routing: set[bytes] = set()  # entries on their way to the dead-letter stream
        self._no_mget = Denied(self._link)

    # --- from outside -------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this consumer recovers for all at the moment."""
        return self._leading

    @property
    def lasting(self) -> str | None:
        """A lock that keeps a dead owner's stream for too long, if this consumer leads."""
        return self._lasting.found if self._leading else None

    def expired(self, payload: LBSInfo) -> None:
        """A lock expired: if it is ours to do so, its entry will be looked at."""
        if self._leading and self._auto_claim and len(self._expired) < MAX_EXPIRED:
            self._expired[lock_key(*payload)] = payload.id_in_lbs.encode()

    async def claim(self, lbs_info: LBSInfo) -> None:
        """Puts one entry back whose lock has expired. See `StreamClient.claim`."""
        check_name("lbs_info.data_stream_name", lbs_info.data_stream_name)
        entry_id = entry_id_of("lbs_info.id_in_lbs", lbs_info.id_in_lbs)
        lock = lock_key(lbs_info.data_stream_name, entry_id.decode())
        tally = await self._recover_page(
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
        await self._recover_page(EntryIds(sorted(ids, key=_id_order)), fenced=False)

    async def hand_back(
        self, ids: list[bytes], *, never_owned: Mapping[bytes, list[bytes]] | None = None
    ) -> list[bytes]:
        """Puts entries back that nobody has locked, without counting a retry.

        Returns what stays pending, as its lock is held, or can't be looked at, or for a refusal.
        `never_owned`: they were read by us, and consist of these fields, should they be trimmed.
        Nobody can have locked them, and no lock has to be looked at that may be on a server which
        can't be asked.
        """
        stay: list[bytes] = []
        ids = sorted(ids, key=_id_order)
        async for part, batches in self._entries.read(EntryIds(ids)):
            plan = plan_for(part, batches)
            try:
                if never_owned is None:
                    await self._vanished.acknowledge(plan.gone, own=True)
                else:
                    await self._requeuer.requeue([(i, never_owned[i], None) for i in plan.gone])
                outcomes, _ = await self._requeuer.requeue_planned(
                    plan,
                    counting=False,
                    looked=never_owned is not None,
                    locked=never_owned is None,
                )
            except ReplyError as error:  # about all of this part
                if not is_retriable(error):
                    raise
                stay += part
                continue
            returned = zip(plan.ids(), outcomes, strict=True)
            stay += [entry_id for entry_id, outcome in returned if outcome in (ALIVE, REFUSED)]
        return stay

    # --- leading ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tries to lead, and recovers while it does, until cancelled."""
        loop = asyncio.get_running_loop()
        lasts = self._leadership.lasts
        backoff = Backoff(lasts / 16, lasts)
        failing_since = math.inf
        if self._grace_periods is None:
            # There may have been one just before we came. Who lives renews within half a lease.
            self._be_patient(0.5)
        while True:
            try:
                failing_since = min(failing_since, loop.time())
                before = self._leadership.fence
                leads = await self._leadership.acquire()
                continued = leads and before == self._leadership.fence
                self._succeeding = not continued
                away = loop.time() - failing_since
                failing_since = math.inf
                same = await self._leads_where_it_did(continued)
                if self._leadership.vanished or not same or away > self._ttl_ms / 1000:
                    self._first_sign = math.inf
                    self._outage = True
                if self._outage or away > self._bearable:
                    self._outage = True
                    await self._look_whether_it_is_back()
                    self._be_patient()
                    self._outage = False
                    if leads:  # what was judged before that is void
                        leads = await self._leadership.reacquire()
                self._choosing_fails.worked()
                if leads:
                    await self._lead()
                else:
                    self._first_sign = math.inf
                    await self._leadership.check()
                backoff.reset()
                await asyncio.sleep(jittered(lasts / 4, 0.5, random.random()))
            except RelstreamError as error:
                # A connection that was closed and could be opened again at once is no outage.
                failing_since = min(failing_since, loop.time())
                if self._leading:
                    failing_since = min(failing_since, self._leadership.confirmed_at)
                    if self._leadership.renewed:
                        backoff.reset()
                if _tells_of_an_outage(error):
                    self._outage = True
                    if isinstance(error, ReplyError):
                        self._first_sign = math.inf
                fails = self._leading_fails if self._leading else self._choosing_fails
                fails.failed("recovery failed, trying again: %s", error)
                await asyncio.sleep(backoff.failed())
            finally:
                self._leading = False
                self._expired.clear()

    async def _leads_where_it_did(self, continued: bool) -> bool:
        """Whether the server is the one it was, though a connection to it was opened anew.

        Where it does not tell, that our leadership has `continued` proves it.
        """
        same = None if self._leading_server is None else await self._leading_server.same()
        return self._leading_server is None or (continued if same is None else same)

    async def _look_whether_it_is_back(self) -> None:
        """Raises unless the load balancer stream can be read; the leader key may be elsewhere."""
        await self._link.execute(b"XPENDING", self._names.lbs, self._names.group, b"0-0", b"0-0", 1)

    def _be_patient(self, leases: float = 1.0) -> None:
        """The server is back: the locks of the living are gone, too, until they renew them.

        Not for longer from the first sign on, or one that stands still now and then would let
        nobody be recovered.
        """
        self._first_sign = min(self._first_sign, asyncio.get_running_loop().time())
        until = self._first_sign + leases * self._ttl_ms / 1000
        self._patient_until = max(self._patient_until, until)

    async def _lead(self) -> None:
        """Recovers until leadership is lost; what fails in one part ends it, too."""
        self._logger.info("this consumer recovers for the service now")
        self._leading = True
        parts = [
            self._keep_leading(),
            self._recover_for_ever(),
            self._group.tidy_for_ever(),
            self._delayed.run(self._clock),
        ]
        if self._grace_periods is not None:
            # Started first, so that locks on masters it has not verified yet are not judged.
            parts.insert(0, self._grace_periods.watch(succeeding=self._succeeding))
        await run_until_first_exit(*parts)

    async def _keep_leading(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            asked_at = loop.time()
            if not await self._leadership.renew():
                return
            # The server, or this process, stood still, or it may be another server, or have lost
            # keys, by a clock that was set forward, say, and so the locks of the living.
            stood_still = loop.time() - asked_at > self._bearable
            lost = self._leadership.vanished or not await self._leads_where_it_did(True)
            if lost:
                self._first_sign = math.inf
            if lost or stood_still:
                self._be_patient()
                await self._leadership.reacquire()
                return
            await asyncio.sleep(self._leadership.lasts / 4)

    async def _recover_for_ever(self) -> None:
        if self._grace_periods is not None and self._succeeding:
            self._be_patient(0.5)
        await asyncio.sleep(self._patient_until - asyncio.get_running_loop().time())
        parts = [self._scan_for_ever()]
        if self._auto_claim:
            parts += [self._heed_events_for_ever(), self._look_for_ever()]
        await run_until_first_exit(*parts)

    async def _heed_events_for_ever(self) -> None:
        size = self._recovery.batch_size
        while True:
            expired, self._expired = self._expired, {}
            # Two locks may name one entry: another service's stream may have one of the same id.
            ids = sorted(set(expired.values()), key=_id_order)
            for start in range(0, len(ids), size):
                try:
                    await self._recover_ids(ids[start : start + size], expired)
                    self._complained.discard("recovered")
                except ReplyError as error:  # looks and scans find them
                    if is_retriable(error):
                        raise
                    self._complain(len(ids), "recovered", error)
            await asyncio.sleep(PROBE_EVERY)

    async def _look_for_ever(self) -> None:
        try:
            while True:
                await self._look()
                self._first_sign = math.inf
                for name in [name for name, walk in self._walks.items() if walk.done()]:
                    self._walks.pop(name).result()
                if not self._walks:
                    self._leading_fails.worked()
                await asyncio.sleep(PROBE_EVERY)
        finally:
            walks, self._walks = self._walks, {}
            await cancel_and_wait(walks.values())

    async def _scan_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Leadership may have been lost in between, and won again.
            await asyncio.sleep(self._next_scan - loop.time())
            pause = jittered(self._recovery.reconciliation_interval, 0.1, random.random())
            try:
                await self._scan()
                self._first_sign = math.inf
                self._scans_failed.reset()
                self._scanning_fails.worked()
                self._leading_fails.worked()
            except ReplyError as error:
                pause = min(pause, self._scans_failed.failed())
                self._scanning_fails.failed(
                    "a scan broke off, the next one is in %.1f s: %s", pause, error
                )
            self._next_scan = loop.time() + pause

    async def _scan(self) -> None:
        start = time.perf_counter()
        success = False
        tally = ScanResult()
        try:
            await self._walk(round(self._recovery.min_idle_time * 1000), tally)
            success = True
        finally:
            if self._recorder is not None:
                took = time.perf_counter() - start
                if not self._scanned:
                    self._recorder.startup_recovery(
                        success=success, count=tally.requeued, duration=took
                    )
                self._recorder.reconciliation_scan(
                    requeued=tally.requeued,
                    alive=tally.alive,
                    dead_letters=tally.dead_letters,
                    vanished=tally.vanished,
                    duration=took,
                )
            self._scanned = self._scanned or success

    async def _walk(
        self, min_idle_ms: int, tally: ScanResult, consumer: bytes | None = None
    ) -> None:
        """Looks at all pending entries, or those of one consumer, page by page.

        Several pages are under way at a time, so that the server has always something to do. What
        the server refuses in one page is raised when all others have been looked at.
        """
        refusal: ReplyError | None = None
        size = self._recovery.batch_size
        pages: deque[asyncio.Task[ScanResult]] = deque()
        start: bytes | None = b"-"
        try:
            while start is not None:
                page: PendingPage = await self._link.execute(
                    b"XPENDING", self._names.lbs, self._names.group, start, b"+", size,
                    *(() if consumer is None else (consumer,)), decode=PENDING,
                )  # fmt: skip
                start = start_after(page[-1][0]) if len(page) == size else None
                if len(ids := page.idle(min_idle_ms)):
                    pages.append(asyncio.ensure_future(self._recover_page(ids, len(page))))
                while len(pages) > (PAGES_AHEAD if start is not None else 0):
                    try:
                        tally += await pages[0]
                    except ReplyError as error:
                        if error.code == "NOGROUP" or is_retriable(error):
                            raise
                        refusal = error
                    pages.popleft()
        finally:
            await cancel_and_wait(pages)
        if refusal is not None:
            raise refusal

    async def _recover_page(
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

    # --- deaths are looked for ----------------------------------------------------------------

    async def _look(self) -> None:
        """Looks at a few locks of every consumer; where one is free, at all that is pending for it.

        Costs the server some us a consumer, however many streams it owns.
        """
        # Where these must not be asked for, events and scans have to do.
        owners = {row[b"name"] for row in await self._group.rows() if row[b"pending"]}
        now = asyncio.get_running_loop().time()
        remembered: tuple[dict[bytes, Any], ...] = (self._passed, self._fruitless, self._held)
        for each in remembered:
            for name in each.keys() - owners:
                del each[name]
        consumers = sorted(owners - self._walks.keys())
        asking = [
            pack(
                b"XPENDING", self._names.lbs, self._names.group,
                self._passed.get(name, b"-"), b"+", SAMPLE, name,
            )
            for name in consumers
        ]  # fmt: skip
        pages: list[PendingPage] = raise_first(
            await self._link.pipeline(b"".join(asking), len(asking), decode=PENDING)
        )
        samples = {
            # Younger ones may be about to be locked.
            name: list(page.idle(self._ttl_ms))
            for name, page in zip(consumers, pages, strict=True)
        }
        for name, page in zip(consumers, pages, strict=True):
            if not len(page):  # all was passed: it begins anew
                self._passed.pop(name, None)
        known = self._known
        sampled = [entry_id for ids in samples.values() for entry_id in ids]
        unknown = sorted((i for i in sampled if i not in known), key=_id_order)
        async for part, batches in self._entries.read(EntryIds(unknown)):
            plan = plan_for(part, batches)
            known.update(zip(plan.ids(), plan.lock_keys(), strict=True))
        known = self._known = {i: known[i] for i in sampled if i in known}
        keys = list(known.values())
        values = await self._values(pack(b"MGET", *keys), lambda: keys) if keys else []
        locks = dict(zip(known, values, strict=True))
        await self._lasting.look([known[i] for i, value in locks.items() if value is not None])
        # One without a known lock can't be read, or is gone.
        free = {n: [i for i in ids if locks.get(i) is None] for n, ids in samples.items()}
        self._holding = {n: at for n, at in self._holding.items() if now - at < HELD}
        for name, ids in free.items():
            held = set(samples[name]).difference(ids)
            died = not self._held.get(name, held).isdisjoint(ids)
            if held or died:
                self._held[name] = held
            if held:
                self._holding[name] = now
            if not ids:
                if samples[name]:  # it is well
                    self._fruitless.pop(name, None)
                continue
            # Not again and again while nothing can be done about it, as when the dead-letter stream
            # can't be written; but at once when one was held before, and its owner died.
            again_at, _ = self._fruitless.get(name, (now, 0.0))
            if now >= again_at or died:
                # Meanwhile others are looked at: this may take long.
                self._walks[name] = asyncio.ensure_future(self._walk_through(name, len(ids)))
            elif (behind := start_after(ids[-1])) is not None:
                # What is behind them is sampled next: it may be alive, and die.
                self._passed[name] = behind
            else:
                self._passed.pop(name, None)

    async def _walk_through(self, name: bytes, free: int) -> None:
        """Recovers what is pending for a consumer of which so many locks were seen to be free."""
        tally = ScanResult()
        try:
            await self._walk(self._ttl_ms, tally, name)
            self._complained.discard("recovered")
        except ReplyError as error:
            if error.code == "NOGROUP" or is_retriable(error):
                raise
            self._complain(free, "recovered", error)
        if tally.requeued + tally.dead_letters + tally.vanished:
            self._fruitless.pop(name, None)
            return
        _, pause = self._fruitless.get(name, (0.0, LOOK_AGAIN))
        pause = min(pause, self._recovery.reconciliation_interval)
        self._fruitless[name] = (asyncio.get_running_loop().time() + pause, 2 * pause)

    # --- the steps ----------------------------------------------------------------------------

    async def _recover_ids(
        self, ids: list[bytes], locks: Container[bytes] | None = None
    ) -> ScanResult:
        """Looks at these entries, in the order of ids, however long they were idle.

        With `locks` only at those that have one of them.
        """
        return await self._recover_page(EntryIds(ids), locks=locks)

    async def _values(self, mget: bytes, keys: Callable[[], list[bytes]]) -> list[bytes | None]:
        """Who holds these locks: asked by one MGET, packed, or by one GET for each key."""
        if self._topology.together and not self._no_mget:
            (values,) = await self._link.pipeline(mget, 1)
            await self._check_connection()
            if not isinstance(values, ReplyError):
                return cast("list[bytes | None]", values)
            if not refused(values):
                raise values
            if not values.about_keys:
                self._no_mget.remember()
        locks = keys()
        replies = await holders(self._topology, locks)
        if self._grace_periods is None:
            await self._check_connection()
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

    async def _check_connection(self) -> None:
        """Raises if what leads has another server than when it began.

        Locks there are not those that were renewed, until their owners have noticed, too.
        """
        if not self._leading or self._server is None:
            return
        same = await self._server.same()
        fence = self._leadership.fence
        if same is None and fence is not None:  # where we still lead it has been all the time
            same = await self._link.execute(b"GET", fence.key) == fence.value
        if self._outage or not same:
            self._outage = True
            self._first_sign = math.inf
            raise ConnectionLost("the connection leads to another server, or it was restarted")

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
        leading = fenced and self._leading
        fence = self._leadership.fence if leading else None
        plan = plan_for(ids, batches)
        if plan.gone:
            self._check_leadership(leading)
            tally.vanished = await self._vanished.acknowledge(
                plan.gone, own=not fenced and not claimed, holding=self._holding
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
            values = await self._values(plan.mget(), plan.lock_keys)
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
        self._check_leadership(leading)
        with self._attempt(plan.ids() if self._recorder is not None else []):
            outcomes, refusal = await self._requeuer.requeue_planned(
                plan, counting=True, looked=True, fence=fence
            )
        if refusal is not None:
            tally.refusals.append(refusal)
            self._complain(len(plan), "put back", refusal)
        tally.requeued = outcomes.count(REQUEUED)
        if tally.requeued:
            self._complained.discard("put back")
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

    def _check_leadership(self, leading: bool) -> None:
        """Raises where who is `leading` can't tell whether another does by now."""
        if leading and not self._leadership.confirmed:
            raise ReplyError("FENCED leadership was not confirmed in time")

    async def _unreadable(self, plan: Plan, tally: ScanResult) -> list[DeadLetterEntry]:
        """Entries that can't be read, but for those that a consumer of the reference works on."""
        bad = [
            (entry_id, with_detail(pairs, why), name_for_go(pairs))
            for entry_id, pairs, why in plan.unparseable
        ]
        locks = [lock_key(name, entry_id.decode()) for entry_id, _, name in bad if name]
        if not locks:
            return [(None, (entry_id, pairs, None)) for entry_id, pairs, _ in bad]
        values = await self._values(pack(b"MGET", *locks), lambda: locks)
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

    def _complain(self, count: int, what: str, error: ReplyError) -> None:
        """Says, once until it works again, what keeps entries pending."""
        if what not in self._complained:
            self._complained.add(what)
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
            self._complain(len(letters), where, error)
            return
        finally:
            self._routing -= ids
        self._complained.discard(where)
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


def _tells_of_an_outage(error: RelstreamError) -> bool:
    """Whether locks of the living may be gone, or about to: a write was refused, or stood still."""
    if isinstance(error, ReplyError):
        # Out of memory locks are renewed all the same.
        return is_retriable(error) and error.code not in ("OOM", "FENCED", "NOSCRIPT")
    return isinstance(error, DeadlineExceeded)


def _id_order(entry_id: bytes) -> tuple[int, int]:
    return parse_id(entry_id) or (0, 0)
