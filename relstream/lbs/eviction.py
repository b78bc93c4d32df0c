"""Finds masters that may evict what relstream stores: locks and load balancer streams."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from relstream._core import pack
from relstream.errors import RelstreamError, ReplyError

if TYPE_CHECKING:
    from relstream.net.connection import Connection
    from relstream.net.topology import Topology

SETTING = b"maxmemory-policy"


async def evicting(topology: Topology, *, config: bool) -> list[str]:
    """The masters whose `maxmemory-policy` evicts, each with its policy.

    Not by CONFIG where that is known to be forbidden, as `config` says.

    A master that can't be reached, or does not let us know, is not among them.
    """
    links = [topology.to(server) for server in topology.servers]
    policies = await asyncio.gather(*[_policy(link, config=config) for link in links])
    return sorted(
        f"{link.endpoint} ({policy})"
        for link, policy in zip(links, policies, strict=True)
        if policy.startswith(("allkeys-", "volatile-"))
    )


async def _policy(link: Connection, *, config: bool) -> str:
    """By CONFIG GET, else by INFO, which managed services allow; empty where neither tells."""
    try:
        found = None
        if config:
            (reply,) = await link.pipeline(pack(b"CONFIG", b"GET", SETTING), 1)
            found = _value(reply)
        if found is None:
            (reply,) = await link.pipeline(pack(b"INFO", b"memory"), 1)
            match = re.search(rb"maxmemory_policy:(\S+)", reply) if type(reply) is bytes else None
            found = match[1] if match else b""
    except RelstreamError:
        return ""
    return found.decode(errors="replace")


def _value(reply: Any) -> bytes | None:
    """The setting in a reply to CONFIG GET, which is a dict under RESP3; None: it is not there."""
    if isinstance(reply, ReplyError):
        return None
    pairs = list(reply.items()) if isinstance(reply, dict) else []
    if isinstance(reply, list):
        pairs = list(zip(reply[::2], reply[1::2], strict=False))
    return next((value for _, value in pairs if isinstance(value, bytes)), None)
