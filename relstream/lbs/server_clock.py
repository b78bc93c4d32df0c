"""The server's clock, as far as a consumer has to know it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from relstream.errors import ProtocolError, ReplyError
from relstream.lbs.permissions import Denied

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection


class ServerClock:
    """Tells the time of one server (TIME), without asking it each time.

    Ids of entries and due times are on this clock: clocks of machines are never compared. Where
    TIME is forbidden this machine's clock has to do.
    """

    def __init__(self, link: KeyConnection, logger: logging.Logger) -> None:
        self._link = link
        self._logger = logger
        self._ahead_ms: float | None = None  # of `time.monotonic()`
        self._no_time = Denied(link)

    def now_ms(self) -> int:
        """Milliseconds since 1970. Never behind the server, and ahead by a round trip at most."""
        if self._ahead_ms is None:
            return int(time.time() * 1000)
        return int(time.monotonic() * 1000 + self._ahead_ms) + 1

    async def refresh(self) -> None:
        """Asks the server; raises what `KeyConnection.execute` raises."""
        if self._no_time:
            return
        asked_at = time.monotonic()
        try:
            reply = await self._link.execute(b"TIME")
        except ReplyError as error:
            if error.code != "NOPERM":
                raise
            if self._no_time.remember():
                self._logger.warning(
                    "TIME is not permitted (%s): this machine's clock is used to count retries "
                    "within `retry_window` and to delay failed streams; grant +time",
                    error,
                )
            return
        try:
            seconds, micros = map(int, reply)
        except (TypeError, ValueError):
            raise ProtocolError(f"{reply!r:.80} answers TIME") from None
        self._ahead_ms = seconds * 1000 + micros / 1000 - asked_at * 1000
