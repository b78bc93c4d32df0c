"""Reading where locks fail at moments that no server can be brought to fail at."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from core.resp import batch_of, entry
from helpers import eventually

from relstream._core import Batch, Entry, entry_ids
from relstream.config import RecoveryConfig, RetryConfig
from relstream.errors import ConnectionLost, DeadlineExceeded, ReplyError
from relstream.lbs.names import Names
from relstream.notifications import Notifications
from relstream.ownership import admission
from relstream.ownership.capacity import Capacity
from relstream.ownership.fetcher import Fetcher

HEARTBEAT = 0.3
Take = Callable[[list[Entry], float], Any]


def batch(start: int, count: int) -> Batch:
    return batch_of(
        *(
            entry(b"%d-0" % i, b"lbs-input", b'{"DataStreamName":"s%d"}' % i)
            for i in range(start, start + count)
        )
    )


def server(lock: bytes) -> str:
    """Where this lock is, if there are several."""
    return "odd" if int(lock[1 : lock.index(b"<")]) % 2 else "even"


class Reading:
    """A connection on which these batches arrive, and then no more."""

    alive = True
    endpoint = SimpleNamespace(timeout=5.0)
    waiting = ()

    def __init__(self, *batches: Batch) -> None:
        self.left = list(batches)
        self.protocol = SimpleNamespace(received=0)

    async def get(self) -> Any:
        return self.protocol

    async def pipeline(self, *args: Any, **options: Any) -> list[list[Batch]]:
        await asyncio.sleep(0.001)
        if self.left:
            return [[self.left.pop(0)]]
        await asyncio.sleep(0.02)
        return [[]]


class Setting:
    """A fetcher with everything around it made up."""

    def __init__(
        self,
        *batches: Batch,
        take: Take,
        single: bool = True,
        queue: int = 1000,
        reading: Any = None,
    ) -> None:
        self.notes = Notifications(queue)
        self.room = Capacity(self.notes, lambda: 0, None, 1)
        self.handed_back: list[list[bytes]] = []
        self.stay = False
        topology: Any = SimpleNamespace(
            link=lambda name: None,
            single=single,
            servers={None} if single else {"odd", "even"},
            group_by_node=lambda keys: dict.fromkeys(map(server, keys) if not single else [None]),
        )
        reading = reading or Reading(*batches)
        nobody: Any = None

        async def nothing() -> None: ...

        async def hand_back(entries: list[Entry]) -> list[bytes]:
            ids = entry_ids(entries)
            self.handed_back.append(ids)
            return ids if self.stay else []

        async def unlock(keys: list[bytes]) -> list[bytes]:
            return keys

        self.fetcher = Fetcher(
            reading,
            topology,
            Names.of("svc"),
            "c1",
            notifications=self.notes,
            capacity=self.room,
            acquire=take,
            audit=nothing,
            hand_back=hand_back,
            unlock=unlock,
            requeuer=nobody,
            recovered_after=HEARTBEAT,
            retry=RetryConfig(max_retries=-1, initial_delay=0.01, max_delay=0.05),
            patience=0.0,
            recovery=RecoveryConfig(),
            recorder=None,
            logger=logging.getLogger("relstream"),
        )
        self.task = asyncio.ensure_future(self.fetcher.run())

    async def names(self, count: int) -> list[str]:
        async def some() -> list[str]:
            return [(await self.notes.__anext__()).payload.data_stream_name for _ in range(count)]

        return await asyncio.wait_for(some(), 5)

    async def end(self) -> None:
        await self.fetcher.stop()
        await self.task


async def granting(entries: list[Entry], asked_at: float, **how: Any) -> Any:
    return entries, []


def refusing(code: str) -> Take:
    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        return [], [(entry, ReplyError(f"{code} not now")) for entry in entries]

    return take


async def test_a_batch_is_taken_though_the_one_before_it_fails() -> None:
    failed = False

    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            await asyncio.sleep(0.01)
            raise ConnectionLost("cut")
        return entries, []

    setting = Setting(batch(1, 100), batch(101, 30), take=take)
    assert sorted(await setting.names(130)) == sorted(f"s{i}" for i in range(1, 131))
    await setting.end()
    assert setting.room.available_for(setting.fetcher) == 1000
    assert setting.handed_back == []
    assert setting.fetcher.admission.in_hand() == set()


@pytest.mark.parametrize("code", ["MASTERDOWN", "MOVED"])
async def test_what_stays_refused_is_requeued_before_it_looks_like_a_dead_owners(code: str) -> None:
    setting = Setting(batch(1, 30), take=refusing(code), single=False)
    await asyncio.sleep(HEARTBEAT / 6)
    assert setting.handed_back == []
    assert setting.fetcher.admission.in_hand() == {b"%d-0" % i for i in range(1, 31)}
    await asyncio.sleep(HEARTBEAT / 2)
    assert setting.handed_back == [[b"%d-0" % i for i in range(1, 31)]]
    await setting.end()
    assert setting.room.available_for(setting.fetcher) == 1000
    assert setting.fetcher.admission.in_hand() == set()


async def test_what_is_refused_is_requeued_on_leaving() -> None:
    setting = Setting(batch(1, 30), take=refusing("OOM"))
    await asyncio.sleep(0.005)
    await setting.end()
    await setting.fetcher.admission.leave()
    assert setting.handed_back == [[b"%d-0" % i for i in range(1, 31)]]
    assert setting.fetcher.admission.in_hand() == set()


async def test_of_several_masters_one_that_refuses_keeps_the_others_streams_from_nobody() -> None:
    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        odd = [entry for entry in entries if int(entry.data_stream_name[1:]) % 2]
        even = [entry for entry in entries if entry not in odd]
        return even, [(entry, ReplyError("OOM not now")) for entry in odd]

    batches = [batch(i, 1) for i in range(1, 101)]
    setting = Setting(*batches, take=take, single=False)
    assert await setting.names(50) == [f"s{i}" for i in range(2, 101, 2)]
    await setting.end()


async def test_of_several_masters_one_that_refuses_bounds_what_is_kept(monkeypatch: Any) -> None:
    """However much there is to read, and others do not refuse."""
    monkeypatch.setattr(admission, "MOST_DEFERRED", 5)
    kept = 0

    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        nonlocal kept
        odd = [entry for entry in entries if int(entry.data_stream_name[1:]) % 2]
        kept = max(kept, len(setting.fetcher.admission.deferred) + len(odd))
        return [e for e in entries if e not in odd], [(e, ReplyError("OOM not now")) for e in odd]

    setting = Setting(*[batch(i, 1) for i in range(1, 101)], take=take, single=False)
    setting.stay = True
    await asyncio.sleep(HEARTBEAT / 2)
    assert 5 < kept <= 8
    await setting.end()


async def test_a_reply_that_takes_too_long_is_asked_for_in_parts() -> None:
    class Slow(Reading):
        """Answers what is small enough."""

        counts: ClassVar[list[int]] = []

        async def pipeline(self, packed: bytes, *args: Any, **options: Any) -> list[list[Batch]]:
            self.counts.append(int(packed.split(b"COUNT\r\n")[1].split(b"\r\n")[1]))
            if self.counts[-1] > 2:
                self.protocol.received += 1
                raise DeadlineExceeded("no reply from the server in time")
            return await super().pipeline(packed, *args, **options)

    setting = Setting(take=granting, reading=Slow(batch(1, 1), batch(2, 2), batch(4, 1)))
    assert await setting.names(4) == ["s1", "s2", "s3", "s4"]
    assert Slow.counts[:4] == [1, 2, 4, 1]
    await setting.end()


async def test_a_read_of_which_no_byte_comes_is_sent_again_as_it_was() -> None:
    class Late(Reading):
        counts: ClassVar[list[int]] = []

        async def pipeline(self, packed: bytes, *args: Any, **options: Any) -> list[list[Batch]]:
            self.counts.append(int(packed.split(b"COUNT\r\n")[1].split(b"\r\n")[1]))
            if len(self.counts) in (2, 3):
                raise DeadlineExceeded("no reply from the server in time")
            return await super().pipeline(packed, *args, **options)

    setting = Setting(take=granting, reading=Late(batch(1, 1), batch(2, 1)))
    assert await setting.names(2) == ["s1", "s2"]
    assert Late.counts[:4] == [1, 2, 2, 2]
    assert setting.fetcher.failing is None
    await setting.end()


async def test_one_server_that_refuses_all_in_a_row_is_not_all_of_them() -> None:
    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        odd = [entry for entry in entries if server(entry.lock_key) == "odd"]
        even = [entry for entry in entries if entry not in odd]
        return even, [(entry, ReplyError("OOM not now")) for entry in odd]

    row = batch_of(
        *(
            entry(b"%d-0" % i, b"lbs-input", b'{"DataStreamName":"s%d"}' % i)
            for i in range(1, 101, 2)
        )
    )
    setting = Setting(row, batch(102, 1), take=take, single=False)
    await asyncio.sleep(HEARTBEAT / 6)
    assert setting.handed_back == []
    assert await setting.names(1) == ["s102"]
    await setting.end()


async def test_a_full_batch_that_is_refused_goes_back_in_time_too() -> None:
    class Blocking(Reading):
        async def pipeline(self, packed: bytes, *args: Any, **options: Any) -> list[list[Batch]]:
            if self.left:
                return await super().pipeline()
            await asyncio.sleep(int(packed.split(b"BLOCK\r\n")[1].split(b"\r\n")[1]) / 1000)
            return [[]]

    setting = Setting(take=refusing("OOM"), reading=Blocking(batch(1, 100)))
    await asyncio.sleep(HEARTBEAT * 0.8)
    assert setting.handed_back == [[b"%d-0" % i for i in range(1, 101)]]
    await setting.end()


async def test_what_can_not_even_be_tried_goes_back_all_the_same() -> None:
    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        raise ConnectionLost("cut")

    setting = Setting(batch(1, 30), take=take)
    await asyncio.sleep(HEARTBEAT)
    assert setting.handed_back == [[b"%d-0" % i for i in range(1, 31)]]
    await setting.end()


async def test_without_room_what_was_refused_waits_its_time() -> None:
    """Nothing is asked again and again of a server for what can be taken by nobody."""

    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        return entries[:4], [(entry, ReplyError("MASTERDOWN not now")) for entry in entries[4:]]

    setting = Setting(batch(1, 10), take=take, single=False, queue=4)
    setting.stay = True
    await asyncio.sleep(1.0)
    assert setting.room.available_for(setting.fetcher) == 0
    assert 1 <= len(setting.handed_back) <= 10
    await setting.end()


async def test_a_cancellation_is_heeded_though_there_is_room_at_the_same_moment() -> None:
    async def take(entries: list[Entry], asked_at: float, **how: Any) -> Any:
        return entries[:4], [(entry, ReplyError("MASTERDOWN not now")) for entry in entries[4:]]

    for tick in range(20):
        setting = Setting(batch(1, 10), take=take, single=False, queue=4)
        setting.stay = True
        await asyncio.sleep(0.02 + 0.001 * tick)
        assert setting.room.available_for(setting.fetcher) == 0
        setting.notes.room_made.set()
        setting.task.cancel()
        await asyncio.wait({setting.task}, timeout=0.2)
        assert setting.task.cancelled()


async def test_batches_that_are_taken_do_not_pile_up() -> None:
    batches = [batch(1, 100), *(batch(100 + i, 1) for i in range(1, 201))]
    setting = Setting(*batches, take=granting)
    await setting.names(300)
    assert len(setting.fetcher._taking) <= 2
    await setting.end()


async def test_room_is_kept_for_who_waits_for_it_until_that_one_does_something_else() -> None:
    notes = Notifications(1)
    room = Capacity(notes, lambda: 0, None, 2)
    assert room.available_for("a") == 1
    room.reserve(1)
    assert room.all_taken()
    assert room.available_for("b") == 0
    room.wait_turn("b")
    room.release(1)
    assert (room.available_for("a"), room.available_for("b")) == (0, 1)
    room_made = notes.room_made.wait()
    room.end_turn("b")
    assert room_made.done()  # so the next one looks again
    assert room.available_for("a") == 1


async def test_a_reader_that_fails_keeps_no_room_from_others() -> None:
    class Failing(Reading):
        fails = False

        async def get(self) -> Any:
            if self.fails:
                raise ConnectionLost("cut")
            return await super().get()

    reading = Failing()
    setting = Setting(take=granting, queue=1, reading=reading)
    setting.room.reserve(1)
    await asyncio.sleep(0.05)
    setting.room.release(1)
    assert setting.room.available_for("another") == 0
    reading.fails = True
    setting.notes.room_made.set()
    await eventually(lambda: setting.room.available_for("another") == 1)
    await setting.end()
