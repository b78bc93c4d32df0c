"""Whether a connection that was opened anew leads to the same server as before."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relstream.net.connection import Connection


class Server:
    """The server at the other end of a link, as it is known by its `run_id`.

    Another one, or one that was restarted, has heard of no renewal for a while, or has lost locks;
    one whose connections a proxy recycles has not.
    """

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._generation = 0
        self._run_id: bytes | None = None

    async def same(self) -> bool | None:
        """Whether it is the one that it was when this was asked last; None where it won't tell."""
        generation = self._link.generation
        if generation == self._generation:
            return True
        first, before = not self._generation, self._run_id
        run_id = await self._link.run_id()
        self._generation, self._run_id = generation, run_id
        if first:
            return True
        return None if run_id is None else run_id == before
