"""Expiry events: switched on at the server, subscribed to, and told.

https://redis.io/docs/latest/develop/pubsub/keyspace-notifications/
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relstream._core import pack
from relstream.errors import (
    ConfigConflict,
    ConnectionLost,
    KeyspaceSetupFailed,
    RelstreamError,
    ReplyError,
)
from relstream.lbs import SEPARATOR, split_lock_key
from relstream.net.connection import Backoff, Endpoint, Link
from relstream.notifications import LBSInfo

if TYPE_CHECKING:
    from relstream.net.protocol import RedisProtocol
    from relstream.recorder import SafeRecorder

SETTING = b"notify-keyspace-events"
# K: events per key; E: per kind of event (the contract asks for both); x: expired keys.
NEEDED = "KEx"
# "A" stands for all of these.
ALL = "g$lshzxetd"
# Seconds between two proofs that the subscription's connection is alive.
PING_INTERVAL = 5.0


def merged_flags(current: str) -> str | None:
    """The server's flags with what is needed added; None when they suffice."""
    present = set(current.replace("A", ALL))
    missing = [flag for flag in NEEDED if flag not in present]
    return current + "".join(missing) if missing else None


class ExpiryEvents:
    """The subscription to expired locks on one master."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        force_config_override: bool,
        on_expired: Callable[[LBSInfo], None],
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = Link(endpoint, on_push=self._on_push)
        self._force = force_config_override
        self._on_expired = on_expired
        self._recorder = recorder
        self._logger = logger
        self._prefix = b"__keyspace@%d__:" % endpoint.db
        self._pattern = self._prefix + b"*" + SEPARATOR + b"*"
        self._subscribed: asyncio.Future[None] | None = None
        self._ponged = asyncio.Event()
        self._config_forbidden = False

    async def set_up(self) -> RedisProtocol:
        """Switches events on and subscribes.

        Raises `ConfigConflict` when the server's setting is insufficient and may not be overridden,
        and `KeyspaceSetupFailed` when subscribing is refused.
        """
        try:
            protocol = await self._link.get()
            await self._configure(protocol)
            await self._subscribe(protocol)
        except BaseException:
            if self._recorder is not None:
                self._recorder.keyspace_setup(False)
            raise
        if self._recorder is not None:
            self._recorder.keyspace_setup(True)
        return protocol

    async def run(self, protocol: RedisProtocol) -> None:
        """Keeps the subscription, through reconnects, until cancelled."""
        backoff = Backoff(0.1, 5.0)
        while True:
            await self._watch(protocol)
            while True:
                try:
                    protocol = await self.set_up()
                except RelstreamError as error:
                    if not backoff.failures:
                        self._logger.warning("no expiry events for now, trying again: %s", error)
                    await asyncio.sleep(backoff.failed())
                    continue
                backoff.reset()
                self._logger.info("expiry events are subscribed to again")
                break

    async def close(self) -> None:
        """Ends subscription and connection."""
        await self._link.close()

    async def _configure(self, protocol: RedisProtocol) -> None:
        timeout = self._link.endpoint.timeout
        (reply,) = await protocol.send(pack(b"CONFIG", b"GET", SETTING), timeout=timeout)
        if isinstance(reply, ReplyError):
            self._forbidden(reply)
            return
        values = reply if isinstance(reply, dict) else {reply[0]: reply[1]} if reply else {}
        current = values.get(SETTING, b"").decode()
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
        if not self._config_forbidden:
            self._config_forbidden = True
            self._logger.warning(
                "the server does not let us see to expiry events (%s): unless %s contains %s, dead "
                "consumers are found by scanning only",
                reply, SETTING.decode(), NEEDED,
            )  # fmt: skip

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
            raise KeyspaceSetupFailed(
                f"the server refused PSUBSCRIBE {self._pattern.decode()}: {error}; grant the user "
                "+psubscribe and the channels allchannels, or that pattern"
            ) from None

    async def _watch(self, protocol: RedisProtocol) -> None:
        """Returns when the connection is dead; proves every now and then that it is not."""
        while protocol.alive:
            self._ponged.clear()
            protocol.post(pack(b"PING"))
            await asyncio.wait({protocol.closed}, timeout=PING_INTERVAL)
            if protocol.alive and not self._ponged.is_set():
                # An application that blocked the loop made us late: what arrived is read first.
                await asyncio.wait({protocol.closed}, timeout=self._link.endpoint.timeout)
                if not self._ponged.is_set():
                    protocol.abort()

    def _on_push(self, message: Any) -> None:
        """A pub/sub message: a push frame under RESP3, a plain reply under RESP2."""
        self._ponged.set()  # whatever it is, the connection lives
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
