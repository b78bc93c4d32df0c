"""What the user may not do: found out at the start, and remembered for a while."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from relstream._core import pack
from relstream.errors import ConnectionFailed, PermissionDenied, ReplyError, is_retriable
from relstream.lbs.names import SEPARATOR
from relstream.lbs.scripts import RENEW, run

if TYPE_CHECKING:
    from relstream.lbs.names import Names
    from relstream.net.topology import KeyConnection, Topology

# Seconds after which what was denied is tried again.
DENIED_FOR = 60.0


class Denied:
    """Something that the server refuses, and that is done in another way, or not, for a while.

    True until it is to be tried again: over another connection, or after a minute. Rights are
    changed, and restored, while we live; and each try is a line in the server's ACL log.
    """

    def __init__(self, link: KeyConnection) -> None:
        self._link = link
        self._until = -math.inf
        self._generation = 0
        self._told = False

    def __bool__(self) -> bool:
        return time.monotonic() < self._until and self._generation == self._link.generation

    def remember(self) -> bool:
        """It was refused just now; returns whether that is the first time."""
        self._until = time.monotonic() + DENIED_FOR
        self._generation = self._link.generation
        first, self._told = not self._told, True
        return first


def refused(reply: object) -> bool:
    """Whether a script will not be run for us, in whatever words: its commands have to do."""
    return (
        isinstance(reply, ReplyError)
        and not is_retriable(reply)
        and reply.code not in ("WRONGTYPE", "NOGROUP")
    )


async def keys_together(topology: Topology, names: Names) -> bool:
    """Whether one command may have keys of several slots.

    Proxies, and databases that are spread over several shards behind one endpoint, refuse that.
    """
    if not topology.together:
        return False
    # Of different slots, as a name in braces is all that counts.
    locks = [b"{%b%d}%b0-0" % (names.lbs, number, SEPARATOR) for number in range(2)]
    link = topology.link(names.lbs)
    (mget,) = await link.pipeline(pack(b"MGET", *locks), 1)
    (script,) = await run(link, RENEW, [(locks, (b"-", 1))])
    return not any(isinstance(r, ReplyError) and r.code == "CROSSSLOT" for r in (mget, script))


async def probe_permissions(topology: Topology, names: Names, consumer: str) -> None:
    """Raises `PermissionDenied`, naming every command that the user lacks.

    Asks by running each in a form that changes nothing: ids that no entry can have, a lock that
    nobody holds. `ACL DRYRUN` would ask more directly, but is itself an administrator's command.
    """
    lock = names.lbs + SEPARATOR + b"0-0"
    # Not the very last id: Redis takes that one for ">", which would read everything.
    no_id = b"18446744073709551615-18446744073709551614"
    probes: list[tuple[bytes | None, tuple[bytes | str | int, ...]]] = [
        (names.lbs, (b"XGROUP", b"CREATE", names.lbs, names.group, b"no id")),
        (names.lbs, (b"XADD", names.lbs, b"0-0", b"f", b"v")),
        (names.dlq, (b"XADD", names.dlq, b"0-0", b"f", b"v")),
        (
            names.lbs,
            (b"XREADGROUP", b"GROUP", names.group, consumer, b"STREAMS", names.lbs, no_id),
        ),
        (names.lbs, (b"XACK", names.lbs, names.group, b"0-0")),
        (names.lbs, (b"XDEL", names.lbs, b"0-0")),
        (names.lbs, (b"XRANGE", names.lbs, b"0-0", b"0-0")),
        (names.lbs, (b"XPENDING", names.lbs, names.group, b"0-0", b"0-0", 1)),
        # Both NX and XX: a mistake of syntax, which is found after the rights were checked.
        (names.leader, (b"SET", names.leader, b"-", b"NX", b"XX")),
        # Locks are named after data streams: which of them the user may touch can't be known yet.
        (None, (b"SET", lock, b"-", b"XX", b"PX", 1)),
        (None, (b"GET", lock)),
        (None, (b"PEXPIRE", lock, 1)),
        (None, (b"DEL", lock)),
    ]
    if not topology.single:
        probes.append((names.lbs, (b"ASKING",)))
    answers = await asyncio.gather(
        *(topology.link(key or lock).pipeline(pack(*args), 1) for key, args in probes),
        return_exceptions=True,
    )
    denied: dict[str, None] = {}
    for (key, args), answer in zip(probes, answers, strict=True):
        if isinstance(answer, BaseException):
            # A master that has other keys may be down for now: it is tried again when needed.
            if key == names.lbs or not isinstance(answer, ConnectionFailed):
                raise answer
            continue
        (reply,) = answer
        if isinstance(reply, ReplyError) and reply.code == "NOPERM":
            command = args[0]
            assert isinstance(command, bytes)
            if not reply.about_keys:
                denied[f"+{command.decode().lower()}"] = None
            elif key is not None:
                denied[f"~{key.decode()}"] = None
    if denied:
        user = topology.link(names.lbs).endpoint.user
        raise PermissionDenied(
            f"the user {user!r} lacks rights that relstream needs: grant them by "
            f"ACL SETUSER {user} {' '.join(denied)}"
        )
