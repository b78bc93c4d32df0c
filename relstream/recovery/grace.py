"""Masters of a cluster that renew nothing for a while: locks there go, though owners live."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING

from relstream._core import pack
from relstream.errors import ConnectionLost, RelstreamError, ReplyError
from relstream.lbs.names import SEPARATOR
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.net.cluster.router import ClusterTopology
    from relstream.net.connection import Connection
    from relstream.net.endpoint import Endpoint

# Seconds between two questions to each master, at most.
ASK_EVERY = 0.2
# Keys that are looked through for one on each master. One with too few slots is only pinged.
KEYS = 100_000
KEYS_AT_ONCE = 1000


class GracePeriods:
    """Asks every master several times a second, over the connections that ask for locks.

    So whoever asks for locks of one that hung hears of that first. Asked is for what renews a lock,
    as one that refuses to write (NOREPLICAS, say) still tells who holds which: for the renewal of a
    key of ours, which lives as long as a lock does. Where that is gone before its time locks are,
    too, by a clock that was set forward, say. After an outage, a failover, and whatever a leader
    before us may have seen, owners have the time of a `lease` (seconds) to renew theirs before they
    count as free.
    """

    def __init__(self, topology: ClusterTopology, lbs: bytes, lease: float) -> None:
        self._topology = topology
        self._lbs = lbs
        self._lease = lease
        self._lease_ms = round(lease * 1000)
        # Seconds of silence by which no lock is lost: it is renewed every half lease.
        self._bearable = lease / 4
        self._every = min(ASK_EVERY, lease / 8)
        self._watching = False
        self._woke_at = 0.0
        # Until when (loop time) locks on these masters may be missing; and when that began of which
        # nobody knows whether locks were lost by it, until they were asked for again.
        self._until: dict[Endpoint, float] = {}
        self._first_sign: dict[Endpoint, float] = {}
        # When those were first asked that have not answered since; long ago if they hung up on us.
        self._asked_at: dict[Endpoint, float] = {}
        # How often the connections had been opened on which they answered last, and who answered.
        self._generation: dict[Endpoint, int] = {}
        self._run_ids: dict[Endpoint, bytes | None] = {}
        # A key on each that is no lock; None where none was found. Until when those live that we
        # have written (loop time).
        self._keys: dict[Endpoint, bytes | None] = {}
        self._living: dict[Endpoint, float] = {}
        self._forbidden = False  # such keys, to the user

    async def watch(self, *, succeeding: bool) -> None:
        """Asks until cancelled; `succeeding` another who did, and may have known of an outage.

        Else what was known when this ended last is known still.
        """
        now = asyncio.get_running_loop().time
        self._asked_at.clear()
        if succeeding:
            self._forget()
        self._compare()
        if succeeding:
            # Not a whole lease, or the dead leader's own streams would be late: its key had to
            # expire first. What was missed is renewed within half a lease by all who live.
            self._until = dict.fromkeys(self._until, now() + self._lease / 2)
        self._woke_at = now()
        # One that answers late now may have been silent for long.
        known = [master for master in self._until if self._topology.to(master).alive]
        self._asked_at.update(dict.fromkeys(known, now() - self._bearable / 2))
        asking: dict[Endpoint, asyncio.Task[None]] = {}
        self._watching = True
        try:
            while True:
                self._compare()
                for master in self._until:
                    if master not in asking or asking[master].done():
                        asking[master] = asyncio.ensure_future(self._ask(master))
                for master in [master for master in asking if master not in self._until]:
                    asking.pop(master).cancel()
                await asyncio.sleep(self._every)
                late = self._late()
                for master in self._asked_at:
                    self._asked_at[master] += late
                self._woke_at = now()
        finally:
            self._watching = False
            await cancel_and_wait(asking.values())

    def _forget(self) -> None:
        self._until.clear()
        self._first_sign.clear()
        self._generation.clear()
        self._run_ids.clear()
        self._living.clear()
        self._forbidden = False

    def _late(self) -> float:
        """Seconds for which this event loop was kept from hearing any answer."""
        awake = asyncio.get_running_loop().time() - self._woke_at
        return max(awake - self._every, 0.0)

    def _silent(self, master: Endpoint) -> bool:
        """Whether this one left a question unanswered for too long, or has not said yet it did not.

        One that was restarted in between two questions has no locks any more: until it has told who
        it is nobody knows.
        """
        if self._opened_anew(master):
            return True
        asked_at = self._asked_at.get(master, math.inf)
        silence = asyncio.get_running_loop().time() - asked_at - self._late()
        return silence > self._bearable

    def _opened_anew(self, master: Endpoint) -> bool:
        generation = self._topology.to(master).generation
        return generation != self._generation.get(master, generation)

    def _compare(self) -> None:
        """One that came as another went replaces it; else slots have moved, with their locks."""
        masters = self._topology.slots.masters
        gone = self._until.keys() - set(masters)
        for master in gone:
            del self._until[master]
            self._first_sign.pop(master, None)
            self._asked_at.pop(master, None)
            self._generation.pop(master, None)
            self._run_ids.pop(master, None)
            self._living.pop(master, None)
        for master in masters:
            if master not in self._until:
                self._until[master] = -math.inf
                if gone:
                    self._wait_for_owners(master, lost=True)

    def _wait_for_owners(self, master: Endpoint, *, lost: bool) -> None:
        """They have a lease's time to renew: anew where locks are `lost`, else from the first sign.

        One that stands still now and then would let nobody be recovered otherwise.
        """
        now = asyncio.get_running_loop().time()
        since = now if lost else self._first_sign.setdefault(master, now)
        self._until[master] = max(self._until[master], since + self._lease)

    async def _ask(self, master: Endpoint) -> None:
        self._asked_at.setdefault(master, asyncio.get_running_loop().time())
        sent_at = asyncio.get_running_loop().time()
        try:
            link = self._topology.to(master)
            (reply,) = await link.pipeline(self._question(master), 1)
            known = master in self._run_ids and not self._opened_anew(master)
            generation = link.generation
            run_id = self._run_ids[master] if known else await link.run_id()
        except RelstreamError as error:
            # One that ends connections, as proxies do, or hangs, tells next time who it is.
            if master in self._until and not isinstance(error, ConnectionLost):
                self._asked_at[master] = -math.inf  # it may come back without any locks
            return
        if isinstance(reply, ReplyError) and reply.transient:
            return
        if master not in self._until:  # it was replaced meanwhile
            return
        if isinstance(reply, ReplyError) and reply.about_keys:
            self._forbidden = True
            self._keys.clear()
        living = sent_at < self._living.get(master, -math.inf)
        if reply == 0 and living:
            self._wait_for_owners(master, lost=True)
        # Where it does not tell who it is, that it has lost nothing proves that it is the same.
        same = run_id == self._run_ids.get(master, run_id)
        same = living and reply == 1 if run_id is None else same
        if same:
            self._generation[master] = generation
        if self._silent(master):
            lost = not same or self._asked_at.get(master) == -math.inf
            self._wait_for_owners(master, lost=lost)
        if reply == 1:
            self._living[master] = sent_at + self._lease
        elif reply == 0 and not self._forbidden:
            await self._write(master, link)
        self._generation[master] = generation
        self._run_ids[master] = run_id
        self._asked_at.pop(master, None)

    def _question(self, master: Endpoint) -> bytes:
        """What changes nothing, and is answered as the renewal of a lock would be."""
        key = self._keys.get(master)
        moved = key is not None and master not in self._topology.group_by_node([key])
        if moved or master not in self._keys:
            self._find_keys()
            self._living.pop(master, None)
            key = self._keys.get(master)
        return pack(b"PING") if key is None else pack(b"PEXPIRE", key, self._lease_ms)

    async def _write(self, master: Endpoint, link: Connection) -> None:
        """Writes the key of ours, which is not there, or not any more."""
        key = self._keys.get(master)
        self._living.pop(master, None)
        if key is None:
            return
        sent_at = asyncio.get_running_loop().time()
        with contextlib.suppress(RelstreamError):  # out of memory, say
            write = pack(b"SET", key, b"1", b"PX", self._lease_ms)
            if (await link.pipeline(write, 1))[0] == b"OK":
                self._living[master] = sent_at + self._lease

    async def look_again(self, locks: list[bytes]) -> None:
        """Asks the masters of these locks, just seen to be free, before anybody judges by that."""
        if not self._watching:
            return
        self._compare()
        masters = [
            master for master in self._topology.group_by_node(locks) if master in self._until
        ]
        await asyncio.gather(*map(self._ask, masters))

    def _find_keys(self) -> None:
        self._keys = dict.fromkeys(self._until)
        missing = set(self._until)
        for start in range(0, KEYS, KEYS_AT_ONCE):
            # No lock's, or the reference would take it for one. Where that is forbidden one that is
            # named as a lock, which is never written: no entry has this id.
            end = SEPARATOR + b"0-0" if self._forbidden else self._lbs + b"-alive"
            keys = [b"{%d}%b" % (i, end) for i in range(start, start + KEYS_AT_ONCE)]
            for master, some in self._topology.group_by_node(keys).items():
                if master in missing:
                    missing.remove(master)
                    self._keys[master] = some[0]
            if not missing:
                return

    def unreachable(self, locks: list[bytes]) -> None:
        """Masters of these could not be asked who holds them."""
        self._compare()
        for master in self._topology.group_by_node(locks):
            if master in self._until:
                self._wait_for_owners(master, lost=True)

    def unverifiable(self, locks: list[bytes]) -> set[bytes]:
        """Those of the locks that may be missing though their owners live, as far as is watched."""
        if not self._watching:
            return set()
        self._compare()
        now = asyncio.get_running_loop().time()
        dark = {m for m, until in self._until.items() if now < until or self._silent(m)}
        apart = self._topology.group_by_node(locks).items() if dark or self._first_sign else ()
        for master, _ in apart:
            if master in self._first_sign and master not in dark:
                del self._first_sign[master]
        return {key for master, keys in apart if master in dark for key in keys}
