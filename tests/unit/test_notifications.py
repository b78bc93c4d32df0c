"""The queue to the application: its order, its bounds, and its end."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import pickle
import sys
import weakref

import pytest

from relstream import LBSInfo, Notifications, NotificationType
from relstream._core import ENTRIES, Reader, announcements
from relstream.notifications import MAX_WAITING_BYTES

ADDED = NotificationType.STREAM_ADDED
DISOWNED = NotificationType.STREAM_DISOWNED
EXPIRED = NotificationType.STREAM_EXPIRED
TERMINATED = NotificationType.STREAM_TERMINATED


def test_types_are_members_of_an_enum():
    for member in NotificationType:
        assert vars(NotificationType)[member.name] is member is NotificationType(member.value)
        assert pickle.loads(pickle.dumps(member)) is member
    with pytest.raises(AttributeError):
        NotificationType.STREAM_ADDED = None


async def test_what_is_told_is_the_same_as_what_anybody_makes():
    notifications = Notifications(10)
    notifications.added(entries("s1", info={"a": 1}))
    note = await notifications.__anext__()
    again = LBSInfo(note.payload.data_stream_name, note.payload.id_in_lbs)
    assert (hash(note.payload), note.payload) == (hash(again), again)


def entries(*names, info=None):
    def bulk(data):
        return b"$%d\r\n%s\r\n" % (len(data), data)

    reply = b"*%d\r\n" % len(names)
    for i, name in enumerate(names):
        value = json.dumps({"DataStreamName": name, "Info": info}).encode()
        reply += b"*2\r\n" + bulk(b"%d-0" % (i + 1)) + b"*2\r\n" + bulk(b"lbs-input") + bulk(value)
    reader, out = Reader(), []
    reader.feed(reply)
    reader.fill(out, 1, ENTRIES)
    return announcements(out[0], b"lbs-input", b"_retry_count", b"|", json.loads)[0]


async def said(notifications, count):
    """The next notifications, which must be there already."""
    got = [await asyncio.wait_for(notifications.__anext__(), 1) for _ in range(count)]
    return [(n.type, n.payload.data_stream_name) for n in got]


async def told(notifications, *new):
    """These are owned, and the application knows."""
    notifications.added(list(new))
    await said(notifications, len(new))


async def test_losses_come_first_and_the_rest_in_order():
    queue = Notifications(10)
    old, older = entries("old", "older")
    await told(queue, old, older)
    queue.added(entries("a", "b"))
    queue.expired(LBSInfo("x", "1-0"))
    queue.added(entries("c"))
    queue.disowned(old)
    queue.disowned(older)
    assert await said(queue, 6) == [
        *[(DISOWNED, "old"), (DISOWNED, "older"), (ADDED, "a"), (ADDED, "b")],
        *[(EXPIRED, "x"), (ADDED, "c")],
    ]


async def test_what_a_notification_carries():
    delivered = []
    queue = Notifications(10, delivered.append)
    (entry,) = entries("a", info={"k": 1})
    queue.added([entry])
    assert not entry.delivered
    notification = await queue.__anext__()
    assert notification == (ADDED, ("a", "1-0"), {"k": 1}, 0)
    assert entry.delivered
    assert delivered == [entry]
    assert queue.last_added is entry
    notification.additional_info["k"] = 2  # the application's
    queue.disowned(entry)
    assert await queue.__anext__() == (DISOWNED, ("a", "1-0"), {"k": 1}, 0)
    assert queue.last_added is None
    queue.expired(LBSInfo("b", "2-0"))
    assert await queue.__anext__() == (EXPIRED, ("b", "2-0"), None, 0)
    queue.expired(LBSInfo("a", "1-0"), entry)
    assert await queue.__anext__() == (EXPIRED, ("a", "1-0"), {"k": 1}, 0)


async def test_nobody_is_told_of_a_loss_before_hearing_of_the_stream():
    queue = Notifications(4)
    lost, kept = entries("lost", "kept")
    queue.added([lost, kept])
    queue.disowned(lost)
    lost.ended = True
    assert await said(queue, 1) == [(ADDED, "kept")]
    assert queue.room == 4


async def test_nobody_is_told_of_what_is_being_given_up():
    queue = Notifications(4)
    given_up, kept = entries("given up", "kept")
    queue.added([given_up, kept])
    given_up.finishing = True
    assert await said(queue, 1) == [(ADDED, "kept")]
    assert queue.room == 4


@pytest.mark.parametrize(("size", "opens_at"), [(1, 0), (2, 1), (4, 3), (8, 6), (500, 375)])
async def test_room_opens_when_a_quarter_is_free(size, opens_at):
    queue = Notifications(size)
    assert queue.room == size
    queue.added(entries(*map(str, range(size))))
    room_made = queue.room_made.wait()
    for waiting in range(size - 1, -1, -1):
        assert queue.room == 0
        assert not room_made.done()
        await said(queue, 1)
        if waiting == opens_at:
            break
    assert room_made.done()
    assert queue.room == size - opens_at


async def test_large_infos_fill_the_queue_and_one_always_fits():
    queue = Notifications(100)
    half = entries("a", "b", info={"k": "x" * (MAX_WAITING_BYTES // 2)})
    queue.added(half)
    assert queue.room == 0
    room_made = queue.room_made.wait()
    await said(queue, 1)
    assert room_made.done()
    assert queue.room == 99


async def test_expiries_beyond_the_size_are_dropped_and_streams_never():
    queue = Notifications(3)
    assert [queue.expired(LBSInfo(str(i), "1-0")) for i in range(5)] == [True] * 3 + [False] * 2
    queue.added(entries("a", "b", "c", "d"))  # more than there is room for: owned is owned
    assert await said(queue, 1) == [(EXPIRED, "0")]
    assert queue.expired(LBSInfo("late", "1-0"))
    assert not queue.expired(LBSInfo("later", "1-0"))
    assert [name for _, name in await said(queue, 7)] == ["1", "2", *"abcd", "late"]


async def test_the_end():
    queue = Notifications(10)
    old, another = entries("old", "another")
    await told(queue, old, another)
    queue.added(entries("waiting"))
    queue.expired(LBSInfo("x", "1-0"))
    queue.disowned(old)
    room_made = queue.room_made.wait()
    queue.end("because")
    queue.end("of something else")
    queue.added(entries("late"))
    queue.disowned(another)
    assert not queue.expired(LBSInfo("late", "1-0"))
    assert room_made.done()  # so that whoever waits for room sees the end
    got = [notification async for notification in queue]
    assert got == [
        (DISOWNED, ("old", "1-0"), None, 0),
        (TERMINATED, ("", ""), {"info": "because"}, 0),
    ]
    with pytest.raises(StopAsyncIteration):
        await queue.__anext__()


async def collect(queue):
    return [n.payload.data_stream_name async for n in queue if n.type is not TERMINATED]


async def test_several_tasks_share_the_notifications():
    queue = Notifications(1000)
    tasks = [asyncio.create_task(collect(queue)) for _ in range(3)]
    await asyncio.sleep(0)
    for i in range(30):
        queue.added(entries(str(i)))
        await asyncio.sleep(0)
    queue.end("")
    parts = await asyncio.wait_for(asyncio.gather(*tasks), 1)
    assert sorted(name for part in parts for name in part) == sorted(map(str, range(30)))


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancelled_wait_takes_nothing_with_it(turns):
    queue = Notifications(10)
    waiting = asyncio.create_task(queue.__anext__())
    other = asyncio.create_task(collect(queue))
    await asyncio.sleep(0)
    queue.added(entries("a", "b"))
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    got = [] if isinstance(outcome, asyncio.CancelledError) else [outcome.payload.data_stream_name]
    await asyncio.sleep(0)
    queue.end("")
    assert sorted(got + await asyncio.wait_for(other, 1)) == ["a", "b"]


async def test_a_task_shows_what_it_waits_for():
    waiting = asyncio.create_task(Notifications(10).__anext__())
    await asyncio.sleep(0)
    assert "Notifications.__anext__" in repr(waiting)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert "Notifications.__anext__" in repr(waiting)


@pytest.mark.parametrize("event", ["added", "disowned", "expired", "end"])
async def test_whoever_waits_is_woken(event):
    queue = Notifications(10)
    (entry,) = entries("a")
    await told(queue, entry)
    waiting = asyncio.create_task(queue.__anext__())
    await asyncio.sleep(0)
    argument = {
        "added": entries("b"),
        "disowned": entry,
        "expired": LBSInfo("x", "1-0"),
        "end": "-",
    }
    getattr(queue, event)(argument[event])
    kinds = {"added": ADDED, "disowned": DISOWNED, "expired": EXPIRED, "end": TERMINATED}
    assert (await asyncio.wait_for(waiting, 1)).type is kinds[event]


async def test_the_next_one_may_be_awaited_in_a_task_of_its_own():
    queue = Notifications(4)
    waits = asyncio.create_task(queue.__anext__())
    await asyncio.sleep(0)
    given_up = asyncio.create_task(queue.__anext__())
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait({given_up})
    queue.added(entries("a", "b"))
    assert (await waits).payload.data_stream_name == "a"
    ready = asyncio.create_task(queue.__anext__())
    assert (await ready).payload.data_stream_name == "b"
    never_run = asyncio.create_task(queue.__anext__())
    never_run.cancel()
    queue.added(entries("c"))
    await asyncio.wait({never_run})
    assert await said(queue, 1) == [(ADDED, "c")]


# --- the coroutine `__anext__` --------------------------------------------------------------------


def name_of(note):
    return note.payload.data_stream_name


async def test_awaiting_in_all_ways():
    async def by_task(coroutine):
        return await asyncio.create_task(coroutine)

    async def by_loop(notifications):
        async for note in notifications:
            return note
        return None

    async def by_iterator(coroutine):
        class Awaitable:
            def __await__(self):
                return (yield from coroutine.__await__())

        return await Awaitable()

    ways = [
        lambda notifications: notifications.__anext__(),
        lambda notifications: anext(notifications, None),
        lambda notifications: by_task(notifications.__anext__()),
        lambda notifications: by_iterator(notifications.__anext__()),
        lambda notifications: asyncio.wait_for(notifications.__anext__(), 1),
        by_loop,
    ]
    for way in ways:
        for delay in (None, 0.01):
            notifications = Notifications(10)
            if delay is None:
                notifications.added(entries("s1"))
            else:
                asyncio.get_running_loop().call_later(delay, notifications.added, entries("s1"))
            assert name_of(await way(notifications)) == "s1"
            assert notifications.room == 10


async def test_it_is_a_coroutine():
    notifications = Notifications(10)
    coroutine = notifications.__anext__()
    assert asyncio.iscoroutine(coroutine)
    assert inspect.isawaitable(coroutine)
    coroutine.close()


async def test_stepping_by_hand():
    notifications = Notifications(10)
    notifications.added(entries("s1", "s2"))
    with pytest.raises(StopIteration) as stopped:
        notifications.__anext__().send(None)
    assert name_of(stopped.value.value) == "s1"
    with pytest.raises(StopIteration) as stopped:
        next(notifications.__anext__())
    assert name_of(stopped.value.value) == "s2"
    coroutine = notifications.__anext__()
    assert asyncio.isfuture(coroutine.send(None))
    coroutine.close()


async def test_a_profiler_changes_nothing():
    """Python steps coroutines in another way then."""
    notifications = Notifications(10)
    notifications.added(entries("s1"))
    before = sys.gettrace()

    def trace(*args):
        return trace

    sys.settrace(trace)
    try:
        assert name_of(await notifications.__anext__()) == "s1"
    finally:
        sys.settrace(before)


async def test_what_nobody_waits_for_any_more_is_kept():
    notifications = Notifications(10)
    waiting = asyncio.create_task(notifications.__anext__())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    notifications.added(entries("s1"))
    never_started = asyncio.create_task(notifications.__anext__())
    never_started.cancel()
    with pytest.raises(asyncio.CancelledError):
        await never_started
    notifications.__anext__()  # and never awaited
    notifications.__anext__().close()
    assert await said(notifications, 1) == [(ADDED, "s1")]


async def test_errors_end_it():
    notifications = Notifications(10)
    thrown = notifications.__anext__()
    with pytest.raises(KeyError):
        thrown.throw(KeyError("x"))
    ended = notifications.__anext__()
    ended.close()
    used = notifications.__anext__()
    notifications.added(entries("s1"))
    await used
    waited = notifications.__anext__()
    asyncio.get_running_loop().call_soon(notifications.end, "over")
    assert (await waited).type is TERMINATED
    last = notifications.__anext__()
    with pytest.raises(StopAsyncIteration):
        await last
    for coroutine in (thrown, ended, used, waited, last):
        with pytest.raises(RuntimeError, match="already awaited"):
            await coroutine
        with pytest.raises(RuntimeError, match="already awaited"):
            coroutine.throw(KeyError("x"))
        coroutine.close()


async def test_nothing_is_left_of_those_who_waited():
    notifications = Notifications(10)
    left = weakref.WeakSet()
    for _ in range(3):
        waiting = asyncio.create_task(notifications.__anext__())
        left.add(waiting)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    del waiting
    gc.collect()
    assert not left
