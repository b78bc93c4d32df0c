"""Requeues pending entries: adds them under new ids, acknowledges and deletes the old ones.

Used by recovery, by an owner that hands a stream over, and by a reader that can't lock an entry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import Plan, key_slot, pack
from relstream.errors import ReplyError
from relstream.lbs.dead_letter import DeadLetterQueue
from relstream.lbs.entries import ALIVE, NOT_BY_SCRIPT, REFUSED, REQUEUED, Fence, Returning
from relstream.lbs.locks import held_locks
from relstream.lbs.names import Names
from relstream.lbs.permissions import Denied, refused
from relstream.lbs.scripts import REQUEUE, SCRIPT_KEYS, run_packed
from relstream.lbs.two_phase import TwoPhaseRequeue, check_fence
from relstream.net.replies import raise_first

if TYPE_CHECKING:
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder

# A call of the script carries about so many bytes at most.
SCRIPT_BYTES = 1 << 20


class Requeuer:
    """Requeues pending entries, one atomic step an entry: the script; else by `TwoPhaseRequeue`."""

    def __init__(
        self,
        topology: Topology,
        names: Names,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._topology = topology
        self._link = topology.link(names.lbs)
        self._names = names
        self._recorder = recorder
        self._logger = logger
        self._no_scripts = Denied(self._link)
        self.dead_letters = DeadLetterQueue(topology, names, recorder, logger)
        self._two_phase = TwoPhaseRequeue(topology, names, self.dead_letters, recorder, logger)

    async def requeue(
        self, entries: Sequence[Returning], *, fence: Fence | None = None
    ) -> list[int]:
        """For each entry REQUEUED, LOST (it was not pending) or ALIVE (locked).

        One without any fields is only acknowledged and deleted. Raises `ReplyError`, once all
        others are put back, when the server refuses that of some; they stay pending. With a `fence`
        nothing is done (FENCED) once that does not hold any more.
        """
        outcomes: list[int]
        if self._topology.together:
            outcomes, refusal = await self._put(self._calls(entries, fence), lambda: entries, fence)
        else:
            outcomes, refusal = await self._requeue_by_node(entries, fence)
        if refusal is not None:
            raise refusal
        return outcomes

    async def route_to_dlq(
        self,
        letters: Sequence[Returning],
        max_len: int,
        reason: bytes,
        *,
        fence: Fence | None = None,
    ) -> list[int]:
        """Moves pending entries to the dead-letter stream; returns what `put` does.

        They are added there before they are acknowledged here: a crash between may put one there
        twice, with the same `_source_id`, and can't lose it. Who finds that another was first, or
        that its owner lives, takes back what it has added. Raises `ReplyError` when the dead-letter
        stream can't be written; the entries stay pending.
        """
        copies = await self.dead_letters.add(
            [(entry_id, pairs, reason) for entry_id, pairs, _ in letters], max_len
        )
        ours: list[tuple[Returning, bytes]] = [
            ((entry_id, [], lock), copy)
            for (entry_id, _, lock), copy in zip(letters, copies, strict=True)
            if not isinstance(copy, ReplyError)
        ]
        outcomes: list[int] = []
        # One call at a time: where it is forbidden, nothing of it was done.
        for start in range(0, len(ours), SCRIPT_KEYS):
            entries = [entry for entry, _ in ours[start : start + SCRIPT_KEYS]]
            try:
                outcomes += await self.requeue(entries, fence=fence)
            except ReplyError as error:
                if error.code == "FENCED":  # another leader sees to them
                    await self.dead_letters.delete([copy for _, copy in ours[start:]])
                raise
        await self.dead_letters.delete(
            [c for (_, c), outcome in zip(ours, outcomes, strict=True) if outcome != REQUEUED]
        )
        raise_first(copies)
        return outcomes

    async def requeue_planned(
        self,
        plan: Plan,
        *,
        counting: bool,
        looked: bool,
        locked: bool = True,
        fence: Fence | None = None,
    ) -> tuple[list[int], ReplyError | None]:
        """The same for what the plan says shall be put back; `counting`: with one more retry.

        `looked`: their locks were seen free just now, with nothing awaited since; not `locked`: no
        lock can be anybody's. What could not be put back is REFUSED, and the reason of one of these
        is returned as well.
        """
        together = self._topology.together

        def entries() -> Sequence[Returning]:
            returning: Sequence[Returning] = plan.returning(counting)
            if locked or together:
                return returning
            return [(entry_id, pairs, None) for entry_id, pairs, _ in returning]

        if not together and not looked:
            return await self._requeue_by_node(entries(), fence)
        here = self._here(fence)
        calls = plan.calls(
            REQUEUE.digest, self._names.lbs, self._names.group,
            counting=counting, locks=together, most=SCRIPT_KEYS, size=SCRIPT_BYTES,
            leader=here and here.key, fence=here.value if here else b"",
        )  # fmt: skip
        return await self._put(calls, entries, fence)

    def _here(self, fence: Fence | None) -> Fence | None:
        """The fence, if a script on the load balancer stream can look at it."""
        if fence is None or self._topology.together:
            return fence
        return fence if key_slot(fence.key) == key_slot(self._names.lbs) else None

    async def _requeue_by_node(
        self, entries: Sequence[Returning], fence: Fence | None
    ) -> tuple[list[int], ReplyError | None]:
        """The locks are on other servers than the script: they are looked at just before it."""
        taken = await held_locks(self._topology, entries)
        free = [(entry_id, pairs, None) for entry_id, pairs, lock in entries if lock not in taken]
        told, refusal = await self._put(self._calls(free, fence), lambda: free, fence)
        outcomes = iter(told)
        return [ALIVE if lock in taken else next(outcomes) for _, _, lock in entries], refusal

    async def _put(
        self,
        calls: list[bytes],
        entries: Callable[[], Sequence[Returning]],
        fence: Fence | None,
    ) -> tuple[list[int], ReplyError | None]:
        outcomes: list[int] = []
        refusal: ReplyError | None = None
        denied = bool(self._no_scripts)
        if fence is not None and self._here(fence) is None:
            await check_fence(self._topology, fence)
        if not denied:
            for call, reply in zip(
                calls, await run_packed(self._link, REQUEUE, calls), strict=True
            ):
                if not isinstance(reply, ReplyError):
                    for outcome in reply:
                        if isinstance(outcome, bytes):
                            refusal = ReplyError(outcome.decode(errors="replace").removeprefix("-"))
                            outcome = REFUSED
                        outcomes.append(outcome)
                elif not refused(reply):
                    raise reply
                elif reply.about_keys:  # one of these locks: for once, in two steps
                    keys = int(call[:200].split(b"\r\n")[6]) - 1
                    if self._here(fence) is not None:
                        keys -= 1
                    if not keys:
                        raise reply
                    outcomes += [NOT_BY_SCRIPT] * keys
                else:
                    denied = True
                    if self._no_scripts.remember():
                        self._logger.warning(
                            "scripts are forbidden (%s): entries are put back in two steps; grant "
                            "+evalsha, +eval and +mget to make that one atomic step",
                            reply,
                        )
                    break
        if denied or NOT_BY_SCRIPT in outcomes:
            told = entries()
            outcomes += [NOT_BY_SCRIPT] * (len(told) - len(outcomes))
            others = [i for i, outcome in enumerate(outcomes) if outcome == NOT_BY_SCRIPT]
            try:
                steps = await self._two_phase.requeue([told[i] for i in others], fence)
            except ReplyError as error:
                # What shall become a dead letter still can where nothing can be added any more.
                if len(others) == len(outcomes) and not error.exhausted:
                    raise
                refusal = error
                steps = [REFUSED] * len(others)
            for i, outcome in zip(others, steps, strict=True):
                outcomes[i] = outcome
        return outcomes, refusal

    def _calls(self, entries: Sequence[Returning], fence: Fence | None) -> list[bytes]:
        here = self._here(fence)
        first = [self._names.lbs] if here is None else [self._names.lbs, here.key]
        value = b"" if here is None else here.value
        calls: list[tuple[list[bytes], list[Any]]] = []
        size = held = fields = 0
        for entry_id, pairs, lock in entries:
            if not calls or held >= SCRIPT_KEYS or size >= SCRIPT_BYTES or len(pairs) != fields:
                fields = len(pairs)
                calls.append(([*first], [self._names.group, fields, value]))
                size = held = 0
            keys, args = calls[-1]
            if lock is not None:
                keys.append(lock)
            args += (entry_id, *pairs)
            held += 1
            size += sum(map(len, pairs))
        return [pack(b"EVALSHA", REQUEUE.digest, len(keys), *keys, *args) for keys, args in calls]

    async def wait_until_idle(self) -> None:
        """Waits until no entry is acknowledged that is not yet added again."""
        await self._two_phase.wait_until_idle()

    async def close(self) -> None:
        """Gives up what is between its two steps still, and logs what is lost by that."""
        await self._two_phase.close()
