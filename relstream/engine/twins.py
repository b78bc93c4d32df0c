"""Finds out living consumers that share one name.

They hold each other's locks, so both work on the same streams. Each writes its instance once a
heartbeat and gets what was written before: another instance, unless it is a dead former self.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from typing import TYPE_CHECKING

from relstream.errors import RelstreamError, ReplyError

if TYPE_CHECKING:
    from relstream.lbs.names import Names
    from relstream.net.topology import KeyConnection

# Rounds without a trace of the twin after which it is gone.
ROUNDS = 2
# Characters that are shown of another instance.
SHOWN = 200


class Twins:
    """Looks for another living consumer of the same name, once a heartbeat (seconds)."""

    def __init__(
        self,
        link: KeyConnection,
        names: Names,
        consumer: str,
        heartbeat: float,
        logger: logging.Logger,
    ) -> None:
        self._link = link
        self._key = names.instance(consumer)
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._logger = logger
        host = socket.gethostname()
        self._value = f"{secrets.token_hex(8)} {host} pid {os.getpid()}".encode()
        self._written = False
        self._unseen = 0
        self._reported: bytes | None = None
        self.other: str | None = None
        """The instance, host and process id of a living twin; None when there is none."""

    async def run(self) -> None:
        """Writes and compares until cancelled."""
        while True:
            try:
                await self._round()
            except ReplyError as error:
                if error.code == "NOPERM":
                    self._logger.info(
                        "the key %r is forbidden (%s): a second living consumer of the name %r is "
                        "not found out; grant +set ~%s",
                        self._key.decode(errors="replace"), error, self._consumer,
                        self._key.decode(errors="replace"),
                    )  # fmt: skip
                    await asyncio.Event().wait()  # rights are looked at once, at the start
                self._logger.debug("no search for a twin this time: %s", error)
            except RelstreamError as error:
                self._logger.debug("no search for a twin this time: %s", error)
            await asyncio.sleep(self._heartbeat)

    async def _round(self) -> None:
        lasts = round(2 * self._heartbeat * 1000)
        first = not self._written
        before = await self._link.execute(b"SET", self._key, self._value, b"PX", lasts, b"GET")
        self._written = True
        if first or before is None or before == self._value or not isinstance(before, bytes):
            self._unseen += 1
            if self._unseen >= ROUNDS:
                self.other = None
            return
        self._unseen = 0
        # Its first word is the instance, the rest says where to find it.
        instance, _, place = before.decode(errors="replace")[:SHOWN].partition(" ")
        self.other = f"{place or 'an unknown host'} (instance {instance})"
        if before != self._reported:
            self._reported = before
            self._logger.error(
                "another living consumer has the name %r, too: %s. Both hold the same locks, so a "
                "stream may be worked on by both at once; give each consumer a name of its own "
                "(consumer_id, or POD_NAME in its environment) and restart it",
                self._consumer, self.other,
            )  # fmt: skip

    async def leave(self) -> None:
        """Removes what was written, if it is ours still; for after `run` has ended."""
        if not self._written:
            return
        with contextlib.suppress(RelstreamError):  # it expires
            if await self._link.execute(b"GET", self._key) == self._value:
                await self._link.execute(b"DEL", self._key)
