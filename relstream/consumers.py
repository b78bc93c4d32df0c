"""The consumers of a group, as the server lists them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template
from relstream.errors import ReplyError
from relstream.lbs import consumer_row
from relstream.rights import Denied

if TYPE_CHECKING:
    from relstream.lbs import Names
    from relstream.net.topology import Topology


class Group:
    """The consumer group of one load balancer stream."""

    def __init__(self, topology: Topology, names: Names, logger: logging.Logger) -> None:
        self._topology = topology
        self._link = topology.link(names.lbs)
        self._names = names
        self._logger = logger
        self._no_xinfo = Denied(self._link)

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
        keys = [self._names.instance(name.decode(errors="replace")) for name in consumers]
        replies = await self._topology.each(Template(b"GET", ITEM).pack, keys) if keys else []
        return {
            name
            for name, reply in zip(consumers, replies, strict=True)
            if reply is not None and not isinstance(reply, ReplyError)
        }
