"""Ownership: the table of owned streams, and their locks on the server.

A lease is the lock of one LBS entry, held by this consumer and renewed by its `Keeper`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from relstream._core import (
    ITEM,
    PENDING,
    Audit,
    Entry,
    Template,
    discard,
    enter,
    entry_ids,
    first_error,
    forget,
    grant,
    lock_keys,
    scatter,
)
from relstream.errors import RelstreamError, ReplyError
from relstream.lbs import SEPARATOR, Names, partition_of, split_lock_key
from relstream.net.connection import Backoff, raise_first
from relstream.net.topology import NamedMaster
from relstream.put_back import TOO_LATE
from relstream.scripts import (
    RELEASE,
    RELEASE_ONE,
    RENEW,
    RENEW_ONE,
    SCRIPT_KEYS,
    Script,
    run,
    run_each,
)

new_event_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop

if TYPE_CHECKING:
    from relstream.net.connection import Endpoint
    from relstream.net.deployment import Deployment
    from relstream.net.topology import Guide, KeyLink, Topology
    from relstream.recorder import SafeRecorder

# Locks renewed, and pending entries compared, between two looks at what else there is to do.
WINDOW = 1000
# Windows whose replies may be outstanding.
WINDOWS = 8
# The part of the time after which others recover an entry that was read and is not locked yet: from
# then on they may have.
DOUBTFUL_AFTER = 0.75
# Seconds within which an entry is always locked in time, on a cluster; else some settings would let
# nothing be owned at all.
SOONEST = 0.1
# The part of the renewal period over which its windows are spread, so that the server can serve
# others in between; the rest of the period is reserve.
SPREAD = 0.5


def chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """`items` in pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Locks:
    """Locks of one consumer: acquire, renew, release, in batches."""

    def __init__(
        self, topology: Topology, consumer: str, ttl_ms: int, logger: logging.Logger
    ) -> None:
        self._topology = topology
        self._value = consumer.encode()
        self._ttl_ms = ttl_ms
        self._logger = logger
        self._scripts_forbidden = False
        self._set = Template(b"SET", ITEM, self._value, b"NX", b"PX", ttl_ms)
        self._get = Template(b"GET", ITEM)
        self._extend = Template(b"PEXPIRE", ITEM, ttl_ms)
        self._delete = Template(b"DEL", ITEM)

    async def acquire(self, keys: list[bytes]) -> list[Any]:
        """For each lock b"OK", None (it is held) or a `ReplyError`."""
        return await self._topology.each(self._set.pack, keys)

    async def held(self, keys: list[bytes], *, known: bool = False) -> list[bool]:
        """Which of these locks are ours; `known`: and are on masters that can be asked."""
        values = await self._topology.each(self._get.pack, keys)
        if not known:
            raise_first(values)
        return [value == self._value for value in values]

    async def renew(self, keys: list[bytes]) -> tuple[list[bytes], list[bytes], ReplyError | None]:
        """Gives locks that are ours their full time again.

        Returns those gone, those taken, and an error if there was one about others of them.
        """
        outcomes = await self._run(RENEW, RENEW_ONE, self._extend, keys, self._value, self._ttl_ms)
        gone = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == 0]
        taken = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == -1]
        return gone, taken, first_error(outcomes)

    async def release(self, keys: list[bytes]) -> list[bytes]:
        """Deletes locks that are ours; returns those that were not.

        On a cluster those that could not be deleted are among them: they expire, and keep nothing
        from being finished or handed over.
        """
        try:
            outcomes = await self._run(RELEASE, RELEASE_ONE, self._delete, keys, self._value)
        except RelstreamError as error:
            if self._topology.single:
                raise
            outcomes = [error] * len(keys)
        failure = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
        if failure is not None:
            if self._topology.single:
                raise failure
            self._logger.debug("some locks could not be released, and expire: %s", failure)
        return [key for key, outcome in zip(keys, outcomes, strict=True) if outcome != 1]

    async def _run(
        self, many: Script, one: Script, step: Template, keys: list[bytes], *args: bytes | int
    ) -> list[Any]:
        """Runs a script on these locks; where it is forbidden GET and then `step` do.

        For each lock 1 (done), 0 (gone), -1 (another's) or a `ReplyError`.
        """
        if self._scripts_forbidden:
            return await self._in_steps(step, keys)
        if self._topology.single:
            outcomes = await self._run_on_many(many, keys, args)
        else:
            outcomes = await run_each(self._topology, one, keys, args)
        if first_error(outcomes) is None:
            return outcomes
        refused = [
            place
            for place, outcome in enumerate(outcomes)
            if isinstance(outcome, ReplyError) and outcome.code == "NOPERM"
        ]
        # About one of these locks: for once.
        refusal = next((outcomes[p] for p in refused if not outcomes[p].about_keys), None)
        if refusal is not None and not self._scripts_forbidden:
            self._scripts_forbidden = True
            self._logger.warning(
                "a script is forbidden (%s): locks are renewed and released by two commands each; "
                "grant +evalsha, +eval, +mget, +pexpire and +del to make that one atomic "
                "step",
                refusal,
            )
        if refused:
            steps = await self._in_steps(step, [keys[place] for place in refused])
            scatter(outcomes, refused, steps)
        return outcomes

    async def _run_on_many(
        self, script: Script, keys: list[bytes], args: Sequence[bytes | int]
    ) -> list[Any]:
        parts = list(chunks(keys, SCRIPT_KEYS))
        replies = await run(self._topology.link(b""), script, [(part, args) for part in parts])
        outcomes: list[Any] = []
        for part, places in zip(parts, replies, strict=True):
            if isinstance(places, ReplyError):
                outcomes += [places] * len(part)
                continue
            done = [1] * len(part)
            for place in places:
                done[abs(place) - 1] = 0 if place > 0 else -1
            outcomes += done
        return outcomes

    async def _in_steps(self, step: Template, keys: list[bytes]) -> list[Any]:
        """What a script does, by two commands a lock, not atomically."""
        values = await self._topology.each(self._get.pack, keys)
        ours = [key for key, value in zip(keys, values, strict=True) if value == self._value]
        done = iter(await self._topology.each(step.pack, ours))
        outcomes: list[Any] = []
        for value in values:
            if value == self._value:
                outcomes.append(next(done))
            elif isinstance(value, ReplyError) and value.transient:
                outcomes.append(value)
            else:  # one that we may not even read any more (ACL) can't be held either
                outcomes.append(0 if value is None else -1)
        return outcomes


class Keeper:
    """Renews leases every half TTL, over connections of its own.

    By default it runs in a thread with an event loop of its own, so that leases outlive an
    application that blocks its loop. `add` and `drop` are called on the application's loop, and so
    is `on_lost`, with locks that are gone.

    A lock that is gone is taken anew only if the entry is still pending for this very consumer,
    both before and after: it may have been put back under another id, and have another owner.
    """

    def __init__(
        self,
        deployment: Deployment,
        partitions: Sequence[Names],
        consumer: str,
        ttl: float,
        *,
        guide: Guide,
        on_lost: Callable[[list[bytes]], None],
        logger: logging.Logger,
        recorder: SafeRecorder | None,
        threaded: bool,
    ) -> None:
        # A server that keeps us waiting for longer than that has let the leases expire.
        self._deployment = deployment.patient(ttl)
        self._guide = guide
        self._partitions = partitions
        self._consumer = consumer
        self._ttl = ttl
        self._on_lost = on_lost
        self._logger = logger
        self._recorder = recorder
        self._threaded = threaded
        # Both threads change it: waking the other one for each batch would cost far more.
        self._kept: dict[Entry, None] = {}
        self._guard = threading.Lock()
        self._app_loop: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._rounds: dict[asyncio.Task[None], Endpoint | None] = {}

    # --- on the application's loop -------------------------------------------------------------

    def add(self, entries: list[Entry]) -> None:
        """Renews the locks of these, too."""
        with self._guard:
            enter(self._kept, entries)

    def drop(self, entries: list[Entry]) -> None:
        """Renews the locks of these no more."""
        with self._guard:
            discard(self._kept, entries)

    def stop(self) -> None:
        """Ends `run`, whatever it is doing."""
        if not self._threaded or self._loop is None:
            self._stopping.set()
            return
        with contextlib.suppress(RuntimeError):  # its loop is closed already
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def run(self) -> None:
        """Renews until `stop`; raises what ends it otherwise."""
        app_loop = self._app_loop = asyncio.get_running_loop()
        if not self._threaded:
            await self._main()
            return
        ended: asyncio.Future[BaseException | None] = app_loop.create_future()

        def body() -> None:
            outcome: BaseException | None = None
            try:
                self._loop = new_event_loop()
                with contextlib.closing(self._loop):
                    self._loop.run_until_complete(self._main())
            except BaseException as error:  # noqa: BLE001 - raised again on the application's loop
                outcome = error
            finally:
                with contextlib.suppress(RuntimeError):  # the application's loop is closed
                    app_loop.call_soon_threadsafe(ended.set_result, outcome)

        thread = threading.Thread(target=body, name=f"relstream-{self._consumer}", daemon=True)
        thread.start()
        cancelled: asyncio.CancelledError | None = None
        while not ended.done():
            try:
                await asyncio.wait({ended})
            except asyncio.CancelledError as error:  # however often: the thread ends first
                cancelled = error
                self.stop()
        thread.join()  # it has nothing left to do
        if cancelled is not None:
            raise cancelled
        outcome = ended.result()
        if outcome is not None:
            raise outcome

    # --- on its own loop -----------------------------------------------------------------------

    async def _main(self) -> None:
        guide = self._deployment.guide(self._guide)
        topology = self._deployment.open(f"{self._consumer}:renew", guide)
        replaced = guide.replaced if isinstance(guide, NamedMaster) else asyncio.Event()
        tasks = [
            asyncio.ensure_future(self._stopping.wait()),
            asyncio.ensure_future(self._renew_for_ever(topology, replaced)),
        ]
        if isinstance(guide, NamedMaster):  # a master that was replaced may go on for long
            tasks.append(asyncio.ensure_future(guide.run()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_rounds()
            await topology.close()

    async def _renew_for_ever(self, topology: Topology, replaced: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        locks = Locks(topology, self._consumer, round(self._ttl * 1000), self._logger)
        period = self._ttl / 2
        backoff = Backoff(period / 20, period / 2)
        due = loop.time()
        assert self._app_loop is not None
        connected = False
        while not self._app_loop.is_closed():  # else there is nobody left to own anything
            start = loop.time()
            replaced.clear()
            try:
                if not connected:
                    connected = True  # or tried, once
                    # Leases can't be told apart by servers that are not known yet.
                    await _within(period / 2, topology.link(self._partitions[0].lbs).get())
                await self._renew_all(topology, locks, period * SPREAD)
            except RelstreamError as error:
                if not backoff.failures:
                    self._logger.warning("leases can't be renewed, trying again: %s", error)
                await asyncio.sleep(backoff.failed())
                due = loop.time()
                continue
            if backoff.failures:
                self._logger.warning("leases are renewed again")
                backoff.reset()
            if loop.time() - start > period:
                self._logger.warning(
                    "renewing %d leases took %.2f s, and should take %.2f s at most",
                    len(self._kept), loop.time() - start, period,
                )  # fmt: skip
            due = max(due + period, loop.time())
            # What a former master has renewed since it was replaced was renewed in vain.
            await _within(due - loop.time(), replaced.wait())
            if replaced.is_set():
                due = loop.time()

    async def _renew_all(self, topology: Topology, locks: Locks, spread: float) -> None:
        """Renews all; of several servers one that is silent keeps none of the others' waiting."""
        with self._guard:
            held = list(self._kept)
        for server, entries in _apart(topology, held):
            # One that owes us replies is not done with what it was sent before; where it does not,
            # what is waited for is another server, to which a slot moves, say.
            if server in self._rounds.values() and (
                topology.single or server is None or topology.to(server).waiting
            ):
                continue
            work = self._renew_some(topology, locks, entries, spread)
            self._rounds[asyncio.ensure_future(work)] = server
        if not self._rounds:
            return
        try:
            await asyncio.wait(
                self._rounds,
                timeout=None if topology.single else self._ttl / 2,
                return_when=asyncio.FIRST_EXCEPTION,
            )
        except asyncio.CancelledError:
            await self._end_rounds()
            raise
        ended = [task for task in self._rounds if task.done()]
        errors = [task.exception() for task in ended]
        for task in ended:
            del self._rounds[task]
        for error in errors:
            if error is not None:
                raise error

    async def _end_rounds(self) -> None:
        rounds, self._rounds = list(self._rounds), {}
        for task in rounds:
            task.cancel()
        await asyncio.gather(*rounds, return_exceptions=True)

    async def _renew_some(
        self, topology: Topology, locks: Locks, held: list[Entry], spread: float
    ) -> None:
        """Renews these, window by window; several are under way where the server is far away."""
        loop = asyncio.get_running_loop()
        windows = list(chunks(held, WINDOW))
        start = loop.time()
        under_way: set[asyncio.Task[None]] = set()
        ended: set[asyncio.Task[None]] = set()
        try:
            for number, window in enumerate(windows):
                ahead = start + spread * number / len(windows) - loop.time()
                if ahead > 0:
                    await asyncio.sleep(ahead)
                if len(under_way) == WINDOWS:
                    done, under_way = await asyncio.wait(
                        under_way, return_when=asyncio.FIRST_COMPLETED
                    )
                    ended |= done
                under_way.add(asyncio.ensure_future(self._renew(topology, locks, window)))
            if under_way:
                ended |= (await asyncio.wait(under_way))[0]
        except asyncio.CancelledError:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            raise
        failures = [error for error in [task.exception() for task in ended] if error is not None]
        if failures:  # all others are renewed all the same
            raise failures[0]

    async def _renew(self, topology: Topology, locks: Locks, window: Sequence[Entry]) -> None:
        entries = [entry for entry in window if entry in self._kept]
        if not entries:
            return
        keys = lock_keys(entries)
        gone, taken, error = await locks.renew(keys)
        lost = taken + (await self._revive(topology, locks, gone) if gone else [])
        if lost:
            missing = set(lost)
            self.drop([entry for entry in entries if entry.lock_key in missing])
        if error is not None:  # the others have been seen to
            if lost:
                self._tell(lost, lost)
            raise error
        if lost or self._recorder is not None:
            self._tell(keys, lost)

    def _tell(self, keys: list[bytes], lost: list[bytes]) -> None:
        def told() -> None:
            if self._recorder is not None:
                missing = set(lost)
                for key in keys:
                    parts = split_lock_key(key)
                    if parts is not None:
                        self._recorder.lock_extension(parts[0], key not in missing)
            if lost:
                self._on_lost(lost)

        assert self._app_loop is not None
        if self._threaded:
            with contextlib.suppress(RuntimeError):  # the application's loop is closed
                self._app_loop.call_soon_threadsafe(told)
        else:
            told()

    async def _revive(self, topology: Topology, locks: Locks, gone: list[bytes]) -> list[bytes]:
        """Takes locks anew whose entries are still ours; returns the others: they are lost."""
        ours = await self._pending(topology, gone)
        kept = [key for key in gone if key in ours]
        if kept:
            replies = raise_first(await locks.acquire(kept))
            held = [key for key, reply in zip(kept, replies, strict=True) if reply is None]
            # Another round may have been faster.
            mine = compress(held, await locks.held(held)) if held else ()
            taken = set(held).difference(mine)
            kept = [key for key in kept if key not in taken]
        if kept:
            still = await self._pending(topology, kept)
            late = [key for key in kept if key not in still]
            if late:
                await locks.release(late)
            kept = [key for key in kept if key in still]
            self._logger.warning("%d leases had expired and were taken again in time", len(kept))
        alive = set(kept)
        return [key for key in gone if key not in alive]

    async def _pending(self, topology: Topology, keys: list[bytes]) -> set[bytes]:
        """Those of `keys` whose entries are pending for this consumer."""
        found: set[bytes] = set()
        for number, names in enumerate(self._partitions):
            ours = [key for key in keys if self._partition(key) == number]
            if ours:
                ids = [key.rpartition(SEPARATOR)[2] for key in ours]
                link = topology.link(names.lbs)
                found.update(await pending_for(link, names, self._consumer, ours, ids))
        return found

    def _partition(self, lock_key: bytes) -> int:
        name = lock_key.rpartition(SEPARATOR)[0].decode()
        return partition_of(name, len(self._partitions))


def _apart(topology: Topology, entries: list[Entry]) -> list[tuple[Endpoint | None, list[Entry]]]:
    """Entries by the servers that have their locks, as far as is known."""
    if topology.single:
        return [(None, entries)] if entries else []
    by_key = dict(zip(lock_keys(entries), entries, strict=True))
    parts = topology.apart(list(by_key)).items()
    return [(server, [by_key[key] for key in keys]) for server, keys in parts]


async def _within(seconds: float, work: Coroutine[Any, Any, object]) -> None:
    """Waits so long for it, and cancels it then.

    Not `asyncio.wait_for`, which may swallow that we are cancelled ourselves.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def pending_for(
    link: KeyLink, names: Names, consumer: str, keys: list[bytes], ids: list[bytes]
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
        link: KeyLink,
        locks: Locks,
        names: Names,
        consumer: str,
        *,
        single: bool,
        recovered_after: float,
        keeper: Keeper,
        on_drop: Callable[[], None],
        recorder: SafeRecorder | None,
    ) -> None:
        self._link = link
        self._locks = locks
        self._names = names
        self._consumer = consumer
        self._keeper = keeper
        self._single = single
        self._recovered_after_ms = max(recovered_after, SOONEST) * 1000
        self._doubtful_after = recovered_after * DOUBTFUL_AFTER
        self._on_drop = on_drop
        self._recorder = recorder
        self._born = math.inf
        self._owned: dict[str, Entry] = {}
        self.get: Callable[[Any], Entry | None] = self._owned.get
        """The entry by which a stream of this name is owned; None when it is not."""

    def __len__(self) -> int:
        return len(self._owned)

    def all(self) -> list[Entry]:
        """The first entry of every owned stream."""
        return list(self._owned.values())

    async def take(
        self, entries: list[Entry], asked_at: float, *, again: bool = False
    ) -> tuple[list[Entry], list[tuple[Entry, ReplyError]]]:
        """Locks entries just read; returns those that bring a new stream.

        An entry whose lock somebody holds stays pending, and so do those that the server refused,
        which are returned with these refusals, or with `TOO_LATE`. `asked_at` is when the read was
        sent (loop time): if that is long ago, others may have recovered the entries in the
        meantime. `again`: we may have locked them ourselves, and not heard of it.
        """
        start = time.perf_counter()
        keys = lock_keys(entries)
        replies = await self._locks.acquire(keys)
        late = asyncio.get_running_loop().time() - asked_at > self._doubtful_after
        if late or again:
            replies = await self._confirmed(entries, keys, replies)
        new, locked, refusal = grant(entries, replies, self._owned)
        if locked:
            self._keeper.add(locked)
        if self._recorder is not None:
            took = time.perf_counter() - start
            for entry, reply in zip(entries, replies, strict=True):
                self._recorder.lock_acquisition(entry.data_stream_name, reply == b"OK", took)
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
        # Not just to be found: the keeper's next turn may come after their end.
        gone, taken, error = await self._locks.renew(mine) if mine else ([], [], None)
        if error is not None:
            raise error
        ours = set(mine).difference(gone, taken)
        replies = [b"OK" if key in ours else r for key, r in zip(keys, replies, strict=True)]
        ids = entry_ids(entries)
        still = await pending_for(self._link, self._names, self._consumer, keys, ids)
        most = math.inf if self._single else self._recovered_after_ms
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

    def drop(self, heads: list[Entry]) -> None:
        """The streams of these first entries are owned no more."""
        forget(heads, self._owned)
        self._on_drop()
        if self._recorder is not None:
            for head in heads:
                if head.delivered:
                    self._recorder.stream_processing_end(head.data_stream_name)

    def keep(self, head: Entry) -> None:
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
        start: bytes = b"-"
        more = True
        while more:
            page = await self._link.execute(
                b"XPENDING", self._names.lbs, self._names.group, start, b"+", WINDOW,
                self._consumer, decode=PENDING,
            )  # fmt: skip
            more = len(page) == WINDOW
            missing, found = audit.page(page, round(min_idle * 1000), not more)
            if found:
                # Counted from here to the reply, so that what we have read is always younger.
                lived = 0 if first else math.ceil((time.monotonic() - self._born) * 1000) + 1
                older = set(page.idle(lived))
                strays += [entry_id for entry_id in found if entry_id not in older]
                former += [entry_id for entry_id in found if entry_id in older]
            for entry in missing:
                head = self._owned.get(entry.data_stream_name)
                if head is None or head in lost or head.finishing:
                    continue
                if entry.lock_key in locks_of(head):
                    lost[head] = None
            if more:
                start = b"(" + page[-1][0]
        return list(lost), strays, former


def locks_of(head: Entry) -> list[bytes]:
    """The locks of all entries by which a stream is owned."""
    return [head.lock_key, *(entry.lock_key for entry in head.again or ())]
