"""Leases are kept: a consumer's locks are renewed for as long as it owns their streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from relstream._core import Entry, discard, enter, extend, lock_keys, pack
from relstream.backoff import Backoff
from relstream.errors import (
    ConnectionFailed,
    ConnectionLost,
    RelstreamError,
    ReplyError,
    is_retriable,
)
from relstream.lbs.locks import Locks, chunks
from relstream.lbs.names import SEPARATOR, Names, partition_of
from relstream.net.cluster.slots import SlotTable
from relstream.net.discovery import POLL_EVERY
from relstream.net.replies import raise_first
from relstream.net.sentinel import SentinelMaster
from relstream.ownership.leases import pending_for
from relstream.tasks import cancel_and_wait, new_event_loop, run_until_first_exit, within

if TYPE_CHECKING:
    from relstream.net.deployment import Deployment
    from relstream.net.endpoint import Endpoint
    from relstream.net.failover import MasterResolver
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

# Locks renewed between two looks at what else there is to do.
RENEWAL_WINDOW = 1000
# Windows whose replies may be outstanding.
WINDOWS = 8
# The part of the renewal period over which its windows are spread, so that the server can serve
# others in between; the rest of the period is reserve.
SPREAD = 0.5
# How long a server may take to answer a renewal before that is remarkable, as a part of the TTL.
PROMPT = 1 / 16


class Trouble(NamedTuple):
    """Leases are not renewed on one server. Times in seconds, on the clock of time.monotonic()."""

    since: float
    """Leases there that were renewed since then are safe."""
    tried_at: float
    """When the last try began that failed; 0.0: none has."""
    silent_since: float | None
    """Since when a renewal waits for its answer, if it does for remarkably long."""
    error: str | None
    """Why the last try failed."""
    passing: bool = False
    """Whether a server said so that is not ready to serve, as in an outage or a failover."""


def probe(names: Names) -> bytes:
    """Changes nothing, and is answered as the renewal of a lock would be: no entry has this id."""
    return pack(b"PEXPIRE", names.lbs + SEPARATOR + b"0-0", 1)


def refusal(reply: object) -> ReplyError | None:
    """The error by which a `probe` was answered, if it says that no lock can be renewed."""
    if isinstance(reply, ReplyError) and not (reply.code == "NOPERM" and reply.about_keys):
        return reply
    return None


class LeaseRenewer:
    """Renews leases every half TTL, over connections of its own.

    By default it runs in a thread with an event loop of its own, so that leases outlive an
    application that blocks its loop. `add` and `drop` are called on the application's loop, and so
    is `on_lost`, with locks that are gone.

    A lock that is gone is taken anew only if the entry is still pending for this very consumer,
    both before and after: it may have been put back under another id, and have another owner.

    While nothing is owned the connection is kept open, and tried, all the same: a consumer that
    can't renew must not take anything. What another thread may ask: `troubles`, `renewed_at`.
    """

    def __init__(
        self,
        deployment: Deployment,
        partitions: Sequence[Names],
        consumer: str,
        ttl: float,
        *,
        guide: MasterResolver,
        on_lost: Callable[[list[bytes]], None],
        logger: logging.Logger,
        recorder: SafeRecorder | None,
        threaded: bool,
    ) -> None:
        # A server that keeps us waiting for longer than that has let the leases expire.
        self._deployment = deployment.with_timeout(ttl)
        self._connect_timeout = deployment.endpoint.connect_timeout
        self._patience = self._deployment.endpoint.connect_timeout
        self._guide = guide
        self._partitions = partitions
        self._consumer = consumer
        self._ttl = ttl
        self._on_lost = on_lost
        self._logger = logger
        self._recorder = recorder
        self._threaded = threaded
        # Both threads change it: waking the other one for each batch would cost far more.
        self._renewed: dict[Entry, None] = {}
        self._guard = threading.Lock()
        self._app_loop: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._rounds: dict[asyncio.Task[None], Endpoint | None] = {}
        self._began: dict[Endpoint | None, float] = {}  # the last round of each server
        self._failures: dict[Endpoint | None, Trouble] = {}
        # Renewals under way: to which server, and when they were sent.
        self._sent: dict[object, tuple[Endpoint | None, float]] = {}
        self._topology: Topology | None = None
        self._opened: asyncio.Future[RelstreamError | None] | None = None
        self.renewed_at: float | None = None
        """When the last round began that renewed something, or found that it could (monotonic)."""
        self.together = True
        """Whether one command may have keys of several slots; to be set before `run`."""
        self.on_failure: Callable[[], None] = _nothing
        """Called on the application's loop when a round has failed."""

    # --- on the application's loop -------------------------------------------------------------

    def add(self, entries: list[Entry]) -> None:
        """Renews the locks of these, too."""
        with self._guard:
            enter(self._renewed, entries)

    def discard(self, entries: list[Entry]) -> None:
        """Renews the locks of these no more."""
        with self._guard:
            discard(self._renewed, entries)

    async def opened(self) -> None:
        """Waits for the first connection of `run`; raises what keeps it from being opened."""
        if self._opened is None:
            self._opened = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._opened})
        error = self._opened.result()
        if error is not None:
            raise error

    def _report_opened(self, error: RelstreamError | None) -> None:
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(error)

    def troubles(self, now: float) -> dict[Endpoint | None, Trouble]:
        """Servers on which leases are not renewed at `now` (seconds, time.monotonic())."""
        found = dict(self._failures)
        for server, sent_at in list(self._sent.values()):
            if now - sent_at > self._ttl * PROMPT:
                known = found.get(server)
                if known is None:
                    began = min(self._began.get(server, sent_at), sent_at)
                    found[server] = Trouble(began, 0.0, sent_at, None)
                elif known.silent_since is None or sent_at < known.silent_since:
                    found[server] = known._replace(silent_since=sent_at)
        return found

    def reopen(self, server: Endpoint | None) -> None:
        """Gives the connection to this server up, so that what waits for it is tried anew."""

        def give_up() -> None:
            topology, error = self._topology, ConnectionLost("renewals were not answered")
            if topology is None:
                return
            link = topology.link(self._partitions[0].lbs)
            if server is not None or topology.single:
                topology.to(server or link.endpoint).reopen(error)
            else:
                for _, protocol in link.waiting:
                    protocol.abort(error)

        self._call(self._loop if self._threaded else self._app_loop, give_up)

    def stop(self) -> None:
        """Ends `run`, whatever it is doing."""
        if not self._threaded or self._loop is None:
            self._stopping.set()
            return
        with contextlib.suppress(RuntimeError):  # its loop is closed already
            self._loop.call_soon_threadsafe(self._stopping.set)

    def _call(self, loop: asyncio.AbstractEventLoop | None, function: Callable[[], None]) -> None:
        """Calls it on this loop, the application's or our own, from whichever."""
        if not self._threaded:
            function()
        elif loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(function)

    async def run(self) -> None:
        """Renews until `stop`; raises what ends it otherwise."""
        try:
            await self._run()
        except Exception as error:
            self._report_opened(RelstreamError(f"renewal can't start: {error!r}"))
            raise
        finally:
            self._report_opened(ConnectionLost("renewal has ended"))

    async def _run(self) -> None:
        app_loop = self._app_loop = asyncio.get_running_loop()
        if not self._threaded:
            await self._main()
            return
        self._deployment = self._deployment.asking_on(app_loop)
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

        process = os.getpid()
        thread = threading.Thread(target=body, name=f"relstream-{self._consumer}", daemon=True)
        thread.start()
        cancelled: asyncio.CancelledError | None = None
        while not ended.done():
            try:
                await asyncio.wait({ended})
            except asyncio.CancelledError as error:  # however often: the thread ends first
                if os.getpid() != process:  # forked: the thread is the parent's
                    raise
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
        topology = self._topology = self._deployment.open(f"{self._consumer}:renew", guide)
        topology.together = topology.together and self.together
        replaced = guide.replaced if guide is not None else asyncio.Event()
        parts: list[Coroutine[Any, Any, object]] = [
            self._stopping.wait(),
            self._renew_for_ever(topology, replaced),
        ]
        if isinstance(guide, SentinelMaster):  # a master that was replaced may go on for long
            parts.append(guide.run())
        elif isinstance(guide, SlotTable):
            parts.append(guide.run(max(self._ttl / 8, POLL_EVERY)))
        try:
            await run_until_first_exit(*parts)
        finally:
            await self._end_rounds()
            await topology.close()

    async def _renew_for_ever(self, topology: Topology, replaced: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        locks = Locks(topology, self._consumer, round(self._ttl * 1000), self._logger)
        period = self._ttl / 2
        backoff = Backoff(period / 20, period / 2)
        assert self._app_loop is not None
        # Leases can't be told apart by servers that are not known yet.
        await self._connect(topology)
        due = loop.time()
        while not self._app_loop.is_closed():  # else there is nobody left to own anything
            start = loop.time()
            replaced.clear()
            try:
                await self._renew_all(topology, locks, period * SPREAD)
            except RelstreamError as error:
                if not backoff.failures:
                    self._logger.warning("leases can't be renewed, trying again: %s", error)
                self._call(self._app_loop, self.on_failure)
                await asyncio.sleep(backoff.failed())
                due = loop.time()
                continue
            if backoff.failures and not self._failures:
                again = "are renewed" if self._renewed else "can be renewed"
                self._logger.warning("leases %s again", again)
                backoff.reset()
            if loop.time() - start > period:
                self._logger.warning(
                    "renewing %d leases took %.2f s, and should take %.2f s at most",
                    len(self._renewed), loop.time() - start, period,
                )  # fmt: skip
            due = max(due + period, loop.time())
            # What a former master has renewed since it was replaced was renewed in vain.
            await within(due - loop.time(), replaced.wait())
            if replaced.is_set():
                due = loop.time()

    async def _connect(self, topology: Topology) -> None:
        """Opens the first connection; reports, once, whether that worked."""
        started = time.monotonic()
        error: RelstreamError | None = None
        while True:
            asked_at = time.monotonic()
            try:
                await topology.link(self._partitions[0].lbs).get()
                error = None
            except RelstreamError as failure:
                error = failure
            now = time.monotonic()
            # One that just does not answer in time may: a TTL can be shorter than that takes.
            patient = isinstance(error, ConnectionFailed) and now - asked_at >= self._patience
            if not patient or now - started >= self._connect_timeout:
                break
        if error is None:
            self.renewed_at = started
        reported = error
        self._call(self._app_loop, lambda: self._report_opened(reported))

    async def _renew_all(self, topology: Topology, locks: Locks, spread: float) -> None:
        """Renews all; of several servers one that is silent keeps none of the others' waiting."""
        with self._guard:
            held = list(self._renewed)
        parts = _apart(topology, held)
        for server, entries in parts:
            # One that owes us replies is not done with what it was sent before; where it does not,
            # what is waited for is another server, to which a slot moves, say.
            if server in self._rounds.values() and (
                topology.single or server is None or topology.to(server).waiting
            ):
                continue
            self._begin(server, self._renew_some(topology, locks, server, entries, spread))
        for server in self._idle(topology, [server for server, _ in parts]):
            if server not in self._rounds.values():
                self._begin(server, self._check(topology, server))
        try:
            await asyncio.wait(
                self._rounds,
                timeout=None if topology.single else self._ttl / 2,
                return_when=asyncio.FIRST_EXCEPTION,
            )
        except asyncio.CancelledError:
            await self._end_rounds()
            raise
        errors: list[BaseException] = []
        for task in [task for task in self._rounds if task.done()]:
            server = self._rounds.pop(task)
            began = self._began[server]
            error = task.exception()
            if error is None:
                self._failures.pop(server, None)
                self.renewed_at = began
            else:
                errors.append(error)
                before = self._failures.get(server)
                since = before.since if before is not None else began
                self._failures[server] = Trouble(since, began, None, str(error), _passing(error))
        for error in errors:
            raise error

    def _begin(self, server: Endpoint | None, work: Coroutine[Any, Any, None]) -> None:
        self._began[server] = time.monotonic()
        self._rounds[asyncio.ensure_future(work)] = server

    def _idle(self, topology: Topology, busy: list[Endpoint | None]) -> list[Endpoint | None]:
        """Servers to be tried though no lease is there; None: that of the first LBS."""
        for gone in self._failures.keys() - topology.servers - {None}:
            self._failures.pop(gone, None)
        idle = [server for server in self._failures if server not in busy]
        return idle if busy or None in idle else [*idle, None]

    async def _check(self, topology: Topology, server: Endpoint | None) -> None:
        """Makes sure that a lease could be renewed there."""
        call = object()
        self._sent[call] = server, time.monotonic()
        try:
            if topology.single:
                (reply,) = await topology.link(b"").pipeline(probe(self._partitions[0]), 1)
                if (error := refusal(reply)) is not None:
                    raise error
            elif server is not None:  # other commands need a key of the right slot
                await topology.to(server).get()
            else:
                await topology.link(self._partitions[0].lbs).get()
        finally:
            del self._sent[call]

    async def _end_rounds(self) -> None:
        rounds, self._rounds = self._rounds, {}
        await cancel_and_wait(rounds)

    async def _renew_some(
        self,
        topology: Topology,
        locks: Locks,
        server: Endpoint | None,
        held: list[Entry],
        spread: float,
    ) -> None:
        """Renews these, window by window; several are under way where the server is far away."""
        loop = asyncio.get_running_loop()
        windows = list(chunks(held, RENEWAL_WINDOW))
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
                under_way.add(asyncio.ensure_future(self._renew(topology, locks, server, window)))
            if under_way:
                ended |= (await asyncio.wait(under_way))[0]
        except asyncio.CancelledError:
            await cancel_and_wait(under_way)
            raise
        failures = [error for error in [task.exception() for task in ended] if error is not None]
        if failures:  # all others are renewed all the same
            raise failures[0]

    async def _renew(
        self, topology: Topology, locks: Locks, server: Endpoint | None, window: Sequence[Entry]
    ) -> None:
        entries = [entry for entry in window if entry in self._renewed]
        if not entries:
            return
        keys = lock_keys(entries)
        sent_at = time.monotonic()
        call = object()
        self._sent[call] = server, sent_at
        try:
            outcomes = await locks.renew_each(keys)
        finally:
            del self._sent[call]
        extend(entries, outcomes, sent_at + self._ttl)
        took = time.monotonic() - sent_at
        gone = [entry for entry, outcome in zip(entries, outcomes, strict=True) if outcome == 0]
        lost = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == -1]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, ReplyError)]
        if gone:
            lost += await self._revive(topology, locks, gone)
        if lost:
            unowned = set(lost)
            self.discard([entry for entry in entries if entry.lock_key in unowned])
        if lost or self._recorder is not None:
            failed = len(lost) + len(refusals)
            self._tell(lost, len(keys) - failed, failed, took)
        raise_first(refusals)  # the others have been seen to

    def _tell(self, lost: list[bytes], succeeded: int, failed: int, duration: float) -> None:
        def told() -> None:
            if self._recorder is not None:
                self._recorder.lock_extension(succeeded=succeeded, failed=failed, duration=duration)
            if lost:
                self._on_lost(lost)

        self._call(self._app_loop, told)

    async def _revive(self, topology: Topology, locks: Locks, entries: list[Entry]) -> list[bytes]:
        """Takes locks anew whose entries are still ours; returns the others: they are lost."""
        gone = lock_keys(entries)
        ours = await self._pending(topology, gone)
        kept = [key for key in gone if key in ours]
        if kept:
            sent_at = time.monotonic()
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
            # Since when another round has taken some of them is known to that one.
            anew = set(kept).difference(held)
            extend(entries, [int(key in anew) for key in gone], sent_at + self._ttl)
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


def _passing(error: BaseException) -> bool:
    # MASTERDOWN stands for a connection to one of several masters that can't be opened.
    if not isinstance(error, ReplyError) or error.code == "MASTERDOWN":
        return False
    return is_retriable(error)


def _nothing() -> None:
    """Nobody wants to know."""


def _apart(topology: Topology, entries: list[Entry]) -> list[tuple[Endpoint | None, list[Entry]]]:
    """Entries by the servers that have their locks, as far as is known."""
    if topology.single:
        return [(None, entries)] if entries else []
    by_key = dict(zip(lock_keys(entries), entries, strict=True))
    parts = topology.group_by_node(list(by_key)).items()
    return [(server, [by_key[key] for key in keys]) for server, keys in parts]
