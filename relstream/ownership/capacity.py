"""How much more a consumer takes, and who of those that read for it is next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relstream.notifications import Notifications


class Capacity:
    """How many more streams this consumer can take; shared by those that read for it.

    What is asked for is set aside, so that together they never take too many; and who found none is
    the next to get some, or one for whom nothing comes would take the last of it again and again.
    """

    def __init__(
        self,
        notifications: Notifications,
        owned: Callable[[], int],
        max_streams: int | None,
        readers: int,
    ) -> None:
        self._notifications = notifications
        self._owned = owned
        self._max_streams = max_streams
        self._readers = readers
        self._in_hand = 0
        self._waiting: dict[object, None] = {}  # readers, in the order in which they came
        self._closed: set[str] = set()  # reasons for which nothing more is taken

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken, for whatever reason."""
        return bool(self._closed)

    def closed_for(self, reason: str) -> bool:
        """Whether nothing more is taken for this reason."""
        return reason in self._closed

    @property
    def in_hand(self) -> int:
        """Streams that are asked for, or being locked."""
        return self._in_hand

    def close(self, reason: str) -> None:
        """There is no room, however few streams are owned, until `reopen` with the same reason."""
        self._closed.add(reason)

    def reopen(self, reason: str) -> None:
        """This reason holds no more."""
        if reason in self._closed:
            self._closed.discard(reason)
            self._notifications.room_made.set()

    def available_for(self, reader: object) -> int:
        """How many this reader may ask for now."""
        room = self._left()
        for ahead in self._waiting:
            if ahead is reader:
                break
            room -= 1
        return room if room <= 1 else max(1, room // self._readers)

    def _left(self) -> int:
        if self._closed:
            return 0
        room = self._notifications.room - self._in_hand
        if self._max_streams is not None:
            room = min(room, self._max_streams - self._owned() - self._in_hand)
        return room

    def all_taken(self) -> bool:
        """Whether another reader would find none."""
        return self._readers > 1 and self._left() <= 0

    def wait_turn(self, reader: object) -> None:
        """This reader found none, and waits until `room_made` is set."""
        self._waiting.setdefault(reader)

    def end_turn(self, reader: object) -> None:
        """This reader waits no more, or does something else first."""
        if reader in self._waiting:
            del self._waiting[reader]
            self._notifications.room_made.set()

    def reserve(self, count: int) -> None:
        """So many are asked for, or taken."""
        self._in_hand += count

    def release(self, count: int) -> None:
        """So many did not come, or have got to where they count by themselves."""
        self._in_hand -= count
        if self._readers > 1:
            self._notifications.room_made.set()

    def full(self) -> bool:
        """Whether this consumer owns all that it may."""
        return self._max_streams is not None and self._owned() >= self._max_streams
