"""The reconciliation scan: walks the whole pending entries list, now and then."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from typing import TYPE_CHECKING

from relstream._core import PENDING, PendingPage, jittered
from relstream.backoff import Backoff
from relstream.errors import ReplyError, is_retriable
from relstream.lbs.names import Names, start_after
from relstream.recovery.result import ScanResult
from relstream.repeats import Repeats
from relstream.tasks import cancel_and_wait

if TYPE_CHECKING:
    from relstream.config import RecoveryConfig
    from relstream.net.topology import KeyConnection
    from relstream.recorder import SafeRecorder
    from relstream.recovery.steps import Steps
    from relstream.recovery.term import Term

# Pages that are recovered while the next one is read.
PAGES_AHEAD = 4
# Seconds before a scan that broke off is repeated; longer each time.
SCAN_AGAIN = 1.0


class Scanner:
    """Walks pending entries page by page, and takes the steps of recovery for them."""

    def __init__(
        self,
        link: KeyConnection,
        names: Names,
        steps: Steps,
        *,
        term: Term,
        recovery: RecoveryConfig,
        recorder: SafeRecorder | None,
        leading_fails: Repeats,
        logger: logging.Logger,
    ) -> None:
        self._link = link
        self._names = names
        self._steps = steps
        self._term = term
        self._recovery = recovery
        self._recorder = recorder
        self._next_scan = 0.0
        self._scanned = False
        self._scans_failed = Backoff(SCAN_AGAIN, recovery.reconciliation_interval)
        self._leading_fails = leading_fails
        self._scanning_fails = Repeats("scanning", logger)

    async def run(self) -> None:
        """Scans at once, and then at each interval, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            # Leadership may have been lost in between, and won again.
            await asyncio.sleep(self._next_scan - loop.time())
            pause = jittered(self._recovery.reconciliation_interval, 0.1, random.random())
            try:
                await self._scan()
                self._term.recovered()
                self._scans_failed.reset()
                self._scanning_fails.worked()
                self._leading_fails.worked()
            except ReplyError as error:
                pause = min(pause, self._scans_failed.failed())
                self._scanning_fails.failed(
                    "a scan broke off, the next one is in %.1f s: %s", pause, error
                )
            self._next_scan = loop.time() + pause

    async def _scan(self) -> None:
        start = time.perf_counter()
        success = False
        tally = ScanResult()
        try:
            await self.walk(round(self._recovery.min_idle_time * 1000), tally)
            success = True
        finally:
            if self._recorder is not None:
                took = time.perf_counter() - start
                if not self._scanned:
                    self._recorder.startup_recovery(
                        success=success, count=tally.requeued, duration=took
                    )
                self._recorder.reconciliation_scan(
                    requeued=tally.requeued,
                    alive=tally.alive,
                    dead_letters=tally.dead_letters,
                    vanished=tally.vanished,
                    duration=took,
                )
            self._scanned = self._scanned or success

    async def walk(
        self, min_idle_ms: int, tally: ScanResult, consumer: bytes | None = None
    ) -> None:
        """Looks at all pending entries, or those of one consumer, page by page.

        Several pages are under way at a time, so that the server has always something to do. What
        the server refuses in one page is raised when all others have been looked at.
        """
        refusal: ReplyError | None = None
        size = self._recovery.batch_size
        pages: deque[asyncio.Task[ScanResult]] = deque()
        start: bytes | None = b"-"
        try:
            while start is not None:
                page: PendingPage = await self._link.execute(
                    b"XPENDING", self._names.lbs, self._names.group, start, b"+", size,
                    *(() if consumer is None else (consumer,)), decode=PENDING,
                )  # fmt: skip
                start = start_after(page[-1][0]) if len(page) == size else None
                if len(ids := page.idle(min_idle_ms)):
                    pages.append(asyncio.ensure_future(self._steps.recover_page(ids, len(page))))
                while len(pages) > (PAGES_AHEAD if start is not None else 0):
                    try:
                        tally += await pages[0]
                    except ReplyError as error:
                        if error.code == "NOGROUP" or is_retriable(error):
                            raise
                        refusal = error
                    pages.popleft()
        finally:
            await cancel_and_wait(pages)
        if refusal is not None:
            raise refusal
