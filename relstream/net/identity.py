"""Whether a connection that was opened anew leads to the same server as before."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relstream.net.connection import Link


class Server:
    """The server at the other end of a link, as it is known by its `run_id`.

    Another one, or one that was restarted, has heard of no renewal for a while, or has lost locks;
    one whose connections a proxy recycles has not.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._openings = 0
        self._run_id: bytes | None = None

    async def same(self) -> bool | None:
        """Whether it is the one that it was when this was asked last; None where it won't tell."""
        openings = self._link.openings
        if openings == self._openings:
            return True
        first, before = not self._openings, self._run_id
        run_id = await self._link.run_id()
        self._openings, self._run_id = openings, run_id
        if first:
            return True
        return None if run_id is None else run_id == before
