"""`StreamClient`: the options, promises and errors of one consumer."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

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
from relstream.engine.engine import Engine
from relstream.engine.health import Health
from relstream.engine.partition import Partition
from relstream.engine.settings import Settings
from relstream.errors import (
    ClientClosed,
    ClientTerminated,
    ClusterClientRequired,
    ConsumerIdMissing,
    InvalidOption,
    StreamNotOwned,
)
from relstream.lbs.failures import check_delay
from relstream.lbs.names import Names
from relstream.net.deployment import deployment_of
from relstream.notifications import LBSInfo, Notifications
from relstream.ownership.leases import OwnedStream
from relstream.recorder import Recorder, SafeRecorder, is_recorder

if TYPE_CHECKING:
    import redis.asyncio

    from relstream._core import Entry

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
        logger = logger or logging.getLogger("relstream")
        if heartbeat_interval > LONG_HEARTBEAT:
            logger.warning(
                "heartbeat_interval=%g is in seconds: streams of a dead consumer come back no "
                "earlier than %g s after its last renewal; if it was meant in milliseconds, divide "
                "it by 1000",
                heartbeat_interval, heartbeat_interval,
            )  # fmt: skip
        settings = Settings(
            consumer=self._consumer,
            heartbeat=float(heartbeat_interval),
            queue_size=queue_size,
            max_streams=max_streams,
            retry=retry,
            patience=patience,
            recovery=recovery,
            auto_claim=auto_claim,
            force_config_override=force_config_override,
            renew_in_thread=renew_in_thread,
        )
        safe = None if recorder is None else SafeRecorder(recorder, logger.warning)
        self._engine = Engine(deployment, names, settings, safe, logger)

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
        await self._engine.open()
        return self._engine.notifications

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
        engine = self._engine
        if engine.loop.forked and exc_type is not None:
            return
        await engine.close(finish=False, failure=exc if isinstance(exc, Exception) else None)
        if exc_type is None and engine.reason is not None:
            raise ClientTerminated(engine.reason) from engine.failure

    async def aclose(self) -> None:
        """Hands all owned streams over, without counting a retry, and closes.

        When it returns, no task, connection, subscription or lock is left, and nothing more is
        delivered to this consumer. It takes 10 s at most: if Redis can't be reached for that long,
        what is owned is left to be recovered. May be called several times; does not raise for a
        server that is gone, only `UsageError` in another event loop than that of `init`.
        """
        await self._engine.close(finish=False)

    async def done(self) -> None:
        """`done_stream` for all streams the application was told of, then `aclose`.

        Streams that still wait in the queue are handed over: nobody has worked on them.

        Raises, once it is closed, what kept streams from being finished: they will be recovered,
        and done again; `ClientClosed` if `aclose` was called before, which has handed them over.
        """
        engine = self._engine
        began = engine.closing is None
        if engine.was_open and not began and not engine.finishing:
            await self.aclose()
            raise ClientClosed("aclose() was called before: what was owned was handed over")
        error = await engine.close(finish=True)
        if began and error is not None:
            raise error

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
        engine = self._engine
        if engine.loop.forked or asyncio.get_running_loop() is not engine.home:
            engine.check_usable()
        part = engine.only or self._part(stream)
        try:
            head = part.leases.get(stream)
        except TypeError:  # it can't be looked up
            head = None
        if head is None or head.finishing or not head.delivered or engine.closing is not None:
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
        return OwnedStreams(OwnedStream, [part.leases.table for part in self._engine.partitions])

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
        return self._engine.health.health()

    async def pause(self) -> None:
        """Reads nothing new, from when it returns until `resume`.

        Owned streams go on, and what was read before is notified. May be called several times.

        Raises:
            ClientClosed: the client is not open.
            UsageError: it is open in another event loop.
        """
        self._engine.check_usable()
        await self._engine.pausing.pause()

    def resume(self) -> None:
        """Reads again after `pause` or `drain`. May be called several times.

        Raises:
            ClientClosed: the client is not open.
        """
        self._engine.check_usable()
        self._engine.pausing.resume()

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
        engine = self._engine
        if engine.closing is None:
            engine.check_usable()
        engine.loop.check()
        return await engine.pausing.drain(
            timeout, lambda: engine.closing is not None and engine.closing.done()
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
        self._engine.check_usable()
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
        self._engine.check_usable()
        await self._engine.reset_topology()

    async def reinit_topology(self) -> None:
        """`reset_topology`, by the reference's newer name."""
        await self.reset_topology()

    def _told(self, stream: str | LBSInfo) -> Entry:
        """The first entry of an owned stream that the application knows of."""
        self._engine.check_usable()
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

    def _part(self, stream: str | LBSInfo) -> Partition:
        return self._engine.only or self._engine.part(_name_of(stream))


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
