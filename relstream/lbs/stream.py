"""Commands on one load balancer stream and its group, as far as several parts need them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

import orjson

from relstream._core import ENTRIES, ITEM, Batch, EntryIds, Plan, Template, pack, parse_id
from relstream.errors import ConnectionFailed, ProtocolError
from relstream.lbs.names import INPUT_FIELD, RETRY_FIELD, SEPARATOR, Names, start_after
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection

    # An entry's id, its field names and values, and the lock that must be free, if one must.
    Returning = tuple[bytes, list[bytes], bytes | None]

# Entries are read in portions of about so many bytes, and at most so many of them.
PORTION_BYTES = 1 << 20

LARGEST_PORTION = 1000


async def read_entries(link: KeyConnection, names: Names, ids: Iterable[bytes]) -> list[Batch]:
    """Entries of the LBS by their ids, a batch of one or none each (XRANGE)."""
    ask = Template(b"XRANGE", names.lbs, ITEM, ITEM)
    ids = list(ids)
    return raise_first(await link.pipeline(ask.pack(ids), len(ids), decode=ENTRIES))


def fitting(batches: Sequence[Batch], most_bytes: int) -> int:
    """How many entries of the size that these have fit into so many bytes; 1 at least."""
    nbytes = sum(batch.nbytes for batch in batches)
    return max(1, sum(map(len, batches)) * most_bytes // max(1, nbytes))


class Entries:
    """Reads entries of the LBS in portions that fit into memory, whatever size they have."""

    def __init__(self, link: KeyConnection, names: Names) -> None:
        self._link = link
        self._names = names
        self._count = 1  # entries a portion, by the size of what came so far

    async def read(
        self, ids: EntryIds, page_size: int | None = None
    ) -> AsyncIterator[tuple[EntryIds, list[Batch]]]:
        """Portions of the ids, with their entries. `page_size`: they all come from one such page.

        Then they are mostly nearly one range.
        """
        start = 0
        while start < len(ids):
            count = self._count
            part = ids
            if count < len(ids) - start or start:
                part = EntryIds([ids[i] for i in range(start, min(start + count, len(ids)))])
            try:
                if page_size is None or 4 * len(ids) < page_size:
                    batches = await read_entries(self._link, self._names, part)
                else:
                    batches = await self._range(part)
            except (ConnectionFailed, ProtocolError):
                self._count = 1  # it may have been too large a reply
                raise
            start += len(part)
            came = sum(map(len, batches))
            # A small portion tells little of many, unless its entries are large.
            if came:
                self._count = min(
                    fitting(batches, PORTION_BYTES), max(self._count, 4 * came), LARGEST_PORTION
                )
            yield part, batches

    async def _range(self, ids: EntryIds) -> list[Batch]:
        batches: list[Batch] = []
        start: bytes | None = ids[0]
        last, size = ids[-1], len(ids)
        while start is not None:
            batch: Batch = await self._link.execute(
                b"XRANGE", self._names.lbs, start, last, b"COUNT", size, decode=ENTRIES
            )
            batches.append(batch)
            done = len(batch) < size or batch.id(-1) == last
            start = None if done else start_after(batch.id(-1))
        return batches


def plan_for(ids: EntryIds, batches: list[Batch]) -> Plan:
    """What there is to do about pending entries, `batches` being where they are."""
    return Plan(ids, batches, INPUT_FIELD, SEPARATOR, RETRY_FIELD, orjson.loads)


async def discard(link: KeyConnection, names: Names, ids: Sequence[bytes]) -> int:
    """Acknowledges and deletes LBS entries that nobody needs any more; how many were pending."""
    packed = pack(b"XACK", names.lbs, names.group, *ids) + pack(b"XDEL", names.lbs, *ids)
    acked: int = raise_first(await link.pipeline(packed, 2))[0]
    return acked


def id_order(entry_id: bytes) -> tuple[int, int]:
    """A key to sort ids of entries by."""
    return parse_id(entry_id) or (0, 0)
