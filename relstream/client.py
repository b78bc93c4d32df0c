"""`StreamClient`: what an application holds in its hands, and the life of what stands behind it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from relstream.config import (
    ClusterMode,
    RecoveryConfig,
    RetryConfig,
    check_count,
    check_flag,
    check_name,
    check_seconds,
)
from relstream.errors import (
    ClientClosed,
    ClusterClientRequired,
    ConsumerIdMissing,
    InvalidOption,
    PermissionDenied,
    RelstreamError,
    ReplyError,
    StreamNotOwned,
)
from relstream.finish import Finisher
from relstream.intake import Intake
from relstream.keyspace import ClusterEvents, ExpiryEvents
from relstream.lbs import Names
from relstream.leases import Keeper, Leases, Locks
from relstream.net.topology import SlotTable, deployment_of
from relstream.notifications import LBSInfo, Notifications
from relstream.recorder import Recorder, SafeRecorder
from relstream.recovery import Recoverer
from relstream.rights import check_rights

if TYPE_CHECKING:
    import redis.asyncio

    from relstream._core import Entry
    from relstream.net.connection import Endpoint

__all__ = ["StreamClient"]

# Seconds that closing may take; what has not been handed over by then expires by itself.
CLOSE_TIMEOUT = 10.0
# Seconds for which a client waits for a lost master to be replaced, however few retries it has.
FAILOVER_TIMEOUT = 60.0


class StreamClient:
    """One consumer of a service: owns data streams, and tells the application which.

    ::

        client = StreamClient("redis://localhost", "calls", consumer_id="worker-1")
        async with client as notifications:
            async for notification in notifications:
                if notification.type is NotificationType.STREAM_ADDED:
                    ...

    Args:
        redis: a URL (redis://, rediss://, unix://; redis+cluster://host:port,host:port;
            redis+sentinel://host:port,host:port/name-of-master/db; rediss+… with TLS) or a ready
            `redis.asyncio` client (`Redis`, `RedisCluster`, or one that `Sentinel.master_for`
            made), of which addresses, credentials, TLS and database are taken over; its
            connections are not used.
        service_name: names the load balancer stream, `<service>-input`, and its group.
        consumer_id: this consumer's name, as it is. Without it `redis-consumer-` and POD_NAME, else
            POD_IP, of the environment. Two living consumers must never share one.
        heartbeat_interval: the locks' time to live, in seconds; they are renewed twice in it.
        queue_size: added streams that may wait for the application, and as many expiry events.
        max_streams: how many streams this consumer owns at most; None: no limit.
        retry: how often a failing read is tried again before the client ends. Of a Redis Cluster
            and behind Sentinel a lost master is waited for, for 60 s, unless `max_retries` is 0.
        recovery: how streams of dead consumers come back.
        auto_claim: whether this consumer helps to recover streams whose locks expired.
        cluster_mode: OSS insists on a Redis Cluster; one is recognised without it.
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
        self._names = Names.of(service_name, recovery.dlq_stream)
        self._consumer = _consumer_name(consumer_id)
        deployment = deployment_of(redis)
        if cluster_mode is ClusterMode.OSS and not deployment.nodes:
            raise ClusterClientRequired(
                "cluster_mode=OSS needs a redis.asyncio.RedisCluster or a URL redis+cluster://, "
                f"got {type(redis).__name__}"
            )
        if deployment.heals and retry.max_retries:
            # A lost master is replaced, which takes longer than most retries, and is not to be
            # missed once it has happened.
            patience = FAILOVER_TIMEOUT
            retry = replace(retry, max_delay=max(min(retry.max_delay, 0.5), retry.initial_delay))
        else:
            patience = 0.0
        self._heartbeat = float(heartbeat_interval)
        self._logger = logger or logging.getLogger("relstream")
        self._recorder = None if recorder is None else SafeRecorder(recorder, self._logger.warning)
        self._notifications = Notifications(
            queue_size, self._delivered if self._recorder is not None else None
        )
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._opened = False
        self._ready = False
        self._terminated = False
        self._closing: asyncio.Task[None] | None = None
        slots = SlotTable(deployment) if deployment.nodes else None
        self._commands = deployment.open(f"{self._consumer}:command", slots)
        self._link = self._commands.link(self._names.lbs)
        self._reads = deployment.open(f"{self._consumer}:read", slots)
        self._reading = self._reads.link(self._names.lbs)
        self._recovering = deployment.open(f"{self._consumer}:recover", slots)

        def events_of(master: Endpoint) -> ExpiryEvents:
            role = f"{self._consumer}:events"
            return ExpiryEvents(
                lambda on_push: replace(deployment, endpoint=master).link(role, on_push),
                force_config_override=force_config_override,
                on_expired=self._expired,
                recorder=self._recorder,
                logger=self._logger,
            )

        self._events: ExpiryEvents | ClusterEvents = (
            events_of(deployment.endpoint)
            if slots is None
            else ClusterEvents(slots, events_of, self._logger)
        )
        self._keeper = Keeper(
            deployment,
            self._names,
            self._consumer,
            self._heartbeat,
            on_lost=self._locks_lost,
            logger=self._logger,
            recorder=self._recorder,
            threaded=renew_in_thread,
        )
        locks = Locks(self._commands, self._consumer, round(self._heartbeat * 1000), self._logger)
        self._leases = Leases(
            self._link,
            locks,
            self._names,
            self._consumer,
            recovered_after=min(self._heartbeat, recovery.min_idle_time),
            keeper=self._keeper,
            on_drop=self._notifications.room_made.set,
            recorder=self._recorder,
        )
        self._finisher = Finisher(
            self._commands,
            locks,
            self._names,
            self._consumer,
            self._leases,
            self._keeper,
            retry=retry,
            patience=patience,
            on_lost=self._disown,
            recorder=self._recorder,
            logger=self._logger,
        )
        self._recoverer = Recoverer(
            self._recovering,
            self._names,
            self._consumer,
            heartbeat=self._heartbeat,
            recovery=recovery,
            auto_claim=auto_claim,
            recorder=self._recorder,
            logger=self._logger,
        )
        self._intake = Intake(
            self._reading,
            self._commands,
            self._names,
            self._consumer,
            notifications=self._notifications,
            owned=self._leases.__len__,
            take=self._leases.take,
            strays=self._audit_now,
            hand_back=self._recoverer.hand_back,
            max_streams=max_streams,
            retry=retry,
            patience=patience,
            recovery=recovery,
            recorder=self._recorder,
            logger=self._logger,
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
            ConfigConflict: `notify-keyspace-events` is insufficient, and may not be overridden.
            KeyspaceSetupFailed: the server refuses the subscription.
            ReplyError: the server says something else, such as LOADING or READONLY.
            ProtocolError: what answers is no Redis.
            ClientClosed: it was called before.
        """
        if self._opened:
            raise ClientClosed("init() was called before: make a new StreamClient")
        self._opened = True
        try:
            await self._link.get()
            await check_rights(self._commands, self._names, self._consumer)
            await self._create_group()
            await self._events.set_up()
        except BaseException:
            await self._close_links()
            raise
        self._ready = True
        self._start("keeper", self._keeper.run())
        self._start("finisher", self._finisher.run())
        self._start("events", self._events.run())
        self._start("intake", self._intake.run())
        self._start("audit", self._audit_for_ever())
        self._start("recovery", self._recoverer.run())
        return self._notifications

    async def _create_group(self) -> None:
        try:
            await self._intake.create_group()
        except ReplyError as error:
            if error.code == "NOPERM":
                raise PermissionDenied(
                    f"the user may not create the consumer group ({error}): grant +xgroup"
                ) from None
            if error.code == "WRONGTYPE":
                raise ReplyError(
                    f"{error}: {self._names.lbs.decode()!r} exists and is no stream; remove it, or "
                    "choose another service_name"
                ) from None
            if error.code == "OOM":
                lbs = self._names.lbs.decode()
                raise ReplyError(
                    f"{error} So the consumer group of {lbs!r} can't be created"
                ) from None
            if error.code == "READONLY":
                raise ReplyError(
                    f"{error} {self._link.endpoint} is a replica: give the address of its master"
                ) from None
            raise

    async def __aenter__(self) -> Notifications:
        return await self.init()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        task.set_name(f"relstream-{name}")
        self._tasks[task] = name
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """No part ends unnoticed: without one of them the whole can't keep its word."""
        name = self._tasks.pop(task)
        if self._closing is not None or self._terminated:
            return
        self._terminated = True
        error = None if task.cancelled() else task.exception()
        reason = f"{name} was cancelled" if task.cancelled() else f"{name} ended"
        if error is not None:
            reason = f"{name} failed: {error}"
        unforeseen = error is not None and not isinstance(error, RelstreamError)
        self._logger.error("the client ends: %s", reason, exc_info=error if unforeseen else None)
        self._notifications.end(reason)
        for other, name in list(self._tasks.items()):
            # What the application was told of stays owned, and can be finished, until it closes.
            if name not in ("keeper", "finisher"):
                other.cancel()
        for head in self._leases.all():
            if not head.delivered and not head.finishing:
                self._finisher.release(head).add_done_callback(_observe)

    async def aclose(self) -> None:
        """Hands all owned streams over, without counting a retry, and closes.

        When it returns, no task, connection, subscription or lock is left, and nothing more is
        delivered to this consumer. It takes 10 s at most: if Redis can't be reached for that long,
        what is owned is left to be recovered. May be called several times; does not raise for a
        server that is gone.
        """
        await self._close(finish=False)

    async def done(self) -> None:
        """`done_stream` for all streams the application was told of, then `aclose`.

        Streams that still wait in the queue are handed over: nobody has worked on them.
        """
        await self._close(finish=True)

    async def _close(self, *, finish: bool) -> None:
        self._opened = True  # from here on it is too late to open it
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._shut_down(finish))
            self._closing.set_name("relstream-close")
        # Whoever stops waiting does not stop the closing; it is bounded in time.
        await asyncio.shield(self._closing)

    async def _shut_down(self, finish: bool) -> None:
        self._notifications.end("closed")
        tasks = {name: task for task, name in self._tasks.items()}
        try:
            if self._ready:
                if "finisher" not in tasks:  # cancelled with all else, say by asyncio.run
                    self._start("finisher", self._finisher.run())
                    tasks = {name: task for task, name in self._tasks.items()}
                await asyncio.wait_for(self._give_up_all(tasks, finish), CLOSE_TIMEOUT)
        except (asyncio.TimeoutError, RelstreamError) as error:
            self._logger.warning(
                "not everything could be handed over before closing, it will be recovered: %s",
                str(error) or f"it took over {CLOSE_TIMEOUT} s",
            )
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            await self._close_links()

    async def _give_up_all(self, tasks: dict[str, asyncio.Task[None]], finish: bool) -> None:
        for name in ("audit", "events", "recovery"):
            if name in tasks:
                tasks[name].cancel()
        if "intake" in tasks:
            await self._intake.stop()
            await asyncio.wait({tasks["intake"]})
        await asyncio.sleep(0)  # a finisher just started is not running yet
        ending = []
        for head in self._leases.all():
            if not head.finishing:
                worked_on = finish and head.delivered
                ending.append((self._finisher.done if worked_on else self._finisher.release)(head))
        outcomes = await asyncio.gather(*ending, return_exceptions=True)
        await self._finisher.idle()  # what the application has asked for before
        # Read by this consumer but not owned: a reply that got lost, a lock that was refused.
        await self._recoverer.hand_back(await self._audit_now())
        if "recovery" in tasks:
            await self._recoverer.resign()
        for outcome in outcomes:
            if isinstance(outcome, RelstreamError) and not isinstance(outcome, StreamNotOwned):
                raise outcome

    async def _close_links(self) -> None:
        await asyncio.gather(
            self._events.close(),
            self._recovering.close(),
            self._reads.close(),
            self._commands.close(),
        )

    # --- streams ------------------------------------------------------------------------------

    async def done_stream(self, data_stream_name: str) -> None:
        """Processing is finished: acknowledges and deletes the LBS entry, then releases the lock.

        Finishes all entries by which the stream was announced while it was owned. Calls made at the
        same time share their commands. When it is cancelled the stream is finished all the same.

        Raises:
            StreamNotOwned: it is not owned, or was lost; nothing of its new owner's is touched.
            ConnectionFailed: Redis could not be reached in as many tries as `retry` allows; the
                stream is still owned.
            ReplyError: the server refuses; the stream is still owned.
            ClientClosed: the client is closed, or was before the server had answered.
        """
        head = self._leases.get(data_stream_name)
        if head is None or head.finishing or self._closing is not None:
            self._refuse(data_stream_name, head)
        await self._finisher.done(head)

    async def release(self, data_stream_name: str) -> None:
        """Hands a stream over to another consumer (or to this one again), counting no retry.

        Raises as `done_stream` does.
        """
        head = self._leases.get(data_stream_name)
        if head is None or head.finishing or self._closing is not None:
            self._refuse(data_stream_name, head)
        await self._finisher.release(head)

    async def claim(self, lbs_info: LBSInfo) -> None:
        """Puts an expired stream back for redistribution; grants no ownership.

        Its retry count grows by one, and beyond `recovery.max_retries` it becomes a dead letter.

        Raises:
            AlreadyClaimed: its lock is held, or another consumer was first, or it is finished.
            InvalidOption: `lbs_info` has no id of an entry.
            ConnectionFailed, ReplyError: nothing was changed, as far as is known.
            ClientClosed: the client is closed.
        """
        self._check_open()
        await self._recoverer.claim(lbs_info)

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
        """
        self._check_open()
        success = False
        try:
            await self._events.reset()
            success = True
        finally:
            if self._recorder is not None:
                self._recorder.topology_reset(success)

    def _check_open(self) -> None:
        if not self._ready or self._closing is not None:
            raise ClientClosed("the client is not open: call init() first, and not after closing")

    def _refuse(self, data_stream_name: str, head: Entry | None) -> NoReturn:
        self._check_open()
        doing = "is not owned by this consumer"
        if head is not None:
            doing = "is being finished or handed over already"
        raise StreamNotOwned(data_stream_name, doing)

    # --- what happens -------------------------------------------------------------------------

    def _delivered(self, entry: Entry) -> None:
        assert self._recorder is not None
        self._recorder.stream_processing_start(entry.data_stream_name)

    def _disown(self, head: Entry) -> None:
        if self._leases.get(head.data_stream_name) is head:
            self._leases.drop([head])
            self._notifications.disowned(head)

    def _locks_lost(self, keys: list[bytes]) -> None:
        """Locks were found expired or taken, and their entries are not ours any more."""
        gone = set(keys)
        lost: list[tuple[Entry, list[Entry]]] = []
        for key in keys:
            head = self._leases.by_lock(key)
            if head is not None and not head.finishing:
                others = [entry for entry in head.again or () if entry.lock_key not in gone]
                if head.lock_key not in gone:
                    others.append(head)
                lost.append((head, others))
                head.finishing = True  # seen
        self._lose(lost)

    def _lose(self, lost: list[tuple[Entry, list[Entry]]]) -> None:
        """Streams are lost, each with one of its entries; its others go back."""
        for head, others in lost:
            self._disown(head)
            self._finisher.abandon(head, others)
        if lost:
            names = [head.data_stream_name for head, _ in lost]
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            self._logger.warning("lost %d streams: %s", len(names), shown)

    def _expired(self, payload: LBSInfo) -> None:
        self._recoverer.expired(payload)
        told = self._notifications.expired(payload)
        if self._recorder is not None:
            self._recorder.keyspace_notification_received(payload.data_stream_name)
            if not told:
                self._recorder.keyspace_notification_dropped()

    async def _audit_now(self) -> list[bytes]:
        return await self._audit(0.0)

    async def _audit(self, min_idle: float) -> list[bytes]:
        lost, strays = await self._leases.audit(min_idle)
        self._lose([(head, [head, *head.again] if head.again else []) for head in lost])
        return strays

    async def _audit_for_ever(self) -> None:
        """Compares, every heartbeat, what is owned with what the server says is pending for us."""
        while True:
            await asyncio.sleep(self._heartbeat)
            try:
                # Younger ones may be on their way to us.
                strays = await self._audit(self._heartbeat)
            except RelstreamError as error:
                self._logger.debug("no audit this time: %s", error)
                continue
            if strays:
                self._intake.adopt(strays)


def _observe(future: asyncio.Future[None]) -> None:
    """What could not be handed over is recovered by others: there is nobody to tell."""
    if not future.cancelled():
        future.exception()


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
