"""The connections of one client: one for each kind of work that must not wait for another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relstream.lbs.names import Names
    from relstream.net.deployment import Deployment


class Connections:
    """Topologies over which a client works, each with connections of its own."""

    def __init__(
        self, deployment: Deployment, names: Sequence[Names], consumer: str, heartbeat: float
    ) -> None:
        guide = self.guide = deployment.guide()
        # A hung master must not delay locks on the other masters until they have expired.
        quick = deployment
        if deployment.nodes:
            quick = deployment.with_timeout(max(heartbeat / 2, 0.5))
        self.commands = quick.open(f"{consumer}:command", guide)
        # A blocked read needs a connection of its own.
        self.reads = [deployment.open(f"{consumer}:read", guide) for _ in names]
        self.recovering = quick.open(f"{consumer}:recover", guide)
        self.leading = deployment.open(f"{consumer}:lead", guide)

    def keep_apart(self) -> None:
        """No command may have keys of several slots."""
        for topology in (self.commands, self.recovering, self.leading, *self.reads):
            topology.together = False

    async def close(self) -> None:
        """Closes them all."""
        await asyncio.gather(
            self.recovering.close(),
            self.leading.close(),
            *(reads.close() for reads in self.reads),
            self.commands.close(),
        )
