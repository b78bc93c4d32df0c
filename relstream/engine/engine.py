"""One running client: builds its parts, opens, supervises, and closes them."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from relstream.engine.connections import Connections
from relstream.engine.health import HealthMonitor
from relstream.engine.partition import Partition
from relstream.engine.pausing import Pausing
from relstream.engine.twins import Twins
from relstream.engine.unrenewed import UnrenewedLeases
from relstream.errors import (
    ClientClosed,
    ClusterClientRequired,
    ConnectionFailed,
    RelstreamError,
    ReplyError,
)
from relstream.lbs.eviction import evicting
from relstream.lbs.expiry_events import NEEDED, SETTING, ClusterEvents, ExpiryEvents
from relstream.lbs.locks import Locks
from relstream.lbs.names import Names, lock_key, partition_of, split_lock_key
from relstream.lbs.permissions import keys_together, probe_permissions
from relstream.net.cluster.slots import SlotTable
from relstream.net.sentinel import SentinelMaster
from relstream.notifications import LBSInfo, Notifications
from relstream.ownership.capacity import Capacity
from relstream.ownership.renewer import LeaseRenewer
from relstream.tasks import CLOSING, OneLoop, cancel_and_wait, consume_exception

if TYPE_CHECKING:
    from relstream._core import Entry
    from relstream.engine.settings import Settings
    from relstream.net.deployment import Deployment
    from relstream.net.endpoint import Endpoint
    from relstream.recorder import SafeRecorder

# Seconds that closing may take; locks of streams not handed over by then expire by themselves.
CLOSE_TIMEOUT = 10.0
CLOSED_MEANWHILE = "the client was closed while it was being opened"


class State(enum.Enum):
    """The life of a client, in this order; `TERMINATED` only by a failure."""

    NEW = enum.auto()
    OPENING = enum.auto()
    OPEN = enum.auto()
    TERMINATED = enum.auto()
    CLOSING = enum.auto()


class Engine:
    """Builds, opens, supervises and closes the parts of one client."""

    def __init__(
        self,
        deployment: Deployment,
        names: Sequence[Names],
        settings: Settings,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self.state = State.NEW
        self.loop = OneLoop("the client was")
        self.home: asyncio.AbstractEventLoop | None = None
        """The event loop in which the client was opened."""
        self.reason: str | None = None
        """Why the client ended, if by a failure; `failure` is its exception."""
        self.failure: BaseException | None = None
        self.closing: asyncio.Task[RelstreamError | None] | None = None
        self.was_open = False
        """Whether the client had been open when it began to close."""
        self.finishing = False
        """Whether closing finishes owned streams instead of handing them over."""
        self._logger = logger
        self._recorder = recorder
        self._consumer = consumer = settings.consumer
        self._warned_of_config = False
        self._tasks: dict[asyncio.Task[None], tuple[str, Partition | None]] = {}
        self.notifications = Notifications(
            settings.queue_size, self._delivered if recorder is not None else None
        )
        connections = self._connections = Connections(
            deployment, names, consumer, settings.heartbeat
        )
        guide = connections.guide

        def events_of(master: Endpoint) -> ExpiryEvents:
            role = f"{consumer}:events"
            return ExpiryEvents(
                lambda on_push: replace(deployment, endpoint=master).link(role, on_push, guide),
                force_config_override=settings.force_config_override,
                on_expired=self._expired,
                on_forbidden=self._config_forbidden,
                recorder=recorder,
                logger=logger,
            )

        self.events: ExpiryEvents | ClusterEvents = (
            ClusterEvents(guide, events_of, logger)
            if isinstance(guide, SlotTable)
            else events_of(deployment.endpoint)
        )
        self.renewer = LeaseRenewer(
            deployment,
            names,
            consumer,
            settings.heartbeat,
            guide=guide,
            on_lost=self._locks_lost,
            logger=logger,
            recorder=recorder,
            threaded=settings.renew_in_thread,
        )
        locks = Locks(connections.commands, consumer, round(settings.heartbeat * 1000), logger)
        capacity = Capacity(self.notifications, self._owned, settings.max_streams, len(names))
        self.partitions = [
            Partition(
                its_names,
                consumer,
                commands=connections.commands,
                reading=reads.link(its_names.lbs),
                recovering=connections.recovering,
                leading=connections.leading,
                locks=locks,
                renewer=self.renewer,
                notifications=self.notifications,
                room=capacity,
                heartbeat=settings.heartbeat,
                retry=settings.retry,
                patience=settings.patience,
                recovery=settings.recovery,
                auto_claim=settings.auto_claim,
                recorder=recorder,
                logger=logger,
            )
            for its_names, reads in zip(names, connections.reads, strict=True)
        ]
        self.only = self.partitions[0] if len(names) == 1 else None
        """The partition, where there is only one."""
        self.pausing = Pausing(capacity, self.notifications, self.partitions)
        self._unrenewed = UnrenewedLeases(
            self.renewer,
            connections.commands,
            self.partitions,
            room=capacity,
            notifications=self.notifications,
            ttl=settings.heartbeat,
            logger=logger,
        )
        first = self.partitions[0]
        self._twins = Twins(first.link, first.names, consumer, settings.heartbeat, logger)
        self.health = HealthMonitor(
            self.renewer,
            self.partitions,
            room=capacity,
            twins=self._twins,
            heartbeat=settings.heartbeat,
            waiting=lambda: self.notifications.waiting,
        )

    # --- opening ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connects, sets up the group and expiry events, and starts all parts; only once."""
        self.loop.check_process()
        if self.state is not State.NEW:
            before = "init() was called before" if self.closing is None else "it was closed"
            raise ClientClosed(f"{before}: make a new StreamClient")
        self.loop.check()
        self.home = asyncio.get_running_loop()
        self.state = State.OPENING
        try:
            await self._set_up()
            if self.closing is not None:
                raise ClientClosed(CLOSED_MEANWHILE)
        except BaseException as error:
            await cancel_and_wait(self._tasks)
            await asyncio.gather(self.events.close(), self._connections.close())
            if self.closing is not None and isinstance(error, RelstreamError):
                raise ClientClosed(CLOSED_MEANWHILE) from None
            raise
        self.state = State.OPEN
        self.health.start()
        self._start("unrenewed leases", self._unrenewed.run())
        self._start("twins", self._twins.run())
        self._start("events", self.events.run())
        if isinstance(self._connections.guide, SentinelMaster):
            self._start("sentinel", self._connections.guide.run())
        for part in self.partitions:
            self._start("completer", part.completer.run(), part)
            self._start("fetcher", part.fetcher.run(), part)
            self._start("audit", part.audit_for_ever(), part)
            self._start("recovery", part.recoverer.run(), part)

    async def _set_up(self) -> None:
        for part in self.partitions:
            server = await part.link.get()
            if server.clustered and not isinstance(self._connections.guide, SlotTable):
                raise ClusterClientRequired(
                    f"{part.link.endpoint} is a node of a cluster, which has only some of the "
                    "keys: give redis+cluster://host:port, or a RedisCluster"
                )
            await probe_permissions(self._connections.commands, part.names, self._consumer)
            self._keep_together(await keys_together(self._connections.commands, part.names))
            await part.create_group()
            await part.clock.refresh()
        await self._set_up_events()
        evict = await evicting(self._connections.commands, config=not self._warned_of_config)
        self._warn_of_eviction(evict)
        self._start("renewer", self.renewer.run())
        # A consumer that can't renew must not own anything. Last, so that its end is noticed.
        await self.renewer.opened()

    async def _set_up_events(self) -> None:
        """Expiry events that are refused for now are tried again later; all else goes on."""
        try:
            await self.events.set_up()
        except ReplyError as error:
            if not error.transient:
                raise
            self._logger.warning(
                "no expiry events for now, trying again: %s; until then dead consumers are found "
                "by probes and scans, a little later", error,
            )  # fmt: skip

    def _keep_together(self, together: bool) -> None:
        """Whether one command may have keys of several slots."""
        if self._connections.commands.together and not together:
            self._logger.warning(
                "this server refuses commands with keys of several slots (CROSSSLOT): locks and "
                "entries are seen to one by one, as on a cluster"
            )
            self._connections.keep_apart()
            self.renewer.together = False

    # --- supervision --------------------------------------------------------------------------

    def _start(
        self, name: str, work: Coroutine[Any, Any, None], part: Partition | None = None
    ) -> None:
        task = asyncio.ensure_future(work)
        task.set_name(f"relstream-{name}")
        self._tasks[task] = (name, part)
        task.add_done_callback(self._ended)

    def _running(self, name: str, part: Partition | None = None) -> asyncio.Task[None] | None:
        return next((task for task, what in self._tasks.items() if what == (name, part)), None)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """No part ends unnoticed: without one of them the client can't keep its promises."""
        consume_exception(task)
        name, _ = self._tasks.pop(task)
        if self.loop.forked or self.state is not State.OPEN:
            return
        self.state = State.TERMINATED
        error = None if task.cancelled() else task.exception()
        reason = f"{name} was cancelled" if task.cancelled() else f"{name} ended"
        if error is not None:
            reason = f"{name} failed: {error}"
        self.reason, self.failure = reason, error
        unforeseen = error is not None and not isinstance(error, RelstreamError)
        self._logger.error("the client ends: %s", reason, exc_info=error if unforeseen else None)
        self.health.failed(reason)
        self.notifications.end(reason)
        if self._recorder is not None:
            self._recorder.terminated(reason=reason)
        for other, (name, _) in list(self._tasks.items()):
            # Notified streams stay owned, and can be finished, until the client closes.
            if name not in ("renewer", "completer"):
                other.cancel()
        for part in self.partitions:
            for head in part.leases.all():
                if not head.delivered and not head.finishing:
                    # Streams that could not be handed over are recovered by others.
                    part.completer.release(head).add_done_callback(consume_exception)

    # --- closing ------------------------------------------------------------------------------

    async def close(
        self, *, finish: bool, failure: Exception | None = None
    ) -> RelstreamError | None:
        """Finishes or hands over what is owned, and closes; returns what kept it from that.

        If the application failed, so did the stream that it was notified of last.
        """
        self.loop.check()
        if self.closing is None:
            self.was_open = self.state in (State.OPEN, State.TERMINATED)
            self.state = State.CLOSING
            self.finishing = finish
            self.closing = asyncio.ensure_future(self._shut_down(finish, failure))
            self.closing.set_name(CLOSING)
        # A caller that stops waiting does not stop the closing, which is bounded in time.
        return await asyncio.shield(self.closing)

    async def _shut_down(
        self, finish: bool, application_failed: Exception | None
    ) -> RelstreamError | None:
        self.notifications.end("closed")
        self.health.closing()
        failure: RelstreamError | None = None
        try:
            if self.was_open:
                if application_failed is not None:
                    self._fail_last(application_failed)
                await asyncio.wait_for(self._give_up_all(finish), CLOSE_TIMEOUT)
        except TimeoutError:
            failure = ConnectionFailed(f"closing took over {CLOSE_TIMEOUT:g} s")
        except RelstreamError as error:
            failure = error
        finally:
            tasks = list(self._tasks)
            await cancel_and_wait(tasks)
            await asyncio.gather(*(part.close() for part in self.partitions))
            for part in self.partitions:  # not handed over
                part.leases.drop(part.leases.all(), "lost")
            await asyncio.gather(self.events.close(), self._connections.close())
            self.health.stop()
        if failure is not None:
            self._logger.warning(
                "not everything could be %s before closing, it will be recovered: %s",
                "finished" if finish else "handed over", failure,
            )  # fmt: skip
        return failure

    def _fail_last(self, error: Exception) -> None:
        head = self.notifications.last_added
        if head is None:
            return
        part = self.part(head.data_stream_name)
        if part.leases.get(head.data_stream_name) is head and not head.finishing:
            self._logger.warning(
                "the application ended by %s, so its stream %r failed: it is retried later, or a "
                "dead letter",
                type(error).__name__, head.data_stream_name,
            )  # fmt: skip
            failure = part.failures.failed(head, error, None)
            part.completer.fail(head, failure).add_done_callback(consume_exception)

    async def _give_up_all(self, finish: bool) -> None:
        outcomes = await asyncio.gather(
            *(self._give_up(part, finish) for part in self.partitions), return_exceptions=True
        )
        await cancel_and_wait([task for task, (name, _) in self._tasks.items() if name == "twins"])
        await self._twins.leave()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _give_up(self, part: Partition, finish: bool) -> None:
        recovery = self._running("recovery", part)
        for task in (recovery, self._running("audit", part), self._running("events")):
            if task is not None:
                task.cancel()
        fetching = self._running("fetcher", part)
        if fetching is not None:
            await part.fetcher.stop()
            await asyncio.wait({fetching})
        if self._running("completer", part) is None:  # cancelled with all else, say by asyncio.run
            self._start("completer", part.completer.run(), part)
            await asyncio.sleep(0)  # it is not running yet
        await part.give_up(finish=finish, alone=self._twins.other is None, led=recovery is not None)

    # --- streams and events -------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether streams can be finished: open, or ended by a failure and not closed yet."""
        return self.state in (State.OPEN, State.TERMINATED)

    def check_usable(self) -> None:
        """Raises `ClientClosed`, or `UsageError` in another event loop than that of `open`."""
        self.loop.check_process()
        if not self.usable:
            raise ClientClosed("the client is not open: call init() first, and not after closing")
        self.loop.check()

    def part(self, stream: str) -> Partition:
        """The partition that this data stream is of."""
        return self.only or self.partitions[partition_of(stream, len(self.partitions))]

    async def reset_topology(self) -> None:
        """Sets up expiry events on the masters of today; see `StreamClient.reset_topology`."""
        success = False
        try:
            await self.events.reset()
            success = True
        finally:
            if self._recorder is not None:
                self._recorder.topology_reset(success=success)

    def _delivered(self, entry: Entry) -> None:
        assert self._recorder is not None
        self._recorder.stream_processing_start(stream=entry.data_stream_name)

    def _owned(self) -> int:
        return sum(len(part.leases) for part in self.partitions)

    def _locks_lost(self, keys: list[bytes]) -> None:
        lost: dict[Partition, list[bytes]] = {}
        for key in keys:
            parts = split_lock_key(key)
            if parts is not None:
                lost.setdefault(self.part(parts[0]), []).append(key)
        for part, its_keys in lost.items():
            part.locks_lost(its_keys)

    def _config_forbidden(self, refusal: ReplyError) -> None:
        """Said once, however many masters there are, and however often they are set up."""
        if self._warned_of_config:
            return
        self._warned_of_config = True
        self._logger.warning(
            "the server does not let us see to expiry events (%s): unless %s contains %s, "
            "STREAM_EXPIRED is not told, and dead consumers are found a little later",
            refusal, SETTING.decode(), NEEDED,
        )  # fmt: skip

    def _warn_of_eviction(self, masters: list[str]) -> None:
        if masters:
            self._logger.warning(
                "keys can be evicted on %s: a stream whose lock is evicted gets a second owner, "
                "and allkeys-* can evict load balancer streams, whose announced streams are lost; "
                "set maxmemory-policy to noeviction, or use a Redis of its own",
                ", ".join(masters),
            )  # fmt: skip

    def _expired(self, payload: LBSInfo) -> None:
        part = self.part(payload.data_stream_name)
        part.recoverer.expired(payload)
        told = self.notifications.expired(payload, part.leases.by_lock(lock_key(*payload)))
        if self._recorder is not None:
            self._recorder.keyspace_notification_received(stream=payload.data_stream_name)
            if not told:
                self._recorder.keyspace_notification_dropped()
