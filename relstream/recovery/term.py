"""The leader's term: whether this consumer leads, and whether it may judge now."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from relstream.errors import ConnectionLost, ReplyError
from relstream.net.identity import Server
from relstream.recovery.election import Leadership

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection, Topology


class Term:
    """Whether this consumer leads, what proves it, and until when owners have time to renew.

    Shared by all services of the recovery: a judgement is carried out only under the leadership
    under which it was made.
    """

    def __init__(
        self,
        topology: Topology,
        link: KeyConnection,
        leading: Topology,
        leadership: Leadership,
        ttl: float,
    ) -> None:
        # A cluster's masters are watched by `GracePeriods`.
        self._server = Server(topology.to(link.endpoint)) if topology.single else None
        self._leading_server = Server(leading.to(link.endpoint)) if leading.single else None
        self._link = link
        self._ttl = ttl
        self.leadership = leadership
        self.leading = False
        """Whether this consumer leads at the moment."""
        self.outage = False
        """Whether locks of living owners may be gone: there was an outage, not over for long."""
        self.patient_until = 0.0
        """Until when (loop time) nobody is judged, so that living owners can renew."""
        # The first sign of an outage since recovery was done last; none where locks are known to be
        # lost, as then their owners have the whole time anew.
        self._first_sign = math.inf

    def check_leadership(self, leading: bool) -> None:
        """Raises where a consumer that was `leading` can't tell whether another leads by now."""
        if leading and not self.leadership.confirmed:
            raise ReplyError("FENCED leadership was not confirmed in time")

    def locks_lost(self) -> None:
        """Locks are known to be lost: their owners have the whole time to renew, from now on."""
        self._first_sign = math.inf

    def recovered(self) -> None:
        """Recovery was done: the next sign of an outage is a new one."""
        self._first_sign = math.inf

    def be_patient(self, leases: float = 1.0) -> None:
        """Owners get so many leases of time to renew, counted from the first sign of an outage.

        A server that stands still now and then would let nobody be recovered otherwise.
        """
        self._first_sign = min(self._first_sign, asyncio.get_running_loop().time())
        self.patient_until = max(self.patient_until, self._first_sign + leases * self._ttl)

    async def leads_where_it_did(self, continued: bool) -> bool:
        """Whether the server is the one it was, though a connection to it was opened anew.

        Where it does not tell, that our leadership has `continued` proves it.
        """
        same = None if self._leading_server is None else await self._leading_server.same()
        return self._leading_server is None or (continued if same is None else same)

    async def check_connection(self) -> None:
        """Raises if what leads has another server than when it began.

        Locks there are not those that were renewed, until their owners have noticed, too.
        """
        if not self.leading or self._server is None:
            return
        same = await self._server.same()
        fence = self.leadership.fence
        if same is None and fence is not None:  # where we still lead it has been all the time
            same = await self._link.execute(b"GET", fence.key) == fence.value
        if self.outage or not same:
            self.outage = True
            self.locks_lost()
            raise ConnectionLost("the connection leads to another server, or it was restarted")
