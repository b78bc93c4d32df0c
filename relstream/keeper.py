"""Leases are kept: a consumer's locks are renewed for as long as it owns their streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from relstream._core import Entry, discard, enter, lock_keys
from relstream.errors import RelstreamError
from relstream.lbs import SEPARATOR, Names, partition_of
from relstream.leases import pending_for
from relstream.locks import Locks, chunks
from relstream.net.asking import LOOK_EVERY
from relstream.net.connection import Backoff, raise_first
from relstream.net.sentinel import NamedMaster
from relstream.tasks import end_all, new_event_loop, until_one_ends, within

if TYPE_CHECKING:
    from relstream.net.connection import Endpoint
    from relstream.net.deployment import Deployment
    from relstream.net.topology import Guide, Topology
    from relstream.recorder import SafeRecorder

# Locks renewed between two looks at what else there is to do.
WINDOW = 1000
# Windows whose replies may be outstanding.
WINDOWS = 8
# The part of the renewal period over which its windows are spread, so that the server can serve
# others in between; the rest of the period is reserve.
SPREAD = 0.5


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
        replaced = guide.replaced if guide is not None else asyncio.Event()
        parts: list[Coroutine[Any, Any, object]] = [
            self._stopping.wait(),
            self._renew_for_ever(topology, replaced),
        ]
        if isinstance(guide, NamedMaster):  # a master that was replaced may go on for long
            parts.append(guide.run())
        elif guide is not None:
            parts.append(guide.run(max(self._ttl / 8, LOOK_EVERY)))
        try:
            await until_one_ends(*parts)
        finally:
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
                    await within(period / 2, topology.link(self._partitions[0].lbs).get())
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
            await within(due - loop.time(), replaced.wait())
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
        rounds, self._rounds = self._rounds, {}
        await end_all(rounds)

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
            await end_all(under_way)
            raise
        failures = [error for error in [task.exception() for task in ended] if error is not None]
        if failures:  # all others are renewed all the same
            raise failures[0]

    async def _renew(self, topology: Topology, locks: Locks, window: Sequence[Entry]) -> None:
        entries = [entry for entry in window if entry in self._kept]
        if not entries:
            return
        keys = lock_keys(entries)
        start = time.perf_counter()
        gone, taken, refusals = await locks.renew(keys)
        lost = taken + (await self._revive(topology, locks, gone) if gone else [])
        if lost:
            missing = set(lost)
            self.drop([entry for entry in entries if entry.lock_key in missing])
        if lost or self._recorder is not None:
            failed = len(lost) + len(refusals)
            self._tell(lost, len(keys) - failed, failed, time.perf_counter() - start)
        raise_first(refusals)  # the others have been seen to

    def _tell(self, lost: list[bytes], succeeded: int, failed: int, duration: float) -> None:
        def told() -> None:
            if self._recorder is not None:
                self._recorder.lock_extension(succeeded=succeeded, failed=failed, duration=duration)
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
