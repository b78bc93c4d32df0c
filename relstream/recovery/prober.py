"""Probes a few locks of every consumer, several times a second: a dead one loses all together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from relstream._core import PENDING, EntryIds, PendingPage, pack
from relstream.errors import ReplyError, is_retriable
from relstream.lbs.consumers import Group
from relstream.lbs.names import Names, start_after
from relstream.lbs.stream import Entries, id_order, plan_for
from relstream.net.replies import raise_first
from relstream.recovery.lasting import LastingLocks
from relstream.recovery.result import ScanResult
from relstream.repeats import Repeats
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig
    from relstream.net.topology import KeyConnection
    from relstream.recovery.scanner import Scanner
    from relstream.recovery.steps import Steps
    from relstream.recovery.term import Term

# Seconds between two probes of all consumers.
PROBE_EVERY = 0.2
# Seconds before a consumer is probed again whose entries could not be recovered; longer each time.
PROBE_AGAIN = 0.5
# Locks that are probed of each consumer.
SAMPLE = 3
# Seconds for which a consumer counts as living that held a sampled lock.
HELD = 3.0


class Prober:
    """Finds consumers that lost a lock, and has their pending entries recovered."""

    def __init__(
        self,
        link: KeyConnection,
        names: Names,
        *,
        group: Group,
        steps: Steps,
        scanner: Scanner,
        lasting: LastingLocks,
        term: Term,
        ttl_ms: int,
        recovery: RecoveryConfig,
        leading_fails: Repeats,
    ) -> None:
        self._link = link
        self._names = names
        self._group = group
        self._steps = steps
        self._scanner = scanner
        self._lasting = lasting
        self._term = term
        self._ttl_ms = ttl_ms
        self._recovery = recovery
        self._leading_fails = leading_fails
        self._entries = Entries(link, names)
        self._known: dict[bytes, bytes] = {}  # sampled entries: id, lock
        # Consumers whose entries are being recovered.
        self._walks: dict[bytes, asyncio.Task[None]] = {}
        # Consumers probed in vain: when they are probed again, and the pause after that.
        self._fruitless: dict[bytes, tuple[float, float]] = {}
        # Where sampling of each begins: entries before that can't be recovered at the moment.
        self._passed: dict[bytes, bytes] = {}
        # Of each consumer the sampled entries whose locks were held, when some were last.
        self._held: dict[bytes, set[bytes]] = {}

    async def run(self) -> None:
        """Probes until cancelled."""
        try:
            while True:
                await self._look()
                self._term.recovered()
                for name in [name for name, walk in self._walks.items() if walk.done()]:
                    self._walks.pop(name).result()
                if not self._walks:
                    self._leading_fails.worked()
                await asyncio.sleep(PROBE_EVERY)
        finally:
            walks, self._walks = self._walks, {}
            await cancel_and_wait(walks.values())

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
        unknown = sorted((i for i in sampled if i not in known), key=id_order)
        async for part, batches in self._entries.read(EntryIds(unknown)):
            plan = plan_for(part, batches)
            known.update(zip(plan.ids(), plan.lock_keys(), strict=True))
        known = self._known = {i: known[i] for i in sampled if i in known}
        keys = list(known.values())
        values = await self._steps.holders(pack(b"MGET", *keys), lambda: keys) if keys else []
        locks = dict(zip(known, values, strict=True))
        await self._lasting.look([known[i] for i, value in locks.items() if value is not None])
        # One without a known lock can't be read, or is gone.
        free = {n: [i for i in ids if locks.get(i) is None] for n, ids in samples.items()}
        self._steps.holding = {n: at for n, at in self._steps.holding.items() if now - at < HELD}
        for name, ids in free.items():
            held = set(samples[name]).difference(ids)
            died = not self._held.get(name, held).isdisjoint(ids)
            if held or died:
                self._held[name] = held
            if held:
                self._steps.holding[name] = now
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
            await self._scanner.walk(self._ttl_ms, tally, name)
            self._steps.complained.discard("recovered")
        except ReplyError as error:
            if error.code == "NOGROUP" or is_retriable(error):
                raise
            self._steps.complain(free, "recovered", error)
        if tally.requeued + tally.dead_letters + tally.vanished:
            self._fruitless.pop(name, None)
            return
        _, pause = self._fruitless.get(name, (0.0, PROBE_AGAIN))
        pause = min(pause, self._recovery.reconciliation_interval)
        self._fruitless[name] = (asyncio.get_running_loop().time() + pause, 2 * pause)
