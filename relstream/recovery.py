"""Putting entries back into the load balancer stream, and into the dead-letter stream."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from relstream._core import ENTRIES, ITEM, Batch, Template, pack
from relstream.errors import ReplyError
from relstream.lbs import (
    DLQ_REASON_FIELD,
    RETRY_FIELD,
    SOURCE_FIELD,
    Names,
    replace_fields,
    retry_count,
)
from relstream.net.connection import Link, raise_first
from relstream.scripts import PUT_BACK, SCRIPT_KEYS, run

# A call of the script that puts back carries about this much at most, like a call's entries.
SCRIPT_BYTES = 1 << 20


async def read_entries(link: Link, names: Names, ids: Sequence[bytes]) -> list[Batch]:
    """Entries of the LBS by their ids, a batch of one or none each (XRANGE)."""
    ask = Template(b"XRANGE", names.lbs, ITEM, ITEM)
    return raise_first(await link.pipeline(ask.pack(list(ids)), len(ids), decode=ENTRIES))


async def put_back(
    link: Link, names: Names, entries: Sequence[tuple[bytes, list[bytes]]], logger: logging.Logger
) -> list[bool]:
    """Adds pending entries, `(id, field names and values)`, anew under new ids.

    True for each that was pending until now; the others belong to somebody else, and stay as they
    are. One atomic step an entry (`PUT_BACK`); where scripts are forbidden XACK comes first, then
    XADD and XDEL for those that were won by it, and a crash between the two would lose them.
    """
    calls: list[tuple[list[bytes], list[bytes | str | int]]] = []
    size = SCRIPT_BYTES
    held = SCRIPT_KEYS
    for entry_id, pairs in entries:
        if held == SCRIPT_KEYS or size >= SCRIPT_BYTES:
            calls.append(([names.lbs], [names.group]))
            size = held = 0
        calls[-1][1].extend((entry_id, len(pairs), *pairs))
        held += 1
        size += sum(map(len, pairs))
    won: list[bool] = []
    for reply in await run(link, PUT_BACK, calls):
        if isinstance(reply, ReplyError):
            if reply.code == "NOPERM":
                return await _put_back_in_two_steps(link, names, entries, logger, reply)
            raise reply
        if -1 in reply:
            logger.error("an LBS entry has too many fields to be put back; it stays pending")
        won += [acked == 1 for acked in reply]
    return won


async def _put_back_in_two_steps(
    link: Link,
    names: Names,
    entries: Sequence[tuple[bytes, list[bytes]]],
    logger: logging.Logger,
    reason: ReplyError,
) -> list[bool]:
    logger.warning("scripts are forbidden (%s): entries are put back in two steps", reason)
    ack = Template(b"XACK", names.lbs, names.group, ITEM)
    acked = await link.pipeline(ack.pack([entry_id for entry_id, _ in entries]), len(entries))
    adding = []
    for (entry_id, pairs), count in zip(entries, acked, strict=True):
        if count == 1:
            adding.append(pack(b"XADD", names.lbs, b"*", *pairs))
            adding.append(pack(b"XDEL", names.lbs, entry_id))
    added = await link.pipeline(b"".join(adding), len(adding))
    raise_first(acked)
    raise_first(added)
    return [count == 1 for count in acked]


async def to_dlq(
    link: Link,
    names: Names,
    max_len: int,
    letters: Sequence[tuple[bytes, list[bytes]]],
    reason: bytes,
) -> None:
    """Moves pending entries, `(id, field names and values)`, to the dead-letter stream.

    They are added there before they are acknowledged here: a crash between may put one there twice,
    with the same `_source_id`, and can't lose it. Raises `ReplyError` when the dead-letter stream
    can't be written; the entries stay pending.
    """
    cap: tuple[bytes | int, ...] = (b"MAXLEN", b"~", max_len) if max_len else ()
    adding = [
        pack(
            b"XADD", names.dlq, *cap, b"*",
            *replace_fields(
                pairs,
                {
                    RETRY_FIELD: b"%d" % retry_count(pairs),
                    DLQ_REASON_FIELD: reason,
                    SOURCE_FIELD: entry_id,
                },
            ),
        )
        for entry_id, pairs in letters
    ]  # fmt: skip
    replies = await link.pipeline(b"".join(adding), len(adding))
    ids = [
        entry_id
        for (entry_id, _), reply in zip(letters, replies, strict=True)
        if not isinstance(reply, ReplyError)
    ]
    if ids:
        await discard(link, names, ids)
    raise_first(replies)


async def discard(link: Link, names: Names, ids: Sequence[bytes]) -> None:
    """Acknowledges and deletes LBS entries that nobody needs any more."""
    packed = pack(b"XACK", names.lbs, names.group, *ids) + pack(b"XDEL", names.lbs, *ids)
    raise_first(await link.pipeline(packed, 2))
