"""Runs the services of recovery below while this consumer leads.

Of all consumers of a service one leads, and works for all: it scans the whole pending entries list
now and then, probes several times a second whether each consumer lives, and takes up what expiry
events say. Every entry goes through the same steps, `Steps`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from relstream._core import jittered
from relstream.backoff import Backoff
from relstream.errors import DeadlineExceeded, RelstreamError, ReplyError, is_retriable
from relstream.lbs.consumers import Group
from relstream.lbs.delayed import DelayedEntries
from relstream.lbs.hand_back import HandBack
from relstream.lbs.names import Names
from relstream.lbs.requeue import Requeuer
from relstream.lbs.vanished import Vanished
from relstream.net.cluster.router import ClusterTopology
from relstream.notifications import LBSInfo
from relstream.recovery.election import Leadership
from relstream.recovery.expired import ExpiredLocks
from relstream.recovery.grace import GracePeriods
from relstream.recovery.lasting import LastingLocks
from relstream.recovery.prober import Prober
from relstream.recovery.scanner import Scanner
from relstream.recovery.steps import Steps
from relstream.recovery.term import Term
from relstream.repeats import Repeats
from relstream.tasks import run_until_first_exit

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig
    from relstream.lbs.server_clock import ServerClock
    from relstream.net.topology import Topology
    from relstream.recorder import SafeRecorder


class Recoverer:
    """Recovers for all consumers of the service while it leads, and waits while another does."""

    def __init__(
        self,
        topology: Topology,
        names: Names,
        consumer: str,
        *,
        leading: Topology,
        clock: ServerClock,
        heartbeat: float,
        recovery: RecoveryConfig,
        auto_claim: bool,
        recorder: SafeRecorder | None,
        logger: logging.Logger,
    ) -> None:
        self._link = link = topology.link(names.lbs)
        # The leader key has connections of its own, which do not wait for entries.
        self._leadership = Leadership(
            leading,
            names,
            consumer.encode(),
            heartbeat,
            scans_only=not auto_claim,
            logger=logger,
        )
        self._term = Term(topology, link, leading, self._leadership, heartbeat)
        # Seconds without an answer in which no lock is lost: it is renewed every half heartbeat.
        self._bearable = min(self._leadership.lasts, heartbeat / 2)
        self._heartbeat = heartbeat
        self._clock = clock
        self._names = names
        self._auto_claim = auto_claim
        self._logger = logger
        self._requeuer = Requeuer(topology, names, recorder, logger)
        self._group = Group(topology, names, consumer, logger)
        vanished = Vanished(link, names, self._group, recorder, logger)
        self._hand_back = HandBack(link, names, self._requeuer, vanished)
        self._delayed = DelayedEntries(link, names, logger)
        self._grace_periods: GracePeriods | None = None
        if isinstance(topology, ClusterTopology):
            self._grace_periods = GracePeriods(topology, names.lbs, heartbeat)
        self._lasting = LastingLocks(topology, link, heartbeat, logger)
        # The first repeats while others lead in turn, which fail as well.
        self._leading_fails = Repeats("recovery", logger)
        self._choosing_fails = Repeats("choosing a leader", logger)
        self.steps = Steps(
            topology,
            link,
            names,
            requeuer=self._requeuer,
            vanished=vanished,
            grace_periods=self._grace_periods,
            term=self._term,
            clock=clock,
            recovery=recovery,
            recorder=recorder,
            logger=logger,
        )
        self.scanner = Scanner(
            link,
            names,
            self.steps,
            term=self._term,
            recovery=recovery,
            recorder=recorder,
            leading_fails=self._leading_fails,
            logger=logger,
        )
        self.prober = Prober(
            link,
            names,
            group=self._group,
            steps=self.steps,
            scanner=self.scanner,
            lasting=self._lasting,
            term=self._term,
            ttl_ms=round(heartbeat * 1000),
            recovery=recovery,
            leading_fails=self._leading_fails,
        )
        self._expired = ExpiredLocks(self.steps, recovery.batch_size)
        self._succeeding = True  # another led just before, or may have

    # --- for the engine -----------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this consumer recovers for all at the moment."""
        return self._term.leading

    @property
    def lasting(self) -> str | None:
        """A lock that keeps a dead owner's stream for too long, if this consumer leads."""
        return self._lasting.found if self._term.leading else None

    def expired(self, payload: LBSInfo) -> None:
        """A lock expired: its entry will be looked at, if this consumer leads and may claim."""
        if self._term.leading and self._auto_claim:
            self._expired.add(payload)

    async def claim(self, lbs_info: LBSInfo) -> None:
        """Requeues one entry whose lock has expired. See `StreamClient.claim`."""
        await self.steps.claim(lbs_info)

    async def recover(self, ids: list[bytes]) -> None:
        """Takes the steps of recovery for these entries of our own, however long they were idle."""
        await self.steps.recover(ids)

    async def hand_back(
        self, ids: list[bytes], *, never_owned: Mapping[bytes, list[bytes]] | None = None
    ) -> list[bytes]:
        """Requeues entries that nobody has locked; see `HandBack`."""
        return await self._hand_back.hand_back(ids, never_owned=never_owned)

    async def resign(self) -> None:
        """Lets another consumer lead soon."""
        await self._leadership.resign()

    async def wait_until_idle(self) -> None:
        """Waits until no entry is acknowledged that is not yet added again."""
        await self._requeuer.wait_until_idle()

    async def close(self) -> None:
        """Gives up what is between its two steps still, and logs what is lost by that."""
        await self._requeuer.close()

    # --- leading ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tries to lead, and recovers while it does, until cancelled."""
        loop = asyncio.get_running_loop()
        lasts = self._leadership.lasts
        backoff = Backoff(lasts / 16, lasts)
        failing_since = math.inf
        if self._grace_periods is None:
            # There may have been one just before we came. Who lives renews within half a lease.
            self._term.be_patient(0.5)
        while True:
            try:
                failing_since = min(failing_since, loop.time())
                before = self._leadership.fence
                leads = await self._leadership.acquire()
                continued = leads and before == self._leadership.fence
                self._succeeding = not continued
                away = loop.time() - failing_since
                failing_since = math.inf
                same = await self._term.leads_where_it_did(continued)
                if self._leadership.vanished or not same or away > self._heartbeat:
                    self._term.locks_lost()
                    self._term.outage = True
                if self._term.outage or away > self._bearable:
                    self._term.outage = True
                    await self._look_whether_it_is_back()
                    self._term.be_patient()
                    self._term.outage = False
                    if leads:  # what was judged before that is void
                        leads = await self._leadership.reacquire()
                self._choosing_fails.worked()
                if leads:
                    await self._lead()
                else:
                    self._term.locks_lost()
                    await self._leadership.check()
                backoff.reset()
                await asyncio.sleep(jittered(lasts / 4, 0.5, random.random()))
            except RelstreamError as error:
                # A connection that was closed and could be opened again at once is no outage.
                failing_since = min(failing_since, loop.time())
                if self._term.leading:
                    failing_since = min(failing_since, self._leadership.confirmed_at)
                    if self._leadership.renewed:
                        backoff.reset()
                if _tells_of_an_outage(error):
                    self._term.outage = True
                    if isinstance(error, ReplyError):
                        self._term.locks_lost()
                fails = self._leading_fails if self._term.leading else self._choosing_fails
                fails.failed("recovery failed, trying again: %s", error)
                await asyncio.sleep(backoff.failed())
            finally:
                self._term.leading = False
                self._expired.clear()

    async def _look_whether_it_is_back(self) -> None:
        """Raises unless the load balancer stream can be read; the leader key may be elsewhere."""
        await self._link.execute(b"XPENDING", self._names.lbs, self._names.group, b"0-0", b"0-0", 1)

    async def _lead(self) -> None:
        """Recovers until leadership is lost; what fails in one part ends it, too."""
        self._logger.info("this consumer recovers for the service now")
        self._term.leading = True
        parts = [
            self._keep_leading(),
            self._recover_for_ever(),
            self._group.tidy_for_ever(),
            self._delayed.run(self._clock),
        ]
        if self._grace_periods is not None:
            # Started first, so that locks on masters it has not verified yet are not judged.
            parts.insert(0, self._grace_periods.watch(succeeding=self._succeeding))
        await run_until_first_exit(*parts)

    async def _keep_leading(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            asked_at = loop.time()
            if not await self._leadership.renew():
                return
            # The server, or this process, stood still, or it may be another server, or have lost
            # keys, by a clock that was set forward, say, and so the locks of the living.
            stood_still = loop.time() - asked_at > self._bearable
            lost = self._leadership.vanished or not await self._term.leads_where_it_did(True)
            if lost:
                self._term.locks_lost()
            if lost or stood_still:
                self._term.be_patient()
                await self._leadership.reacquire()
                return
            await asyncio.sleep(self._leadership.lasts / 4)

    async def _recover_for_ever(self) -> None:
        if self._grace_periods is not None and self._succeeding:
            self._term.be_patient(0.5)
        await asyncio.sleep(self._term.patient_until - asyncio.get_running_loop().time())
        parts = [self.scanner.run()]
        if self._auto_claim:
            parts += [self._expired.run(), self.prober.run()]
        await run_until_first_exit(*parts)


def _tells_of_an_outage(error: RelstreamError) -> bool:
    """Whether locks of the living may be gone, or about to: a write was refused, or stood still."""
    if isinstance(error, ReplyError):
        # Out of memory locks are renewed all the same.
        return is_retriable(error) and error.code not in ("OOM", "FENCED", "NOSCRIPT")
    return isinstance(error, DeadlineExceeded)
