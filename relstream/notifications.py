"""What the application hears, and the bounded queue it hears it through."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from relstream._core import Deliveries, Entry

__all__ = ["LBSInfo", "Notification", "NotificationType", "Notifications"]

# Info objects waiting in the queue may take this much, however few they are.
MAX_WAITING_BYTES = 64 << 20


class NotificationType(enum.Enum):
    """What a notification says."""

    STREAM_ADDED = "stream_added"
    """This consumer now owns the stream. Never dropped."""
    STREAM_EXPIRED = "stream_expired"
    """Some lock expired. Informational: dropped, and counted, when the queue is full."""
    STREAM_DISOWNED = "stream_disowned"
    """This consumer has lost the stream and must stop working on it. Never dropped."""
    STREAM_TERMINATED = "stream_terminated"
    """The last one: `additional_info["info"]` is the reason."""


# Every loop over notifications looks at them, and before Python 3.12 each look runs Python code.
for _member in NotificationType:
    type.__setattr__(NotificationType, _member.name, _member)


class LBSInfo(NamedTuple):
    """An announcement of a data stream in the load balancer stream."""

    data_stream_name: str
    id_in_lbs: str
    """The id of the LBS entry, `<ms>-<seq>`. It only grows: a fencing token."""


class Notification(NamedTuple):
    """One thing the application should know."""

    type: NotificationType
    payload: LBSInfo
    additional_info: dict[str, Any] | None
    """The announced `Info` of a stream that this consumer owns or owned; the reason of a
    termination."""
    retry_count: int = 0
    """How often the stream was requeued, after a death or a failure: its entry's `_retry_count`."""


def _about(kind: NotificationType, payload: LBSInfo, entry: Entry | None) -> Notification:
    if entry is None:
        return Notification(kind, payload, None)
    return Notification(kind, payload, entry.info, entry.retry_count)


class Wakeup:
    """Wakes all who wait for something to change, and no later one.

    Unlike an `asyncio.Event` it need not be cleared, which one of several would do while another
    has looked, and is about to wait.
    """

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def wait(self) -> asyncio.Future[None]:
        """Is done at the next `set`, also at one that comes before it is awaited."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        waiter.add_done_callback(self._waiting.discard)
        return waiter

    def set(self) -> None:
        """Something has changed."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


class Notifications(Deliveries, AsyncIterator[Notification]):
    """The notifications of one client; ends after `STREAM_TERMINATED`.

    Losses come first: an owner must hear at once what it has to stop. The rest comes in order.
    """

    def __init__(self, size: int, on_delivery: Callable[[Entry], None] | None = None) -> None:
        super().__init__(Notification, NotificationType.STREAM_ADDED, LBSInfo, on_delivery)
        self._size = size
        self._refill_at = size - max(size // 4, 1)
        self._last: Notification | None = None
        self._ended = False
        self._arrived = asyncio.Event()
        self.room_made = Wakeup()
        """Set when there may be room again."""

    def __aiter__(self) -> Notifications:
        return self

    if TYPE_CHECKING:  # the core's is for any kind of item

        def __anext__(self) -> Coroutine[Any, Any, Notification]: ...

    async def _next(self) -> Notification:
        """The next one, waited for."""
        while True:
            if self._last is not None:
                last, self._last = self._last, None
                return last
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
            taken: Notification | None = self._take()
            if taken is not None:
                return taken

    def _make_room(self) -> None:
        if self.room:
            self._room_wanted = False
            self.room_made.set()

    @property
    def last_added(self) -> Entry | None:
        """The stream of the last notification, if that was a STREAM_ADDED."""
        return self._last_added

    @property
    def room(self) -> int:
        """How many more streams may be added; 0 also when those waiting are very large.

        It opens only when a quarter is free: reading one by one would cost a round trip each.
        """
        if self._waiting > self._refill_at or self._waiting_bytes >= MAX_WAITING_BYTES:
            self._room_wanted = True
            return 0
        return self._size - self._waiting

    @property
    def waiting(self) -> int:
        """How many added streams wait to be taken."""
        return self._waiting

    def added(self, entries: list[Entry]) -> None:
        """These are owned from now on."""
        if self._ended:
            return
        self._enqueue(entries)
        self._arrived.set()

    def disowned(self, entry: Entry) -> None:
        """This one is lost; silent where nobody has heard that it was owned."""
        if entry.delivered and not self._ended:
            payload = LBSInfo(entry.data_stream_name, entry.id_in_lbs)
            self._urgent.append(_about(NotificationType.STREAM_DISOWNED, payload, entry))
            self._arrived.set()

    def expired(self, payload: LBSInfo, owned: Entry | None = None) -> bool:
        """Some lock expired, by which we may have owned. False when that had to be dropped."""
        if self._ended or self._expired >= self._size:
            return False
        self._expired += 1
        self._items.append(_about(NotificationType.STREAM_EXPIRED, payload, owned))
        self._arrived.set()
        return True

    def end(self, reason: str) -> None:
        """Nothing more comes but losses already known and `STREAM_TERMINATED`."""
        if self._ended:
            return
        self._ended = True
        self._items.clear()
        self._last = Notification(
            NotificationType.STREAM_TERMINATED, LBSInfo("", ""), {"info": reason}
        )
        self._arrived.set()
        self.room_made.set()
