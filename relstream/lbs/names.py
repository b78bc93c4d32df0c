"""The wire contract: the names of keys, and the entries of the load balancer stream (LBS)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import orjson

from relstream._core import Entry, key_slot, parse_id
from relstream.config import check_count, check_name
from relstream.errors import InvalidOption

INPUT_FIELD = b"lbs-input"
RETRY_FIELD = b"_retry_count"
DLQ_REASON_FIELD = b"_dlq_reason"
SOURCE_FIELD = b"_source_id"
ERROR_FIELD = b"_error"
ERROR_TYPE_FIELD = b"_error_type"
FAILED_AT_FIELD = b"_failed_at"
OWNER_FIELD = b"_owner"
REASON_UNPARSEABLE = b"unparseable"
REASON_MAX_RETRIES = b"max_retries_exceeded"
REASON_WRONG_PARTITION = b"wrong_partition"
REASON_REJECTED = b"rejected"
REASON_EXHAUSTED = b"ids_exhausted"

LAST_ID = b"18446744073709551615-18446744073709551615"
"""The last possible one: nothing can be added to a stream that had it."""

SEPARATOR = b"<MUTEX_KEY_SEP>"
"""Stands between a data stream's name and its entry's id in the key of a lock."""


MAX_PARTITIONS = 64


@dataclass(frozen=True)
class Names:
    """The keys of one service."""

    lbs: bytes
    group: bytes
    dlq: bytes
    leader: bytes
    """Held by the consumer that recovers for all."""
    partition: int = 0
    partitions: int = 1
    first: bytes = b""
    """The load balancer stream of the first of several partitions."""

    def receipt(self, consumer: str, number: int) -> bytes:
        """What came of a consumer's last call of this number, should the answer get lost."""
        return b"%s-finished-%s/%d" % (_in_slot_of(self.lbs), consumer.encode(), number)

    @property
    def delayed(self) -> bytes:
        """A sorted set: entries of failed streams, by when they are due (ms, server time)."""
        return _in_slot_of(self.lbs) + b"-delayed"

    def instance(self, consumer: str) -> bytes:
        """Key in which each living consumer of this name writes which instance it is."""
        return b"%s-instance-%s" % (_in_slot_of(self.first or self.lbs), consumer.encode())

    @classmethod
    def all_of(
        cls, service_name: str, dlq_stream: str | None = None, partitions: int = 1
    ) -> tuple[Names, ...]:
        """The keys of each partition; one has those that the Go client knows.

        The hash tags of several are such that a Redis Cluster whose masters serve even ranges of
        slots has them on different ones. Raises `InvalidOption` as `of` does.
        """
        check_count("partitions", partitions, 1, MAX_PARTITIONS)
        names = cls.of(service_name, dlq_stream)
        if partitions == 1:
            return (names,)
        if "{" in service_name:
            raise InvalidOption(
                "service_name", service_name, "a name without { when there are several partitions"
            )
        tags = list(_hash_tags(partitions))
        every = tuple(
            replace(
                names,
                lbs=names.lbs + tag,
                leader=names.leader + tag,
                partition=number,
                partitions=partitions,
                first=names.lbs + tags[0],
            )
            for number, tag in enumerate(tags)
        )
        for its_names in every:
            its_names._check_dlq(dlq_stream)
        return every

    @classmethod
    def of(cls, service_name: str, dlq_stream: str | None = None) -> Names:
        """Raises `InvalidOption` for a name that can't be a service's."""
        check_name("service_name", service_name)
        separator = SEPARATOR.decode()
        if separator in service_name:
            # Every key of the service would look like a lock to whoever listens for expired ones.
            raise InvalidOption("service_name", service_name, f"a name without {separator}")
        name = service_name.encode()
        dlq = dlq_stream.encode() if dlq_stream else name + b"-input-dlq"
        names = cls(
            lbs=name + b"-input",
            group=name + b"-group",
            dlq=dlq,
            leader=name + b"-input-reconciler",
        )
        names._check_dlq(dlq_stream)
        return names

    def _check_dlq(self, given: str | None) -> None:
        if self.dlq in (self.lbs, self.leader):
            raise InvalidOption("recovery.dlq_stream", given, "a key that serves nothing else")


@lru_cache
def _in_slot_of(key: bytes) -> bytes:
    """What begins the names of keys that share the slot of this one, in a Redis Cluster."""
    if re.search(rb"^[^{]*\{[^}]+\}", key):  # its hash tag is that of longer keys, too
        return key
    if b"}" not in key:
        return b"{%b}" % key
    # It has no hash tag, and would become another one within braces.
    number = 0
    while key_slot(b"%d" % number) != key_slot(key):
        number += 1
    return b"{%d}%b" % (number, key)


def _hash_tags(partitions: int) -> list[bytes]:
    """For each of so many ranges of slots the smallest number whose slot is in its middle.

    As a hash tag, and no further from the very middle than a 128th of the range: the slots are then
    far enough from each other to be apart on any number of masters that is no smaller.
    """
    tags: dict[int, bytes] = {}
    number = 0
    while len(tags) < partitions:
        tag = b"{%d}" % number
        place, offset = divmod(key_slot(tag) * partitions, 16384)
        if abs(offset - 8192) <= 16384 // 128:
            tags.setdefault(place, tag)
        number += 1
    return [tags[place] for place in range(partitions)]


def partition_of(data_stream_name: str, partitions: int) -> int:
    """Where a data stream is announced: always in the same partition."""
    if partitions == 1:
        return 0
    return key_slot(data_stream_name.encode(errors="surrogatepass")) % partitions


def entry_id_of(option: str, value: object) -> bytes:
    """An entry's id as Redis has it; raises `InvalidOption` for what is none."""
    if isinstance(value, str) and value.isascii():
        parsed = parse_id(value.encode())
        if parsed is not None:
            return b"%d-%d" % parsed
    raise InvalidOption(option, value, "an entry's id, of the form <ms>-<seq>")


def entry_ids_of(option: str, values: object, what: str) -> list[bytes]:
    """EntryIds as Redis has them; raises `InvalidOption` for what is no iterable of ids."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidOption(option, values, f"ids of {what}: [<ms>-<seq>, …]")
    return [entry_id_of(option, value) for value in values]


def lock_key(data_stream_name: str, entry_id: str) -> bytes:
    """The lock of an announcement."""
    return b"%b%b%b" % (data_stream_name.encode(), SEPARATOR, entry_id.encode())


def split_lock_key(key: bytes) -> tuple[str, str] | None:
    """The name of the data stream and the id of its entry; None when `key` is no lock's.

    A data stream's name may contain the separator, so the last one counts; an id has no zeros in
    front.
    """
    name, separator, entry_id = key.rpartition(SEPARATOR)
    parsed = parse_id(entry_id)
    if not separator or not name or parsed is None or b"%d-%d" % parsed != entry_id:
        return None
    try:
        return name.decode(), entry_id.decode()
    except UnicodeDecodeError:
        return None


def start_after(entry_id: bytes) -> bytes | None:
    """Where to go on reading behind this entry; None behind the last id that there can be.

    Which somebody may have given to an entry: Redis refuses to follow it.
    """
    return None if entry_id == LAST_ID else b"(" + entry_id


def consumer_row(row: Any) -> dict[bytes, Any]:
    """A row of XINFO CONSUMERS: RESP3 gives a map, RESP2 names and values in turn."""
    return row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True))


def message(data_stream_name: str, info: dict[str, Any] | None) -> bytes:
    """The value of `lbs-input`. Raises `InvalidOption` for what can't be announced."""
    check_name("data_stream_name", data_stream_name)
    if info is not None and not isinstance(info, dict):
        raise InvalidOption("info", info, "a dict that JSON can express, or None")
    try:
        return orjson.dumps({"DataStreamName": data_stream_name, "Info": info})
    except TypeError as error:
        raise InvalidOption("info", info, f"a dict that JSON can express ({error})") from None


def known_fields(entry: Entry) -> list[bytes]:
    """The fields of an entry, as far as who read it knows them: the last to, if it was trimmed."""
    announcement = entry.announcement or message(entry.data_stream_name, entry.info)
    pairs = [INPUT_FIELD, announcement]
    if entry.retry_count:
        pairs += (RETRY_FIELD, b"%d" % entry.retry_count)
    return pairs


def retry_count(pairs: list[bytes]) -> int:
    """How often an entry was put back: 0 where its `_retry_count` is absent, malformed or negative.

    `pairs` are field names and values in turn.
    """
    for name, value in zip(reversed(pairs[::2]), reversed(pairs[1::2]), strict=True):
        if name == RETRY_FIELD:
            valid = re.fullmatch(rb"\+?[0-9]{1,19}", value)
            return int(value) if valid and int(value) < 2**63 else 0
    return 0


def replace_fields(pairs: list[bytes], replaced: Mapping[bytes, bytes]) -> list[bytes]:
    """`pairs` with these fields set anew, at the end; all others as they were."""
    out: list[bytes] = []
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        if name not in replaced:
            out += (name, value)
    for name, value in replaced.items():
        out += (name, value)
    return out
