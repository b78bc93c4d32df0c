"""One load balancer stream, and all that serves it. A service has one, or several of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from relstream._core import Entry, entry_ids
from relstream.errors import PermissionDenied, RelstreamError, ReplyError, StreamNotOwned
from relstream.lbs.consumers import Group
from relstream.lbs.failures import Failures
from relstream.lbs.locks import Locks
from relstream.lbs.names import known_fields
from relstream.lbs.requeue import Requeuer
from relstream.lbs.server_clock import ServerClock
from relstream.ownership.completer import Completer
from relstream.ownership.fetcher import Fetcher
from relstream.ownership.leases import Leases
from relstream.ownership.renewer import LeaseRenewer
from relstream.recovery.coordinator import Recoverer

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig, RetryConfig
    from relstream.lbs.names import Names
    from relstream.net.topology import KeyConnection, Topology
    from relstream.notifications import Notifications
    from relstream.ownership.capacity import Capacity
    from relstream.recorder import SafeRecorder

# Seconds between audits shortly after the start, while a former life's locks live.
SOON = 0.5


class Partition:
    """Reads one load balancer stream, owns what it announces, finishes and recovers it."""

    def __init__(
        self,
        names: Names,
        consumer: str,
        *,
        commands: Topology,
        reading: KeyConnection,
        recovering: Topology,
        leading: Topology,
        locks: Locks,
        renewer: LeaseRenewer,
        notifications: Notifications,
        room: Capacity,
        heartbeat: float,
        retry: RetryConfig,
        patience: float,
        recovery: RecoveryConfig,
        auto_claim: bool,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self.names = names
        self._former = False
        self._heartbeat = heartbeat
        self._notifications = notifications
        self._logger = logger
        recovered_after = min(heartbeat, recovery.min_idle_time)
        self.link = commands.link(names.lbs)
        self.group = Group(commands, names, consumer, logger)
        self.clock = ServerClock(self.link, logger)
        self.failures = Failures(consumer, recovery, self.clock)
        self._requeuer = Requeuer(commands, names, recorder, logger)
        self.leases = Leases(
            self.link,
            locks,
            names,
            consumer,
            together=lambda: commands.together,
            recovered_after=recovered_after,
            renewer=renewer,
            on_drop=notifications.room_made.set,
            recorder=recorder,
        )
        self.completer = Completer(
            commands,
            locks,
            names,
            consumer,
            self.leases,
            renewer,
            requeuer=self._requeuer,
            dlq_max_len=recovery.dlq_max_len,
            retry=retry,
            patience=patience,
            on_lost=self._disown,
            recorder=recorder,
            logger=logger,
        )
        self.recoverer = Recoverer(
            recovering,
            names,
            consumer,
            leading=leading,
            clock=self.clock,
            heartbeat=heartbeat,
            recovery=recovery,
            auto_claim=auto_claim,
            recorder=recorder,
            logger=logger,
        )
        self.fetcher = Fetcher(
            reading,
            commands,
            names,
            consumer,
            notifications=notifications,
            capacity=room,
            acquire=self.leases.acquire,
            audit=self._put_strays_back,
            hand_back=self._return,
            unlock=self.leases.unlock,
            requeuer=self._requeuer,
            recovered_after=recovered_after,
            retry=retry,
            patience=patience,
            recovery=recovery,
            recorder=recorder,
            logger=logger,
        )

    async def create_group(self) -> None:
        """Creates stream and group unless they are there; raises with a remedy what prevents it."""
        try:
            await self.fetcher.create_group()
        except ReplyError as error:
            if error.code == "NOPERM":
                raise PermissionDenied(
                    f"the user may not create the consumer group ({error}): grant +xgroup"
                ) from None
            if error.code == "WRONGTYPE":
                raise ReplyError(
                    f"{error}: {self.names.lbs.decode()!r} exists and is no stream; remove it, or "
                    "choose another service_name"
                ) from None
            if error.code == "OOM":
                lbs = self.names.lbs.decode()
                raise ReplyError(
                    f"{error} So the consumer group of {lbs!r} can't be created"
                ) from None
            if error.code == "READONLY":
                raise ReplyError(
                    f"{error} {self.link.endpoint} is a replica: give the address of its master"
                ) from None
            raise

    def _disown(self, head: Entry) -> None:
        owned = self.leases.get(head.data_stream_name) is head
        self.leases.drop([head], "lost")
        if owned:
            self._notifications.disowned(head)

    def locks_lost(self, keys: list[bytes]) -> None:
        """Locks were found expired or taken, and their entries are not ours any more."""
        gone = set(keys)
        lost: list[tuple[Entry, list[Entry]]] = []
        for key in keys:
            head = self.leases.by_lock(key)
            if head is not None and not head.finishing:
                others = [entry for entry in head.again or () if entry.lock_key not in gone]
                if head.lock_key not in gone:
                    others.append(head)
                lost.append((head, others))
                head.finishing = True  # seen
        self.lose(lost)

    def lose(self, lost: list[tuple[Entry, list[Entry]]]) -> None:
        """Streams are lost, each with one of its entries; its others go back."""
        for head, others in lost:
            self._disown(head)
            self.completer.requeue_rest(head, others)
        if lost:
            names = [head.data_stream_name for head, _ in lost]
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            self._logger.warning("lost %d streams: %s", len(names), shown)

    async def audit(self, min_idle: float = 0.0) -> list[bytes]:
        """Tells of what is lost; returns ids of what we have read and do not own.

        What was delivered under our name before we lived is recovered where nobody holds its lock,
        and a retry counted, as it may be what ended that life. It is not ours: whoever bore the
        name may only be frozen, and must not share an id, and so a lock, with us.
        """
        lost, strays, former = await self.leases.audit(min_idle)
        self.lose([(head, [head, *head.again] if head.again else []) for head in lost])
        self._former = bool(former)
        try:
            await self.recoverer.recover(former)
        except RelstreamError as error:
            self._logger.debug("a former life's entries wait for the next audit: %s", error)
        return strays

    async def give_up(self, *, finish: bool, alone: bool, led: bool) -> None:
        """Finishes or hands over all streams, and leaves the group; raises what kept it from that.

        Only the completer runs still. `finish`: streams that were notified are finished. `alone`:
        no other living consumer has this name. `led`: this consumer may have been the leader.
        """
        ending = []
        for head in self.leases.all():
            if not head.finishing:
                worked_on = finish and head.delivered
                ending.append((self.completer.done if worked_on else self.completer.release)(head))
        outcomes = await asyncio.gather(*ending, return_exceptions=True)
        await self.completer.idle()  # completes earlier calls of the application, too
        await self.wait_until_idle()
        await self.completer.delete_receipts()
        # Read by this consumer but not owned: a reply that got lost, a lock that was refused.
        await self.fetcher.admission.leave()
        with contextlib.suppress(ReplyError):  # the group is gone, say, and nothing is pending
            await self.recoverer.hand_back(await self.audit())
        if alone:
            await self.group.leave()
        if led:
            await self.recoverer.resign()
        for outcome in outcomes:
            if isinstance(outcome, RelstreamError) and not isinstance(outcome, StreamNotOwned):
                raise outcome

    async def wait_until_idle(self) -> None:
        """Waits until nothing is acknowledged that is not yet added again."""
        await self._requeuer.wait_until_idle()
        await self.recoverer.wait_until_idle()

    async def close(self) -> None:
        """Gives that up; for after all else has ended."""
        await self._requeuer.close()
        await self.recoverer.close()

    async def audit_for_ever(self) -> None:
        """Compares, every heartbeat, what is owned with what the server says is pending for us."""
        loop = asyncio.get_running_loop()
        settled = loop.time() + 3 * self._heartbeat
        while True:
            # The locks of a former life expire one of these moments.
            soon = self._former and loop.time() < settled
            await asyncio.sleep(min(SOON, self._heartbeat) if soon else self._heartbeat)
            try:
                await self.clock.refresh()
                # Younger ones may be on their way to us.
                await self._put_strays_back(self._heartbeat)
            except RelstreamError as error:
                self._logger.debug("no audit this time: %s", error)

    async def _put_strays_back(self, min_idle: float = 0.0) -> None:
        """What we have read and do not own goes to whoever reads next, under a new id.

        It may be another's who bears our name and was frozen: an id must not be shared with it.
        """
        strays = await self.audit(min_idle)
        in_hand = self.fetcher.admission.in_hand()
        try:
            await self.recoverer.hand_back([each for each in strays if each not in in_hand])
        except RelstreamError as error:
            self._logger.debug("strays could not be put back yet: %s", error)

    async def _return(self, entries: list[Entry]) -> list[bytes]:
        """Puts back what we have read and could not lock; returns ids of what stays pending."""
        ids = entry_ids(entries)
        try:
            return await self.recoverer.hand_back(
                ids, never_owned={entry.id: known_fields(entry) for entry in entries}
            )
        except RelstreamError as error:
            self._logger.debug("%d entries could not be put back yet: %s", len(ids), error)
            return ids
