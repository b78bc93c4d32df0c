"""Expiry events: switched on at the server, subscribed to, and told.

https://redis.io/docs/latest/develop/pubsub/keyspace-notifications/
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relstream._core import jittered, pack
from relstream.backoff import Backoff
from relstream.errors import (
    ClientClosed,
    ConfigConflict,
    ConnectionLost,
    KeyspaceSetupFailed,
    ProtocolError,
    RelstreamError,
    ReplyError,
)
from relstream.lbs.names import SEPARATOR, split_lock_key
from relstream.notifications import LBSInfo
from relstream.repeats import Repeats
from relstream.tasks import cancel_and_wait, consume_exception

if TYPE_CHECKING:
    from relstream.net.cluster.slots import SlotTable
    from relstream.net.connection import Connection
    from relstream.net.endpoint import Endpoint
    from relstream.net.protocol import RedisProtocol
    from relstream.recorder import SafeRecorder

SETTING = b"notify-keyspace-events"
# K: events per key; E: per kind of event (the contract asks for both); x: expired keys.
NEEDED = "KEx"
# "A" stands for all of these.
ALL = "g$lshzxetd"
# Seconds between two proofs that the subscription's connection is alive.
PROOF_EVERY = 5.0
# One that breaks sooner, in seconds, is not made anew at once.
SHORT = 1.0
# Seconds between two looks at the slots of a cluster when nothing happens, and when much does.
WATCH_EVERY = 1.5
RESET_PAUSE = 0.1


def merged_flags(current: str) -> str | None:
    """The server's flags with what is needed added; None when they suffice."""
    present = set(current.replace("A", ALL))
    missing = [flag for flag in NEEDED if flag not in present]
    return current + "".join(missing) if missing else None


class ExpiryEvents:
    """The subscription to expired locks on one master."""

    def __init__(
        self,
        link: Callable[[Callable[[Any], None]], Connection],
        *,
        force_config_override: bool,
        on_expired: Callable[[LBSInfo], None],
        on_forbidden: Callable[[ReplyError], None],
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = link(self._on_push)
        self._force = force_config_override
        self._on_expired = on_expired
        self._on_forbidden = on_forbidden
        self._recorder = recorder
        self._logger = logger
        self._prefix = b"__keyspace@%d__:" % self._link.endpoint.db
        self._pattern = self._prefix + b"*" + SEPARATOR + b"*"
        self._subscribed: asyncio.Future[None] | None = None
        self._answered = asyncio.Event()
        # The connection with the subscription, and who is making one.
        self._protocol: RedisProtocol | None = None
        self._setting_up = asyncio.Lock()

    async def set_up(self, *, anew: bool = False) -> None:
        """Switches events on and subscribes, unless that is done; `anew`: even then.

        Raises `ConfigConflict` when the server's setting is insufficient and may not be overridden,
        `KeyspaceSetupFailed` when subscribing is refused, and `ReplyError` when it is for now.
        """
        async with self._setting_up:
            if self._protocol is not None:
                if self._protocol.alive and not anew:
                    return
                self._protocol.abort()
                await asyncio.wait({self._protocol.closed})
                self._protocol = None
            try:
                protocol = await self._link.get()
                await self._configure(protocol)
                await self._subscribe(protocol)
            except BaseException:
                if self._recorder is not None:
                    self._recorder.keyspace_setup(success=False)
                raise
            if self._recorder is not None:
                self._recorder.keyspace_setup(success=True)
            self._protocol = protocol

    async def run(self) -> None:
        """Keeps the subscription, through reconnects, until cancelled."""
        backoff = Backoff(0.1, 1.0)
        fails = Repeats(f"the subscription to expiry events of {self._link.endpoint}", self._logger)
        while True:
            if self._protocol is not None:
                await self._watch(self._protocol)
            try:
                await self.set_up()
                if not fails.failures:
                    self._logger.info(
                        "expiry events of %s are subscribed to again", self._link.endpoint
                    )
                assert self._protocol is not None
                if (await asyncio.wait({self._protocol.closed}, timeout=SHORT))[0]:
                    raise ConnectionLost("the connection broke right after it was subscribed")
            except RelstreamError as error:
                fails.failed(
                    "no expiry events from %s for now, trying again: %s",
                    self._link.endpoint, error,
                )  # fmt: skip
                await asyncio.sleep(backoff.failed())
                continue
            backoff.reset()
            fails.worked()

    async def reset(self) -> None:
        """Nothing to do where one server is all there is."""

    async def close(self) -> None:
        """Ends subscription and connection."""
        await self._link.close()

    async def _configure(self, protocol: RedisProtocol) -> None:
        timeout = self._link.endpoint.timeout
        (reply,) = await protocol.send(pack(b"CONFIG", b"GET", SETTING), timeout=timeout)
        if isinstance(reply, ReplyError):
            self._forbidden(reply)
            return
        match list(reply.items()) if isinstance(reply, dict) else [reply] if reply else []:
            case []:
                current = ""
            case [[_, bytes(value)]]:
                current = value.decode(errors="replace")
            case _:
                raise ProtocolError(f"{reply!r:.80} answers CONFIG GET {SETTING.decode()}")
        flags = merged_flags(current)
        if flags is None:
            return
        if current and not self._force:
            raise ConfigConflict(
                f"{SETTING.decode()} is {current!r} on {self._link.endpoint}, expiry events need "
                f"{NEEDED}: set it to {flags!r}, or allow that with force_config_override=True"
            )
        (reply,) = await protocol.send(pack(b"CONFIG", b"SET", SETTING, flags), timeout=timeout)
        if isinstance(reply, ReplyError):
            self._forbidden(reply)

    def _forbidden(self, reply: ReplyError) -> None:
        """Managed services have no CONFIG: then events come if they were switched on there."""
        if reply.transient:
            raise reply
        self._on_forbidden(reply)

    async def _subscribe(self, protocol: RedisProtocol) -> None:
        loop = asyncio.get_running_loop()
        self._subscribed = loop.create_future()
        protocol.replies_are_pushes = True
        protocol.post(pack(b"PSUBSCRIBE", self._pattern))
        waiting = {self._subscribed, protocol.closed}
        await asyncio.wait(
            waiting, timeout=self._link.endpoint.timeout, return_when=asyncio.FIRST_COMPLETED
        )
        if not self._subscribed.done():
            self._subscribed.cancel()
            if not protocol.alive:
                raise ConnectionLost("the connection broke while subscribing to expiry events")
            protocol.abort()
            raise KeyspaceSetupFailed("PSUBSCRIBE was not confirmed in time")
        try:
            self._subscribed.result()
        except ReplyError as error:
            protocol.abort()
            if error.transient:  # out of memory, say
                raise
            raise KeyspaceSetupFailed(
                f"{self._link.endpoint} refused to tell of expired locks ({error}): grant that by "
                f"ACL SETUSER {self._link.endpoint.user} +psubscribe &{self._pattern.decode()}"
            ) from None

    async def _watch(self, protocol: RedisProtocol) -> None:
        """Returns when the connection is dead; proves every now and then that it is not."""
        while protocol.alive:
            self._answered.clear()
            # Changes nothing, is answered always, and no right is needed but the one there is: PING
            # may be forbidden, and each denial is a line in the server's ACL log.
            protocol.post(pack(b"PSUBSCRIBE", self._pattern))
            await asyncio.wait({protocol.closed}, timeout=PROOF_EVERY)
            if protocol.alive and not self._answered.is_set():
                # An application that blocked the loop made us late: what arrived is read first.
                await asyncio.wait({protocol.closed}, timeout=self._link.endpoint.timeout)
                if not self._answered.is_set():
                    protocol.abort()

    def _on_push(self, message: Any) -> None:
        """A pub/sub message: a push frame under RESP3, a plain reply under RESP2."""
        self._answered.set()  # whatever it is, the connection lives
        if isinstance(message, ReplyError):
            if self._subscribed is not None and not self._subscribed.done():
                self._subscribed.set_exception(message)
            return
        if not isinstance(message, list) or not message:
            return
        if message[0] == b"psubscribe":
            if self._subscribed is not None and not self._subscribed.done():
                self._subscribed.set_result(None)
            return
        if message[0] == b"pmessage" and len(message) == 4 and message[3] == b"expired":
            parts = split_lock_key(message[2][len(self._prefix) :])
            if parts is not None:
                self._on_expired(LBSInfo(*parts))


class ClusterEvents:
    """The subscriptions to expired locks on all masters of a cluster, in one flow.

    Follows the masters: looks at the slots whenever there is a reason to, and slowly otherwise.
    """

    def __init__(
        self,
        slots: SlotTable,
        events_of: Callable[[Endpoint], ExpiryEvents],
        logger: logging.Logger,
    ) -> None:
        self._slots = slots
        self._events_of = events_of
        self._logger = logger
        self._events: dict[Endpoint, ExpiryEvents] = {}
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        self._following = asyncio.Lock()
        self._resetting: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def set_up(self) -> None:
        """Switches events on and subscribes, on every master; what fails is tried again later.

        Raises `ConfigConflict` as soon as one master's setting may not be overridden,
        `KeyspaceSetupFailed` when no master could be set up, and `ReplyError` when that is for now.
        """
        await self._slots.refresh()
        await self._follow()
        await self._set_up_all(anew=False)

    async def _set_up_all(self, *, anew: bool) -> None:
        masters = list(self._events)
        outcomes = await asyncio.gather(
            *(self._events[master].set_up(anew=anew) for master in masters), return_exceptions=True
        )
        failures = []
        for_now = [e for e in outcomes if isinstance(e, ReplyError) and e.transient]
        for master, outcome in zip(masters, outcomes, strict=True):
            if isinstance(outcome, ConfigConflict) or (
                isinstance(outcome, BaseException) and not isinstance(outcome, RelstreamError)
            ):
                raise outcome
            if outcome is not None:
                failures.append(f"{master}: {outcome}")
        if for_now and len(for_now) == len(masters):
            raise for_now[0]
        if failures and len(failures) == len(masters):
            # All for the same reason, most likely: the end of the message may be the remedy.
            raise KeyspaceSetupFailed(f"on no master of the cluster, not on {failures[0]}")
        for failure in failures:
            self._logger.warning("no expiry events from a master for now: %s", failure)

    async def run(self) -> None:
        """Keeps exactly one subscription to every master, until cancelled."""
        noticed = self._slots.noticed
        try:
            while True:
                await self._follow()
                for master in self._events.keys() - self._tasks.keys():
                    self._tasks[master] = asyncio.ensure_future(self._events[master].run())
                noticing = asyncio.ensure_future(noticed.wait())
                try:
                    done, _ = await asyncio.wait(
                        {noticing, *self._tasks.values()},
                        timeout=jittered(WATCH_EVERY, 0.2, random.random()),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    noticing.cancel()
                for task in done - {noticing}:
                    if not task.cancelled():  # a reset may just have left that master
                        task.result()
                noticed.clear()
                try:
                    await self._slots.refresh()
                except RelstreamError as error:
                    self._logger.debug("the slots can't be looked at: %s", error)
                if noticing in done:
                    await asyncio.sleep(RESET_PAUSE)
        finally:
            await cancel_and_wait(self._tasks.values())

    async def _follow(self) -> None:
        """Leaves servers that are no masters any more, and turns to new ones."""
        async with self._following:
            masters = self._slots.masters
            for master in self._events.keys() - set(masters):
                self._logger.info("%s is no master any more", master)
                task = self._tasks.get(master)
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})
                await self._events[master].close()
                # Only now: if this is cancelled on the way, `close` sees to the rest.
                self._tasks.pop(master, None)
                del self._events[master]
            for master in masters:
                if master not in self._events:
                    self._events[master] = self._events_of(master)

    async def reset(self) -> None:
        """Subscribes anew on the masters of today; callers that come meanwhile share the next time.

        Raises `ClusterNotSettled`, having changed nothing, while the nodes do not agree.
        """
        if self._next is not None and not self._next.done():  # it has not begun
            resetting = self._next
        elif self._resetting is None or self._resetting.done():
            resetting = self._resetting = asyncio.ensure_future(self._reset(None))
        else:
            # What is under way may have passed by already what this caller knows of.
            resetting = self._next = asyncio.ensure_future(self._reset(self._resetting))
        resetting.add_done_callback(consume_exception)
        await asyncio.wait({resetting})  # whoever stops waiting does not stop the others'
        if resetting.cancelled():
            raise ClientClosed("the client was closed while its subscriptions were made anew")
        resetting.result()

    async def _reset(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
            self._resetting, self._next = self._next, None
        await self._slots.compare_nodes()
        await self._follow()
        await self._set_up_all(anew=True)
        self._slots.noticed.set()

    async def close(self) -> None:
        """Ends all subscriptions and their connections."""
        resets = [task for task in (self._resetting, self._next) if task is not None]
        await cancel_and_wait(resets)
        await asyncio.gather(*(events.close() for events in self._events.values()))
