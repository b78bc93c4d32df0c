"""What a scan did."""

from __future__ import annotations

from relstream.errors import ReplyError


class ScanResult:
    """What became of the entries that were looked at."""

    __slots__ = ("alive", "dead_letters", "refusals", "requeued", "vanished")

    def __init__(self) -> None:
        self.requeued = self.alive = self.dead_letters = self.vanished = 0
        self.refusals: list[ReplyError] = []
        """Why entries stay pending whose turn it was, one a batch."""

    def __iadd__(self, other: ScanResult) -> ScanResult:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self
