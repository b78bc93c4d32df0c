"""What a consumer does that can't renew its leases while Redis answers on another connection.

It reads nothing new, and hands over what it owns before the locks expire: the leader would count a
retry for each stream otherwise. An outage, in which no connection works, is none of this: nobody
could take the streams over, and the leader grants owners the time to renew when it has ended.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ending_before, lock_keys, pack
from relstream.errors import RelstreamError, ReplyError, is_retriable
from relstream.lbs.names import SEPARATOR
from relstream.notifications import Wakeup
from relstream.ownership.renewer import LeaseRenewer, Trouble, probe
from relstream.tasks import cancel_and_wait, consume_exception

if TYPE_CHECKING:
    from relstream._core import Entry
    from relstream.engine.partition import Partition
    from relstream.net.endpoint import Endpoint
    from relstream.net.topology import Topology
    from relstream.notifications import Notifications
    from relstream.ownership.capacity import Capacity

RENEWAL = "renewal"
"""The reason for which `Capacity` is closed meanwhile."""

# Parts of the TTL. Locks are renewed every half: one whose renewal is refused has half a TTL left.
# How often to look.
CHECK_EVERY_TTL = 1 / 16
# For so long the command connection must have answered before streams are handed over.
ANSWERED_FOR = 1 / 5
# A command without an answer for so long says that the server does not answer.
ANSWERS_WITHIN = 1 / 8
# A renewal may go on without an answer for so long after the server has answered a later command,
# and once more after its connection was given up.
SILENT_FOR = 1 / 16
SILENT_AGAIN_FOR = 1 / 8
# Round trips of a renewal, whose script may be unknown; with those that open a connection.
ROUND_TRIPS = 2
ROUND_TRIPS_TO_OPEN = 5
# Whatever has less left is about to expire.
ABOUT_TO_EXPIRE = 3 / 8
# Keys that are looked through for one on a given master of a cluster, and at a time.
KEYS = 100_000
KEYS_AT_ONCE = 1000


class _Answers:
    """Since when a server answers commands, on the clock of time.monotonic()."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.asked_at = 0.0
        self.confirmed_at = 0.0
        """When the last question was asked that was answered."""
        self.asking: asyncio.Task[bool] | None = None
        self.overtook: tuple[float, float] | None = None
        """When the first command that was answered ahead of a renewal sent earlier was sent, and
        when it was answered."""
        self.reopened_at: float | None = None
        """When the connection for renewals was given up, as it was silent."""


class UnrenewedLeases:
    """Closes `room`, and hands over, while leases can't be renewed though the server answers."""

    def __init__(
        self,
        renewer: LeaseRenewer,
        commands: Topology,
        partitions: Sequence[Partition],
        *,
        room: Capacity,
        notifications: Notifications,
        ttl: float,
        logger: logging.Logger,
    ) -> None:
        self._renewer = renewer
        self._commands = commands
        self._partitions = partitions
        self._capacity = room
        self._notifications = notifications
        self._ttl = ttl
        self._logger = logger
        self._failed = Wakeup()
        renewer.on_failure = self._failed.set
        self._answers: dict[Endpoint | None, _Answers] = {}
        self._pausing: asyncio.Task[Any] | None = None
        self._reported = False

    async def run(self) -> None:
        """Looks several times in a TTL, until cancelled."""
        every = min(max(self._ttl * CHECK_EVERY_TTL, 0.01), 0.5)
        try:
            while True:
                self._look()
                failed = self._failed.wait()
                try:
                    await asyncio.wait({failed}, timeout=every)
                finally:
                    failed.cancel()
        finally:
            tasks = [each.asking for each in self._answers.values() if each.asking is not None]
            await cancel_and_wait([*tasks, *([self._pausing] if self._pausing is not None else [])])

    def _look(self) -> None:
        now = time.monotonic()
        troubles = self._renewer.troubles(now)
        for server in self._answers.keys() - troubles.keys():
            task = self._answers.pop(server).asking
            if task is not None:
                task.cancel()
        # Of these it is certain, as a try to renew has failed that began while the server answered.
        certain: dict[Endpoint | None, Trouble] = {}
        for server, trouble in troubles.items():
            answers = self._answers.setdefault(server, _Answers())
            self._ask(server, answers, trouble, now)
            if answers.since is not None and self._in_vain(server, trouble, answers, now):
                certain[server] = trouble
        if not certain:
            if self._capacity.closed_for(RENEWAL) and not troubles:
                self._reported = False
                self._capacity.reopen(RENEWAL)
                self._logger.info("streams are read again, as leases can be renewed")
            return
        self._capacity.close(RENEWAL)
        if self._pausing is None or self._pausing.done():
            self._pausing = asyncio.ensure_future(self._end_reads())
            self._pausing.add_done_callback(consume_exception)
        for server, trouble in certain.items():
            since = self._answers[server].since
            if since is not None and now - since >= self._ttl * ANSWERED_FOR:
                self._hand_over(server, trouble, now)

    async def _end_reads(self) -> None:
        await asyncio.gather(*(part.fetcher.pause() for part in self._partitions))

    # --- whether the server answers ------------------------------------------------------------

    def _ask(
        self, server: Endpoint | None, answers: _Answers, trouble: Trouble, now: float
    ) -> None:
        """Goes on asking the server on the command connection, and takes note of the answer."""
        task = answers.asking
        if task is not None and task.done():
            answers.asking = None
            if task.cancelled() or not task.result():
                answers.since = answers.overtook = None
            else:
                answers.since = answers.since or now
                answers.confirmed_at = answers.asked_at
                silent_since = trouble.silent_since
                if silent_since is None or answers.asked_at <= silent_since:
                    answers.overtook = None
                elif answers.overtook is None or answers.overtook[0] <= silent_since:
                    answers.overtook = answers.asked_at, now
        elif task is not None and now - answers.asked_at > self._ttl * ANSWERS_WITHIN:
            answers.since = answers.overtook = None
        if answers.asking is None and now - answers.asked_at >= self._ttl * CHECK_EVERY_TTL:
            answers.asked_at = now
            answers.asking = asyncio.ensure_future(self._answered(server))
            answers.asking.add_done_callback(lambda _: self._failed.set())

    async def _answered(self, server: Endpoint | None) -> bool:
        """Whether the server carries out what renews a lock, or would if the user was allowed to.

        One without an answer is left under way: to give it up would break the connection.
        """
        try:
            first = self._partitions[0]
            if self._commands.single:
                (reply,) = await first.link.pipeline(probe(first.names), 1)
            elif server is None:
                # Not PING, which a node answers while the cluster is down.
                asking = pack(b"XPENDING", first.names.lbs, first.names.group, b"0-0", b"0-0", 1)
                (reply,) = await first.link.pipeline(asking, 1)
            else:
                node, key = self._key_on(server)
                (reply,) = await self._commands.to(node).pipeline(pack(b"PEXPIRE", key, 1), 1)
        except RelstreamError:
            return False
        return not (isinstance(reply, ReplyError) and is_retriable(reply))

    def _key_on(self, server: Endpoint) -> tuple[Endpoint, bytes]:
        """That master as the command connections know it, and a key there that is no lock."""
        for start in range(0, KEYS, KEYS_AT_ONCE):
            # As a lock's, for the user's rights; no entry has this id.
            keys = [b"{%d}%b0-0" % (i, SEPARATOR) for i in range(start, start + KEYS_AT_ONCE)]
            for node, some in self._commands.group_by_node(keys).items():
                if node is not None and _same(node, server):
                    return node, some[0]
        raise RelstreamError(f"{server} serves no slots")

    def _in_vain(
        self, server: Endpoint | None, trouble: Trouble, answers: _Answers, now: float
    ) -> bool:
        """Whether renewing was tried in vain while the server answered."""
        assert answers.since is not None
        # It has to answer afterwards, too: an outage may have begun with the failure.
        if not trouble.passing and answers.since < trouble.tried_at < answers.confirmed_at:
            return True
        # Far away an answer takes long, but to the first renewal before a later command.
        if trouble.silent_since is None or answers.overtook is None:
            return False
        asked_at, answered_at = answers.overtook
        round_trip = answered_at - asked_at
        if asked_at <= trouble.silent_since or (
            now - answered_at < max(self._ttl * SILENT_FOR, round_trip * ROUND_TRIPS)
        ):
            return False
        if answers.reopened_at is None:
            # The connection may have died without a word, as in an outage that is over.
            answers.reopened_at = now
            self._renewer.reopen(server)
            return False
        return now - answers.reopened_at >= max(
            self._ttl * SILENT_AGAIN_FOR, round_trip * ROUND_TRIPS_TO_OPEN
        )

    # --- handing over --------------------------------------------------------------------------

    def _hand_over(self, server: Endpoint | None, trouble: Trouble, now: float) -> None:
        # What is left of those renewed since is enough, unless they were taken since.
        before = max(trouble.since + self._ttl, now + self._ttl * ABOUT_TO_EXPIRE)
        count = 0
        for part in self._partitions:
            for head in self._there(server, ending_before(part.leases.all(), before)):
                ended = part.completer.release(head)
                ended.add_done_callback(functools.partial(self._handed_over, head))
                count += 1
        if not self._reported:
            self._reported = True
            self._logger.error(
                "leases can't be renewed (%s) though Redis answers on another connection: nothing "
                "new is read, and %d owned streams are handed over, without counting a retry; make "
                "the server accept the connection named …:renew (maxclients, firewall), and grant "
                "its user (ACL) what renews a lock: +get, +pexpire",
                trouble.error or "there is no answer", count,
            )  # fmt: skip

    def _there(self, server: Endpoint | None, heads: list[Entry]) -> list[Entry]:
        """Those of which a lock is on this server."""
        if self._commands.single or not heads:
            return heads
        if server is None:
            return []
        here: set[bytes] = set()
        entries = [*heads, *(entry for head in heads for entry in head.again or ())]
        for node, keys in self._commands.group_by_node(lock_keys(entries)).items():
            if node is not None and _same(node, server):
                here.update(keys)
        return [
            head
            for head in heads
            if head.lock_key in here or any(entry.lock_key in here for entry in head.again or ())
        ]

    def _handed_over(self, head: Entry, ended: asyncio.Future[None]) -> None:
        """The application has not asked for this; of what was lost meanwhile it knows."""
        if not ended.cancelled() and ended.exception() is None:
            self._notifications.disowned(head)


def _same(one: Endpoint, other: Endpoint) -> bool:
    return (one.host, one.port) == (other.host, other.port)
