"""Locks of one consumer on the server: acquire, renew and release, in batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template, first_error, lock_keys, scatter
from relstream.errors import ProtocolError, RelstreamError, ReplyError, is_retriable
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import (
    RELEASE,
    RELEASE_ONE,
    RENEW,
    RENEW_ONE,
    SCRIPT_KEYS,
    Script,
    run,
    run_each,
)
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream._core import Entry
    from relstream.lbs.entries import Returning
    from relstream.net.topology import Topology


def chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """`items` in pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Locks:
    """Locks of one consumer: acquire, renew, release, in batches."""

    def __init__(
        self, topology: Topology, consumer: str, ttl_ms: int, logger: logging.Logger
    ) -> None:
        self._topology = topology
        self._value = consumer.encode()
        self._ttl_ms = ttl_ms
        self.ttl = ttl_ms / 1000
        """Seconds that a lock lives from when it was taken, or renewed."""
        self._logger = logger
        self._no_scripts = Denied(topology.link(b""))
        self._warned_of_holder = False
        self._set = Template(b"SET", ITEM, self._value, b"NX", b"PX", ttl_ms)
        self._get = Template(b"GET", ITEM)
        self._extend = Template(b"PEXPIRE", ITEM, ttl_ms)
        self._delete = Template(b"DEL", ITEM)

    async def acquire(self, keys: list[bytes]) -> list[Any]:
        """For each lock b"OK", None (it is held) or a `ReplyError`."""
        return await self._topology.each(self._set.pack, keys)

    async def warn_of_holder(self, entries: list[Entry]) -> None:
        """Logs, once, who holds the lock of one of these entries, which nobody can have owned yet.

        Another service's consumer does, if both services have an entry of this id and name.
        """
        if self._warned_of_holder:
            return
        self._warned_of_holder = True  # batches are locked side by side
        try:
            holders = await self._topology.each(self._get.pack, lock_keys(entries))
        except RelstreamError:
            holders = []
        for entry, holder in zip(entries, holders, strict=False):
            if isinstance(holder, bytes) and holder != self._value:
                self._logger.warning(
                    "LBS entry %s of data stream %r, read just now, is locked by %r already: it "
                    "stays pending until that lock is gone. If another service uses this database, "
                    "equal LBS ids and stream names share a lock: give each service a database of "
                    "its own, or names that differ",
                    entry.id_in_lbs, entry.data_stream_name, holder.decode(errors="replace"),
                )  # fmt: skip
                return
        self._warned_of_holder = False

    async def held(self, keys: list[bytes], *, known: bool = False) -> list[bool]:
        """Which of these locks are ours; `known`: and are on masters that can be asked."""
        values = await self._topology.each(self._get.pack, keys)
        if not known:
            raise_first(values)
        return [value == self._value for value in values]

    async def renew(self, keys: list[bytes]) -> tuple[list[bytes], list[bytes], list[ReplyError]]:
        """Gives locks that are ours their full time again.

        Returns those gone, those taken, and the server's refusals, one for each of the others.
        """
        outcomes = await self.renew_each(keys)
        gone = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == 0]
        taken = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == -1]
        if first_error(outcomes) is None:
            return gone, taken, []
        return gone, taken, [each for each in outcomes if isinstance(each, ReplyError)]

    async def renew_each(self, keys: list[bytes]) -> list[Any]:
        """As `renew`; returns for each lock 1 (done), 0 (gone), -1 (taken) or a `ReplyError`."""
        return await self._run(RENEW, RENEW_ONE, self._extend, keys, self._value, self._ttl_ms)

    async def release(self, keys: list[bytes]) -> list[bytes]:
        """Deletes locks that are ours; returns those that were not.

        On a cluster those that could not be deleted are among them: they expire, and keep nothing
        from being finished or handed over.
        """
        try:
            outcomes = await self._run(RELEASE, RELEASE_ONE, self._delete, keys, self._value)
        except RelstreamError as error:
            if self._topology.single:
                raise
            outcomes = [error] * len(keys)
        failure = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
        if failure is not None:
            if self._topology.single:
                raise failure
            self._logger.debug("some locks could not be released, and expire: %s", failure)
        return [key for key, outcome in zip(keys, outcomes, strict=True) if outcome != 1]

    async def _run(
        self, many: Script, one: Script, step: Template, keys: list[bytes], *args: bytes | int
    ) -> list[Any]:
        """Runs a script on these locks; where it is forbidden GET and then `step` do.

        For each lock 1 (done), 0 (gone), -1 (another's) or a `ReplyError`.
        """
        if self._no_scripts:
            return await self._in_steps(step, keys)
        if self._topology.together:
            outcomes = await self._run_on_many(many, keys, args)
        else:
            outcomes = await run_each(self._topology, one, keys, args)
        if first_error(outcomes) is None:
            return outcomes
        denied = [place for place, outcome in enumerate(outcomes) if refused(outcome)]
        # About one of these locks: for once.
        refusal = next((outcomes[p] for p in denied if not outcomes[p].about_keys), None)
        if refusal is not None and self._no_scripts.remember():
            self._logger.warning(
                "a script is forbidden (%s): locks are renewed and released by two commands each; "
                "grant +evalsha, +eval, +mget, +pexpire and +del to make that one atomic "
                "step",
                refusal,
            )
        if denied:
            steps = await self._in_steps(step, [keys[place] for place in denied])
            scatter(outcomes, denied, steps)
        return outcomes

    async def _run_on_many(
        self, script: Script, keys: list[bytes], args: Sequence[bytes | int]
    ) -> list[Any]:
        parts = list(chunks(keys, SCRIPT_KEYS))
        replies = await run(self._topology.link(b""), script, [(part, args) for part in parts])
        outcomes: list[Any] = []
        for part, places in zip(parts, replies, strict=True):
            if isinstance(places, ReplyError):
                outcomes += [places] * len(part)
                continue
            done = [1] * len(part)
            try:
                for place in places:
                    done[abs(place) - 1] = 0 if place > 0 else -1
            except (TypeError, IndexError):
                raise ProtocolError(f"{places!r:.80} answers a script about locks") from None
            outcomes += done
        return outcomes

    async def _in_steps(self, step: Template, keys: list[bytes]) -> list[Any]:
        """What a script does, by two commands a lock, not atomically."""
        values = await self._topology.each(self._get.pack, keys)
        ours = [key for key, value in zip(keys, values, strict=True) if value == self._value]
        done = iter(await self._topology.each(step.pack, ours))
        outcomes: list[Any] = []
        for value in values:
            if value == self._value:
                outcomes.append(next(done))
            elif isinstance(value, ReplyError) and is_retriable(value):
                outcomes.append(value)
            else:  # one that we may not even read any more (ACL) can't be held either
                outcomes.append(0 if value is None else -1)
        return outcomes


async def holders(topology: Topology, locks: list[bytes]) -> list[bytes | ReplyError | None]:
    """Who holds each lock, asked by its own GET, or what kept us from reading it.

    A key of another type is nobody's lock, as MGET says too.
    """
    replies = await topology.each(Template(b"GET", ITEM).pack, locks)
    return [None if isinstance(r, ReplyError) and r.code == "WRONGTYPE" else r for r in replies]


def raise_if_all(replies: list[bytes | ReplyError | None]) -> list[bytes | ReplyError | None]:
    """`replies` about locks; raises if no master could be asked for now, as in an outage."""
    refusals = [reply for reply in replies if isinstance(reply, ReplyError) and is_retriable(reply)]
    if refusals and len(refusals) == len(replies):
        raise refusals[0]
    return replies


async def held_locks(topology: Topology, entries: Sequence[Returning]) -> set[bytes]:
    """Locks of these entries that are held, or that we may not read."""
    locks = [lock for _, _, lock in entries if lock is not None]
    held = raise_if_all(await holders(topology, locks))
    return {key for key, value in zip(locks, held, strict=True) if value is not None}
