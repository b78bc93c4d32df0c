"""The consumers of a group: who they are, which of them live, and that dead ones are removed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template
from relstream.errors import RelstreamError, ReplyError
from relstream.lbs.names import consumer_row
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import REMOVE_CONSUMER, run

if TYPE_CHECKING:
    from relstream.lbs.names import Names
    from relstream.net.topology import Topology

# Seconds for which a consumer that owns nothing must not have been seen before it is removed.
REMOVE_AFTER = 3600.0
REMOVE_EVERY = 60.0


class Group:
    """The consumer group of one load balancer stream, as consumer `name` sees it."""

    def __init__(self, topology: Topology, names: Names, name: str, logger: logging.Logger) -> None:
        self._topology = topology
        self._link = topology.link(names.lbs)
        self._names = names
        self._name = name.encode()
        self._logger = logger
        self._no_xinfo = Denied(self._link)
        self._no_instances = Denied(self._link)
        self._no_scripts = Denied(self._link)

    async def rows(self) -> list[dict[bytes, Any]]:
        """The rows of XINFO CONSUMERS; none where that is forbidden."""
        if self._no_xinfo:
            return []
        try:
            rows = await self._link.execute(
                b"XINFO", b"CONSUMERS", self._names.lbs, self._names.group
            )
        except ReplyError as error:
            if error.code != "NOPERM":
                raise
            if self._no_xinfo.remember():
                self._logger.info(
                    "XINFO is not permitted (%s): deaths are told by expiry events and scans only, "
                    "and consumers long gone are not removed; grant +xinfo|consumers",
                    error,
                )
            return []
        return [consumer_row(row) for row in rows]

    async def living(self, consumers: Sequence[bytes]) -> set[bytes]:
        """Those that wrote their instance lately, as all do that are ours and may."""
        alive = await self._alive(consumers)
        return {name for name, lives in alive.items() if lives}

    async def _alive(self, consumers: Sequence[bytes]) -> dict[bytes, bool | None]:
        """Whether each wrote its instance lately; None where that may not be read."""
        if not consumers or self._no_instances:
            return dict.fromkeys(consumers)
        keys = [self._names.instance(name.decode(errors="replace")) for name in consumers]
        replies = await self._topology.each(Template(b"GET", ITEM).pack, keys)
        if any(isinstance(reply, ReplyError) and reply.code == "NOPERM" for reply in replies):
            self._no_instances.remember()
        return {
            name: None if isinstance(reply, ReplyError) else reply is not None
            for name, reply in zip(consumers, replies, strict=True)
        }

    # --- removing ------------------------------------------------------------------------------

    async def tidy_for_ever(self) -> None:
        """Removes consumers that own nothing and have not been seen for long, now and then."""
        while True:
            await self._remove_dead()
            await asyncio.sleep(REMOVE_EVERY)

    async def _remove_dead(self) -> None:
        try:
            rows = await self.rows()
        except ReplyError as error:
            if error.code == "NOGROUP":
                return
            raise
        # Before Redis 7.2 `idle` counts from the last entry that a consumer was given, and a living
        # one may have had none for hours. Since then each read counts; one that is paused reads
        # nothing.
        idle = {
            row[b"name"]: b"inactive" in row
            for row in rows
            if not row[b"pending"]
            and row[b"idle"] > REMOVE_AFTER * 1000
            and row[b"name"] != self._name
        }
        alive = await self._alive(list(idle))
        gone = [
            name for name in idle if alive[name] is False or (alive[name] is None and idle[name])
        ]
        for name, reply in zip(gone, await self._remove(gone), strict=True):
            if reply == 1:
                shown = name.decode(errors="replace")
                self._logger.info("removed consumer %s, not seen for an hour", shown)

    async def leave(self) -> None:
        """Removes this consumer, if nothing is pending for it; for when it reads no more."""
        try:
            (reply,) = await self._remove([self._name])
        except RelstreamError as error:
            reply = error
        if reply != 1:
            why = "something is pending for it" if reply == 0 else reply
            self._logger.debug("this consumer stays in its group: %s", why)

    async def _remove(self, names: Sequence[bytes]) -> list[Any]:
        """What the script says of each; a step that is not atomic might remove what is pending."""
        if self._no_scripts:
            return [None] * len(names)
        calls = [([self._names.lbs], [self._names.group, name]) for name in names]
        replies = await run(self._link, REMOVE_CONSUMER, calls)
        if any(refused(reply) for reply in replies):
            self._no_scripts.remember()
        return replies
