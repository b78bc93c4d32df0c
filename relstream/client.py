"""`StreamClient`: what an application holds in its hands, and the life of what stands behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from relstream._core import OwnedStreams, holds
from relstream.config import (
    ClusterMode,
    RecoveryConfig,
    RetryConfig,
    check_count,
    check_flag,
    check_name,
    check_seconds,
)
from relstream.engine.health import Health, HealthMonitor
from relstream.engine.partition import Partition
from relstream.engine.pausing import Pausing
from relstream.engine.twins import Twins
from relstream.engine.unrenewed import UnrenewedLeases
from relstream.errors import (
    ClientClosed,
    ClientTerminated,
    ClusterClientRequired,
    ConnectionFailed,
    ConsumerIdMissing,
    InvalidOption,
    RelstreamError,
    ReplyError,
    StreamNotOwned,
)
from relstream.lbs.eviction import evicting
from relstream.lbs.expiry_events import NEEDED, SETTING, ClusterEvents, ExpiryEvents
from relstream.lbs.failures import check_delay
from relstream.lbs.locks import Locks
from relstream.lbs.names import Names, lock_key, partition_of, split_lock_key
from relstream.lbs.permissions import keys_together, probe_permissions
from relstream.net.connection import consume_exception
from relstream.net.deployment import deployment_of
from relstream.net.sentinel import SentinelMaster
from relstream.net.topology import SlotTable
from relstream.notifications import LBSInfo, Notifications
from relstream.ownership.capacity import Capacity
from relstream.ownership.leases import OwnedStream
from relstream.ownership.renewer import LeaseRenewer
from relstream.recorder import Recorder, SafeRecorder, is_recorder
from relstream.tasks import CLOSING, OneLoop, cancel_and_wait

if TYPE_CHECKING:
    import redis.asyncio

    from relstream._core import Entry
    from relstream.net.connection import Endpoint

__all__ = ["StreamClient"]

# Seconds that closing may take; what has not been handed over by then expires by itself.
CLOSE_TIMEOUT = 10.0
# Seconds for which a client waits for a lost master to be replaced, however few retries it has.
FAILOVER_TIMEOUT = 60.0
# A heartbeat interval, in seconds, above which it may have been meant in milliseconds.
LONG_HEARTBEAT = 60.0
# Seconds that an application may ask to wait for: 30 days.
LONGEST_WAIT = 30 * 86_400.0
CLOSED_MEANWHILE = "the client was closed while it was being opened"


class StreamClient:
    """One consumer of a service: owns data streams, and tells the application which.

    ::

        client = StreamClient("redis://localhost", "calls", consumer_id="worker-1")
        async with client as notifications:
            async for notification in notifications:
                if notification.type is NotificationType.STREAM_ADDED:
                    ...

    Args:
        redis: a URL (redis://, rediss://, unix://; redis+cluster://host:port,host:port/db;
            redis+sentinel://host:port,host:port/name-of-master/db; rediss+… with TLS) or a ready
            `redis.asyncio` client (`Redis`, `RedisCluster`, or one that `Sentinel.master_for`
            made), of which addresses, credentials, TLS and database are taken over; its
            connections are not used.
        service_name: names the load balancer stream, `<service>-input`, and its group.
        consumer_id: this consumer's name, as it is. Without it `redis-consumer-` and POD_NAME, else
            POD_IP, of the environment. Two living consumers must never share one.
        heartbeat_interval: the locks' time to live, in seconds; they are renewed twice in it. Above
            60 a warning is logged: it takes as long until streams of a dead consumer come back.
        queue_size: added streams that may wait for the application, and as many expiry events.
        max_streams: how many streams this consumer owns at most; None: no limit.
        retry: how often a failing read is tried again before the client ends: for ever, unless a
            bound is given. A bound other than 0 does not hold for the first 60 s without a master
            where a lost one is replaced, that is of a Redis Cluster and behind Sentinel.
        recovery: how streams of dead consumers come back.
        auto_claim: whether this consumer helps to recover streams whose locks expired.
        cluster_mode: OSS insists on a Redis Cluster; one is recognised without it.
        partitions: over how many load balancer streams the service is spread, on different masters
            of a cluster, when one can't bear it. All its consumers and producers have to be given
            the same number; with more than 1 the Go client can't take part.
        force_config_override: whether `notify-keyspace-events` may be extended where it is set.
        renew_in_thread: renew locks in a thread, so that they outlive a blocked event loop.
        logger: receives what is worth knowing; `logging.getLogger("relstream")` unless given.
        recorder: receives events for metrics, see `Recorder`.

    Raises:
        InvalidOption: names the setting, the value and the bound.
        ConsumerIdMissing: there is no name for this consumer.
        ClusterClientRequired: `ClusterMode.OSS` without a `RedisCluster` or such a URL.
    """

    def __init__(
        self,
        redis: str | redis.asyncio.Redis | redis.asyncio.RedisCluster,
        service_name: str,
        *,
        consumer_id: str | None = None,
        heartbeat_interval: float = 2.0,
        queue_size: int = 500,
        max_streams: int | None = None,
        retry: RetryConfig = RetryConfig(),  # noqa: B008 - frozen
        recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 - frozen
        auto_claim: bool = True,
        cluster_mode: ClusterMode = ClusterMode.SINGLE_SHARD,
        partitions: int = 1,
        force_config_override: bool = False,
        renew_in_thread: bool = True,
        logger: logging.Logger | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        check_seconds("heartbeat_interval", heartbeat_interval, 0.1, 3600.0)
        check_count("queue_size", queue_size, 1, 1_000_000)
        if max_streams is not None:
            check_count("max_streams", max_streams, 1)
        for option, value, kind in (
            ("retry", retry, RetryConfig),
            ("recovery", recovery, RecoveryConfig),
            ("cluster_mode", cluster_mode, ClusterMode),
        ):
            if not isinstance(value, kind):
                raise InvalidOption(option, value, f"a {kind.__name__}")
        check_flag("auto_claim", auto_claim)
        check_flag("force_config_override", force_config_override)
        check_flag("renew_in_thread", renew_in_thread)
        if logger is not None and not isinstance(logger, (logging.Logger, logging.LoggerAdapter)):
            raise InvalidOption("logger", logger, "a logging.Logger")
        if recorder is not None and not is_recorder(recorder):
            raise InvalidOption("recorder", recorder, "an object with methods of Recorder, or None")
        names = Names.all_of(service_name, recovery.dlq_stream, partitions)
        self._consumer = _consumer_name(consumer_id)
        deployment = deployment_of(redis)
        if cluster_mode is ClusterMode.OSS and not deployment.nodes:
            raise ClusterClientRequired(
                "cluster_mode=OSS needs a redis.asyncio.RedisCluster or a URL redis+cluster://, "
                f"got {type(redis).__name__}"
            )
        if deployment.has_failover and retry.max_retries:
            # A lost master is replaced, which takes longer than most bounds allow, and is not to
            # be missed once it has happened.
            patience = FAILOVER_TIMEOUT
            retry = replace(retry, max_delay=max(min(retry.max_delay, 0.5), retry.initial_delay))
        else:
            patience = 0.0
        self._heartbeat = float(heartbeat_interval)
        self._logger = logger or logging.getLogger("relstream")
        if self._heartbeat > LONG_HEARTBEAT:
            self._logger.warning(
                "heartbeat_interval=%g is in seconds: streams of a dead consumer come back no "
                "earlier than %g s after its last renewal; if it was meant in milliseconds, divide "
                "it by 1000",
                self._heartbeat, self._heartbeat,
            )  # fmt: skip
        self._recorder = None if recorder is None else SafeRecorder(recorder, self._logger.warning)
        self._notifications = Notifications(
            queue_size, self._delivered if self._recorder is not None else None
        )
        self._tasks: dict[asyncio.Task[None], tuple[str, Partition | None]] = {}
        self._loop = OneLoop("the client was")
        # That of `init`.
        self._home: asyncio.AbstractEventLoop | None = None
        self._opened = False
        self._ready = False
        self._terminated = False
        # Why the client ended, if by a failure.
        self._reason: str | None = None
        self._failure: BaseException | None = None
        self._finishing = False
        self._warned_of_config = False
        self._closing: asyncio.Task[RelstreamError | None] | None = None
        guide = self._guide = deployment.guide()
        # One master that hangs must not keep locks of the others waiting until they have expired.
        quick = (
            deployment.with_timeout(max(self._heartbeat / 2, 0.5))
            if deployment.nodes
            else deployment
        )
        self._commands = quick.open(f"{self._consumer}:command", guide)
        # A blocked read has its connection to itself.
        self._reads = [deployment.open(f"{self._consumer}:read", guide) for _ in names]
        self._recovering = quick.open(f"{self._consumer}:recover", guide)
        self._leading = deployment.open(f"{self._consumer}:lead", guide)

        def events_of(master: Endpoint) -> ExpiryEvents:
            role = f"{self._consumer}:events"
            return ExpiryEvents(
                lambda on_push: replace(deployment, endpoint=master).link(role, on_push, guide),
                force_config_override=force_config_override,
                on_expired=self._expired,
                on_forbidden=self._config_forbidden,
                recorder=self._recorder,
                logger=self._logger,
            )

        self._events: ExpiryEvents | ClusterEvents = (
            ClusterEvents(guide, events_of, self._logger)
            if isinstance(guide, SlotTable)
            else events_of(deployment.endpoint)
        )
        self._renewer = LeaseRenewer(
            deployment,
            names,
            self._consumer,
            self._heartbeat,
            guide=guide,
            on_lost=self._locks_lost,
            logger=self._logger,
            recorder=self._recorder,
            threaded=renew_in_thread,
        )
        locks = Locks(self._commands, self._consumer, round(self._heartbeat * 1000), self._logger)
        room = Capacity(self._notifications, self._owned, max_streams, len(names))
        self._partitions = [
            Partition(
                its_names,
                self._consumer,
                commands=self._commands,
                reading=reads.link(its_names.lbs),
                recovering=self._recovering,
                leading=self._leading,
                locks=locks,
                renewer=self._renewer,
                notifications=self._notifications,
                room=room,
                heartbeat=self._heartbeat,
                retry=retry,
                patience=patience,
                recovery=recovery,
                auto_claim=auto_claim,
                recorder=self._recorder,
                logger=self._logger,
            )
            for its_names, reads in zip(names, self._reads, strict=True)
        ]
        self._only = self._partitions[0] if len(names) == 1 else None
        self._pausing = Pausing(room, self._notifications, self._partitions)
        self._unrenewed = UnrenewedLeases(
            self._renewer,
            self._commands,
            self._partitions,
            room=room,
            notifications=self._notifications,
            ttl=self._heartbeat,
            logger=self._logger,
        )
        first = self._partitions[0]
        self._twins = Twins(first.link, first.names, self._consumer, self._heartbeat, self._logger)
        self._health = HealthMonitor(
            self._renewer,
            self._partitions,
            room=room,
            twins=self._twins,
            heartbeat=self._heartbeat,
            waiting=lambda: self._notifications.waiting,
        )

    @property
    def id(self) -> str:
        """The consumer's name, in the group and in its locks."""
        return self._consumer

    # --- life ---------------------------------------------------------------------------------

    async def init(self) -> Notifications:
        """Connects, sets up group and expiry events, and starts to own streams.

        Returns the asynchronous iterator of notifications. To be called once.

        Raises:
            ConnectionFailed: no server answers at the address.
            AuthenticationFailed, PermissionDenied, ServerTooOld: the server does not let us.
            ClusterClientRequired: it is a node of a cluster, and the URL or client given is not.
            ConfigConflict: `notify-keyspace-events` is insufficient, and may not be overridden.
            KeyspaceSetupFailed: the server refuses the subscription.
            ReplyError: the server says something else, such as LOADING or READONLY.
            ProtocolError: what answers is no Redis.
            ClientClosed: it was called before, or the client was closed.
            UsageError: the client was used in another event loop, or opened in another process.
        """
        self._loop.check_process()
        if self._opened:
            before = "init() was called before" if self._closing is None else "it was closed"
            raise ClientClosed(f"{before}: make a new StreamClient")
        self._loop.check()
        self._home = asyncio.get_running_loop()
        self._opened = True
        try:
            for part in self._partitions:
                server = await part.link.get()
                if server.clustered and not isinstance(self._guide, SlotTable):
                    raise ClusterClientRequired(
                        f"{part.link.endpoint} is a node of a cluster, which has only some of the "
                        "keys: give redis+cluster://host:port, or a RedisCluster"
                    )
                await probe_permissions(self._commands, part.names, self._consumer)
                self._keep_together(await keys_together(self._commands, part.names))
                await part.create_group()
                await part.clock.refresh()
            await self._set_up_events()
            evict = await evicting(self._commands, config=not self._warned_of_config)
            self._warn_of_eviction(evict)
            self._start("renewer", self._renewer.run())
            # A consumer that can't renew must not take anything. Last, so that its end is noticed.
            await self._renewer.opened()
            if self._closing is not None:
                raise ClientClosed(CLOSED_MEANWHILE)
        except BaseException as error:
            await cancel_and_wait(self._tasks)
            await self._close_links()
            if self._closing is not None and isinstance(error, RelstreamError):
                raise ClientClosed(CLOSED_MEANWHILE) from None
            raise
        self._ready = True
        self._health.start()
        self._start("unrenewed leases", self._unrenewed.run())
        self._start("twins", self._twins.run())
        self._start("events", self._events.run())
        if isinstance(self._guide, SentinelMaster):
            self._start("sentinel", self._guide.run())
        for part in self._partitions:
            self._start("completer", part.completer.run(), part)
            self._start("fetcher", part.fetcher.run(), part)
            self._start("audit", part.audit_for_ever(), part)
            self._start("recovery", part.recoverer.run(), part)
        return self._notifications

    async def _set_up_events(self) -> None:
        """Expiry events that are refused for now are tried again later; all else goes on."""
        try:
            await self._events.set_up()
        except ReplyError as error:
            if not error.transient:
                raise
            self._logger.warning(
                "no expiry events for now, trying again: %s; until then dead consumers are found "
                "by probes and scans, a little later", error,
            )  # fmt: skip

    def _keep_together(self, together: bool) -> None:
        """Whether one command may have keys of several slots."""
        if self._commands.together and not together:
            self._logger.warning(
                "this server refuses commands with keys of several slots (CROSSSLOT): locks and "
                "entries are seen to one by one, as on a cluster"
            )
            for topology in (self._commands, self._recovering, self._leading, *self._reads):
                topology.together = False
            self._renewer.together = False

    async def __aenter__(self) -> Notifications:
        return await self.init()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes, as `aclose` does. Raises `ClientTerminated` if the client ended by a failure.

        An exception that is no cancellation fails the stream that was notified last: in a loop that
        works on one stream after another that one is the poison. `ClientTerminated` never takes the
        place of an exception, or a cancellation, that is on its way.

        In a process that was forked meanwhile it does nothing: the client is the parent's.
        """
        if self._loop.forked and exc_type is not None:
            return
        await self._close(finish=False, failure=exc if isinstance(exc, Exception) else None)
        if exc_type is None and self._reason is not None:
            raise ClientTerminated(self._reason) from self._failure

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
        """No part ends unnoticed: without one of them the whole can't keep its word."""
        consume_exception(task)
        name, _ = self._tasks.pop(task)
        if self._loop.forked or self._closing is not None or self._terminated or not self._ready:
            return
        self._terminated = True
        error = None if task.cancelled() else task.exception()
        reason = f"{name} was cancelled" if task.cancelled() else f"{name} ended"
        if error is not None:
            reason = f"{name} failed: {error}"
        self._reason, self._failure = reason, error
        unforeseen = error is not None and not isinstance(error, RelstreamError)
        self._logger.error("the client ends: %s", reason, exc_info=error if unforeseen else None)
        self._health.failed(reason)
        self._notifications.end(reason)
        if self._recorder is not None:
            self._recorder.terminated(reason=reason)
        for other, (name, _) in list(self._tasks.items()):
            # What the application was told of stays owned, and can be finished, until it closes.
            if name not in ("renewer", "completer"):
                other.cancel()
        for part in self._partitions:
            for head in part.leases.all():
                if not head.delivered and not head.finishing:
                    # What could not be handed over is recovered by others.
                    part.completer.release(head).add_done_callback(consume_exception)

    async def aclose(self) -> None:
        """Hands all owned streams over, without counting a retry, and closes.

        When it returns, no task, connection, subscription or lock is left, and nothing more is
        delivered to this consumer. It takes 10 s at most: if Redis can't be reached for that long,
        what is owned is left to be recovered. May be called several times; does not raise for a
        server that is gone, only `UsageError` in another event loop than that of `init`.
        """
        await self._close(finish=False)

    async def done(self) -> None:
        """`done_stream` for all streams the application was told of, then `aclose`.

        Streams that still wait in the queue are handed over: nobody has worked on them.

        Raises, once it is closed, what kept streams from being finished: they will be recovered,
        and done again; `ClientClosed` if `aclose` was called before, which has handed them over.
        """
        began = self._closing is None
        if self._ready and not began and not self._finishing:
            await self.aclose()
            raise ClientClosed("aclose() was called before: what was owned was handed over")
        error = await self._close(finish=True)
        if began and error is not None:
            raise error

    async def _close(
        self, *, finish: bool, failure: Exception | None = None
    ) -> RelstreamError | None:
        self._loop.check()
        self._opened = True  # from here on it is too late to open it
        if self._closing is None:
            self._finishing = finish
            self._closing = asyncio.ensure_future(self._shut_down(finish, failure))
            self._closing.set_name(CLOSING)
        # Whoever stops waiting does not stop the closing; it is bounded in time.
        return await asyncio.shield(self._closing)

    async def _shut_down(
        self, finish: bool, application_failed: Exception | None
    ) -> RelstreamError | None:
        """Closes; returns what kept streams from being finished, or handed over.

        If the application failed, so did the stream that it was notified of last.
        """
        self._notifications.end("closed")
        self._health.closing()
        failure: RelstreamError | None = None
        try:
            if self._ready:
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
            await asyncio.gather(*(part.close() for part in self._partitions))
            for part in self._partitions:  # not handed over
                part.leases.drop(part.leases.all(), "lost")
            await self._close_links()
            self._health.stop()
        if failure is not None:
            self._logger.warning(
                "not everything could be %s before closing, it will be recovered: %s",
                "finished" if finish else "handed over", failure,
            )  # fmt: skip
        return failure

    def _fail_last(self, error: Exception) -> None:
        head = self._notifications.last_added
        if head is None:
            return
        part = self._part(head.data_stream_name)
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
            *(self._give_up(part, finish) for part in self._partitions), return_exceptions=True
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
        fetcher = self._running("fetcher", part)
        if fetcher is not None:
            await part.fetcher.stop()
            await asyncio.wait({fetcher})
        if self._running("completer", part) is None:  # cancelled with all else, say by asyncio.run
            self._start("completer", part.completer.run(), part)
            await asyncio.sleep(0)  # it is not running yet
        ending = []
        for head in part.leases.all():
            if not head.finishing:
                worked_on = finish and head.delivered
                ending.append((part.completer.done if worked_on else part.completer.release)(head))
        outcomes = await asyncio.gather(*ending, return_exceptions=True)
        await part.completer.idle()  # what the application has asked for before
        await part.wait_until_idle()
        await part.completer.tidy()
        # Read by this consumer but not owned: a reply that got lost, a lock that was refused.
        await part.fetcher.leave()
        with contextlib.suppress(ReplyError):  # the group is gone, say, and nothing is pending
            await part.recoverer.hand_back(await part.audit())
        if self._twins.other is None:
            await part.group.leave()
        if recovery is not None:
            await part.recoverer.resign()
        for outcome in outcomes:
            if isinstance(outcome, RelstreamError) and not isinstance(outcome, StreamNotOwned):
                raise outcome

    async def _close_links(self) -> None:
        await asyncio.gather(
            self._events.close(),
            self._recovering.close(),
            self._leading.close(),
            *(reads.close() for reads in self._reads),
            self._commands.close(),
        )

    # --- streams ------------------------------------------------------------------------------

    async def done_stream(self, stream: str | LBSInfo) -> None:
        """Processing is finished: acknowledges and deletes the LBS entry, then releases the lock.

        `stream` is its name, or better the `payload` of its STREAM_ADDED: then a worker that went
        on while the stream was lost, and came back to this consumer, can't finish it for the next.

        Finishes all entries by which the stream was announced while it was owned. Calls made at the
        same time share their commands. When it is cancelled the stream is finished all the same.

        Raises:
            StreamNotOwned: it is not owned, was lost, or is owned by an announcement that the
                application was not told of yet; nothing of its new owner's is touched.
            ConnectionFailed: Redis could not be reached in as many tries as `retry` allows; the
                stream is still owned.
            ReplyError: the server refuses; the stream is still owned.
            ClientClosed: the client is closed, or was before the server had answered.
            UsageError: this is another event loop than that of `init`; nothing was changed.
        """
        if self._loop.forked or asyncio.get_running_loop() is not self._home:
            self._check_open()
        part = self._only or self._part(stream)
        try:
            head = part.leases.get(stream)
        except TypeError:  # it can't be looked up
            head = None
        if head is None or head.finishing or not head.delivered or self._closing is not None:
            head = self._told(stream)
        await part.completer.done(head)

    async def release(self, stream: str | LBSInfo) -> None:
        """Hands a stream over to another consumer (or to this one again), counting no retry.

        Takes what `done_stream` does, and raises as it does.
        """
        await self._part(stream).completer.release(self._told(stream))

    async def fail(
        self,
        stream: str | LBSInfo,
        error: BaseException | str | None = None,
        *,
        delay: float | None = None,
    ) -> None:
        """The work on a stream failed: it comes back later, or becomes a dead letter.

        Its retry count grows by one. Beyond `recovery.max_retries` it becomes a dead letter (reason
        `max_retries_exceeded`); else it is delivered again, once, after `delay` seconds (None: as
        `recovery.retry_delay` has it; 0: at once). `error` is stored with it: its text, cut at
        1 KB, and its type. Takes streams as `done_stream` does, and what else announced this one
        while it was owned is finished. Calls made at the same time share their commands.

        Raises:
            InvalidOption: `delay` is no number of seconds from 0 to 30 days.
            StreamNotOwned, ConnectionFailed, ReplyError, ClientClosed: as `done_stream`.
        """
        check_delay(delay)
        head = self._told(stream)
        part = self._part(stream)
        await part.completer.fail(head, part.failures.failed(head, error, delay))

    async def reject(self, stream: str | LBSInfo, error: BaseException | str | None = None) -> None:
        """A stream shall not be delivered again: it becomes a dead letter (reason `rejected`).

        Otherwise as `fail`; its retry count stays as it is.
        """
        head = self._told(stream)
        part = self._part(stream)
        await part.completer.fail(head, part.failures.rejected(head, error))

    def owned(self) -> Iterator[OwnedStream]:
        """The streams that this consumer owns at the moment of the call, of all partitions.

        Those whose `STREAM_ADDED` still waits are among them; those that are being finished or
        handed over are not. 100,000 take less than 50 ms.
        """
        return OwnedStreams(OwnedStream, [part.leases.table for part in self._partitions])

    def is_owned(self, stream: str | LBSInfo) -> bool:
        """Whether the application may work on this stream now; by this consumer's own clock.

        True while the stream was notified, is neither being finished nor handed over, nor lost as
        far as is known, and its lease has not ended, whether Redis can be reached or not. With the
        `payload` of its STREAM_ADDED: is owned under that fencing token. Does no I/O.

        Raises:
            InvalidOption: `stream` is neither a name nor an LBSInfo.
        """
        name = _name_of(stream)
        token = stream.id_in_lbs if isinstance(stream, LBSInfo) else None
        return holds(self._part(name).leases.get(name), token, time.monotonic())

    def health(self) -> Health:
        """How this consumer is: for probes of its liveness and readiness, and for operators.

        Does no I/O. May be called from any thread, which a probe should do: one on the event loop
        can't find out that this is blocked.
        """
        return self._health.health()

    async def pause(self) -> None:
        """Reads nothing new, from when it returns until `resume`.

        Owned streams go on, and what was read before is notified. May be called several times.

        Raises:
            ClientClosed: the client is not open.
            UsageError: it is open in another event loop.
        """
        self._check_open()
        self._loop.check()
        await self._pausing.pause()

    def resume(self) -> None:
        """Reads again after `pause` or `drain`. May be called several times.

        Raises:
            ClientClosed: the client is not open.
        """
        self._check_open()
        self._pausing.resume()

    async def drain(self, timeout: float | None = None) -> bool:
        """Pauses reading, and waits until no stream is owned any more, or waits to be notified.

        The application goes on to take notifications and to finish its streams. Returns False when
        that has taken more than `timeout` seconds (None: for ever). Reading stays paused, also when
        this is cancelled. When the client closes meanwhile, returns once it is closed.

        Raises:
            InvalidOption: `timeout` is neither None nor a number of seconds from 0 to 30 days.
            ClientClosed: the client was never open.
            UsageError: it is open in another event loop.
        """
        if timeout is not None:
            check_seconds("timeout", timeout, 0.0, LONGEST_WAIT)
        if self._closing is None:
            self._check_open()
        self._loop.check()
        return await self._pausing.drain(
            timeout, lambda: self._closing is not None and self._closing.done()
        )

    async def claim(self, lbs_info: LBSInfo) -> None:
        """Puts an expired stream back for redistribution; grants no ownership.

        Its retry count grows by one, and beyond `recovery.max_retries` it becomes a dead letter.

        Raises:
            AlreadyClaimed: its lock is held, or another consumer was first, or it is finished; or
                the entry of this id announces another stream.
            InvalidOption: `lbs_info` has no name of a stream, or no id of an entry.
            ConnectionFailed, ReplyError: nothing was changed, as far as is known.
            ClientClosed: the client is closed.
            UsageError: this is another event loop than that of `init`; nothing was changed.
        """
        self._check_open()
        if not isinstance(lbs_info, LBSInfo):
            raise InvalidOption("lbs_info", lbs_info, "an LBSInfo")
        await self._part(lbs_info.data_stream_name).recoverer.claim(lbs_info)

    async def reset_topology(self) -> None:
        """Redis Cluster: switches expiry events on and subscribes anew, on the masters of today.

        A client notices by itself what happens to a cluster; this forces it, say after somebody
        changed the servers' settings. May be called at any time, from many places at once. Nothing
        to do on a single shard.

        Raises:
            ClusterNotSettled: a node says that the cluster is not ok, or they do not agree on who
                serves its slots (CLUSTER INFO, CLUSTER SLOTS); nothing was changed.
            ConfigConflict: a master's `notify-keyspace-events` may not be overridden.
            KeyspaceSetupFailed: on no master events could be set up.
            ConnectionFailed: no node can be reached.
            ClientClosed: the client is closed.
            UsageError: this is another event loop than that of `init`; nothing was changed.
        """
        self._check_open()
        success = False
        try:
            await self._events.reset()
            success = True
        finally:
            if self._recorder is not None:
                self._recorder.topology_reset(success=success)

    async def reinit_topology(self) -> None:
        """`reset_topology`, by the reference's newer name."""
        await self.reset_topology()

    def _check_open(self) -> None:
        """Raises `ClientClosed`, or `UsageError` in another event loop than that of `init`."""
        self._loop.check_process()
        if not self._ready or self._closing is not None:
            raise ClientClosed("the client is not open: call init() first, and not after closing")
        self._loop.check()

    def _told(self, stream: str | LBSInfo) -> Entry:
        """The first entry of an owned stream that the application knows of."""
        self._check_open()
        name = _name_of(stream)
        head = self._part(name).leases.get(name)
        if head is None:
            why = "is not owned by this consumer"
        elif head.finishing:
            why = "is being finished or handed over already"
        elif not head.delivered:
            why = "was lost; that it is owned again waits to be told"
        elif isinstance(stream, LBSInfo) and all(
            stream.id_in_lbs != entry.id_in_lbs for entry in (head, *(head.again or ()))
        ):
            why = f"was lost as {stream.id_in_lbs}; it is owned again as {head.id_in_lbs}"
        else:
            return head
        raise StreamNotOwned(name, why)

    # --- what happens -------------------------------------------------------------------------

    def _delivered(self, entry: Entry) -> None:
        assert self._recorder is not None
        self._recorder.stream_processing_start(stream=entry.data_stream_name)

    def _part(self, stream: str | LBSInfo) -> Partition:
        if self._only is not None:
            return self._only
        return self._partitions[partition_of(_name_of(stream), len(self._partitions))]

    def _owned(self) -> int:
        return sum(len(part.leases) for part in self._partitions)

    def _locks_lost(self, keys: list[bytes]) -> None:
        lost: dict[Partition, list[bytes]] = {}
        for key in keys:
            parts = split_lock_key(key)
            if parts is not None:
                lost.setdefault(self._part(parts[0]), []).append(key)
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
        part = self._part(payload.data_stream_name)
        part.recoverer.expired(payload)
        told = self._notifications.expired(payload, part.leases.by_lock(lock_key(*payload)))
        if self._recorder is not None:
            self._recorder.keyspace_notification_received(stream=payload.data_stream_name)
            if not told:
                self._recorder.keyspace_notification_dropped()


def _name_of(stream: str | LBSInfo) -> str:
    name = stream.data_stream_name if isinstance(stream, LBSInfo) else stream
    if not isinstance(name, str):
        raise InvalidOption("stream", stream, "the name of a data stream, or an LBSInfo")
    return name


def _consumer_name(consumer_id: str | None) -> str:
    if consumer_id is not None:
        check_name("consumer_id", consumer_id)
        return consumer_id
    pod = os.environ.get("POD_NAME") or os.environ.get("POD_IP")
    if not pod:
        raise ConsumerIdMissing(
            "a consumer needs a name of its own: pass consumer_id, or set POD_NAME or POD_IP in "
            "the environment"
        )
    check_name("POD_NAME or POD_IP", pod)
    return f"redis-consumer-{pod}"
