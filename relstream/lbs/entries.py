"""Pending entries on their way back, and what became of them."""

from __future__ import annotations

from typing import NamedTuple

from relstream.errors import ReplyError

# An entry's id, its field names and values, and the lock that must be free, if one must.
Returning = tuple[bytes, list[bytes], bytes | None]

# What became of an entry: it was requeued; was not pending any more; its lock is held; the script
# can't pass on so many fields; the server refused.
REQUEUED, LOST, ALIVE, NOT_BY_SCRIPT, REFUSED = 1, 0, 2, -1, -2

# On a cluster, the leader sees that a lock is free a moment before it requeues the entry. A lock
# taken in between would make two owners: one of the two requeues the entry instead.
TOO_LATE = ReplyError("TRYAGAIN it may be recovered as a dead owner's just now")


class Fence(NamedTuple):
    """Proves that the leader that judged an entry leads still, and has since before it judged."""

    key: bytes
    value: bytes
