"""What a client lives through: broken connections, servers that come and go, its own end."""

from __future__ import annotations

import asyncio
import functools
import gc
import random

import pytest
import redis
from helpers import (
    ADDED,
    TERMINATED,
    Heard,
    Renewals,
    Service,
    engine_connections,
    eventually,
    names,
    nothing_comes,
    take,
)

from relstream import (
    ClientClosed,
    ConfigConflict,
    ConnectionFailed,
    ConnectionLost,
    NotificationType,
    Producer,
    Recorder,
    RetryConfig,
    StreamClient,
    UsageError,
)

PATIENT = RetryConfig(max_retries=-1, initial_delay=0.02, max_delay=0.2)


async def test_closing_while_writes_are_paused(consumer, make_server):
    """Redis 7.0 crashed when a read that waits for the end of a pause was ended by time-out."""
    server = make_server()
    with redis.Redis.from_url(server.url) as admin:
        service = Service(admin)
        client = consumer(url=server.url)
        notes = await client.init()
        for i in range(5):
            service.announce(f"s{i}")
        await take(notes, 5)
        await asyncio.sleep(0.1)
        admin.execute_command("CLIENT", "PAUSE", 3000, "WRITE")  # as a failover does
        await asyncio.sleep(1.3)  # the read that waited has ended, and the next one is held up
        await client.aclose()
        assert len(service.entries()) == 5
        assert (service.pending(), service.locks()) == ([], {})
        assert engine_connections(admin) == []


async def test_a_part_that_fails_while_closing_is_seen(consumer, caplog):
    async def fails() -> None:
        raise ConnectionLost("the server closed the connection")

    client = consumer()
    await client.init()
    closing = asyncio.ensure_future(client.aclose())
    await asyncio.sleep(0)
    client._engine._start("fetcher", fails())
    await closing
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_client_belongs_to_one_event_loop(redis_url, service):
    loop = asyncio.new_event_loop()
    client = StreamClient(redis=redis_url, service_name="svc", consumer_id="c1")
    notes = loop.run_until_complete(client.init())
    service.announce("s1")
    (added,) = loop.run_until_complete(take(notes, 1))
    for call in (
        client.aclose,
        client.done,
        client.reset_topology,
        client.reinit_topology,
        functools.partial(client.done_stream, "s1"),
        functools.partial(client.done_stream, added.payload),
        functools.partial(client.release, "s1"),
        functools.partial(client.claim, added.payload),
    ):
        with pytest.raises(UsageError, match=r"another event loop.*each asyncio\.run"):
            asyncio.run(call())
    loop.run_until_complete(client.done_stream("s1"))  # nothing was changed
    assert service.entries() == []
    loop.run_until_complete(client.aclose())
    for call in (client.reset_topology, functools.partial(client.done_stream, "s1")):
        with pytest.raises(ClientClosed):
            asyncio.run(call())
    loop.close()


async def test_cut_connections_lose_nothing_and_repeat_nothing(consumer, service, redis_url):
    client = consumer(retry=PATIENT, queue_size=5000)
    notes = await client.init()
    got: list[str] = []

    async def collect() -> None:
        async for notification in notes:
            if notification.type is ADDED:
                got.append(notification.payload.data_stream_name)
            assert notification.type is not NotificationType.STREAM_DISOWNED

    collecting = asyncio.create_task(collect())
    for round_ in range(20):
        for i in range(25):
            service.announce(f"s{round_ * 25 + i}")
        kind = random.choice(["normal", "pubsub"])
        service.redis.client_kill_filter(_type=kind, skipme=True)
        await asyncio.sleep(0.03)
    await eventually(lambda: len(got) >= 500, 20)
    assert sorted(got) == sorted(f"s{i}" for i in range(500))
    await asyncio.gather(*[client.done_stream(name) for name in got])
    assert (service.entries(), service.locks()) == ([], {})
    await client.aclose()
    await collecting


async def test_finishing_survives_cut_connections(consumer, service):
    client = consumer(retry=PATIENT)
    notes = await client.init()
    for i in range(400):
        service.announce(f"s{i}")
    owned = names(await take(notes, 400))

    async def cut_for_ever() -> None:
        while True:
            service.redis.client_kill_filter(_type="normal", skipme=True)
            # Now and then long enough for something to be done, however slow the machine.
            await asyncio.sleep(random.expovariate(1 / 0.02))

    cutting = asyncio.create_task(cut_for_ever())
    for start in range(0, 400, 10):
        await asyncio.gather(*[client.done_stream(name) for name in owned[start : start + 10]])
    cutting.cancel()
    await asyncio.gather(cutting, return_exceptions=True)
    assert (service.entries(), service.pending()) == ([], [])
    # In a cluster a lock whose master could not be told expires.
    await eventually(lambda: not service.locks())
    await nothing_comes(notes, 0.2)


async def test_a_server_restart_is_survived(consumer, make_server):
    with make_server(config={"appendonly": "yes", "appendfsync": "always"}) as server:
        admin = redis.Redis.from_url(server.url)
        service = Service(admin)
        client = consumer(url=server.url, retry=PATIENT, heartbeat_interval=20.0)
        notes = await client.init()
        for i in range(10):
            service.announce(f"s{i}")
        await take(notes, 10)
        await asyncio.to_thread(server.restart)
        service.announce("later")
        assert names(await take(notes, 1)) == ["later"]
        await eventually(lambda: len(service.locks()) == 11)
        await eventually(lambda: admin.pubsub_numpat())
        admin.set("x<MUTEX_KEY_SEP>1-1", "somebody", px=1)
        await take(notes, 1, NotificationType.STREAM_EXPIRED)
        await client.done_stream("s3")
        await client.aclose()
        admin.close()


async def test_a_server_that_lost_everything_disowns_and_serves_anew(consumer, make_server):
    with make_server() as server:
        admin = redis.Redis.from_url(server.url)
        service = Service(admin)
        client = consumer(url=server.url, retry=PATIENT)
        notes = await client.init()
        service.announce("s1")
        await take(notes, 1)
        await asyncio.to_thread(server.restart)
        service.announce("s2")
        got = [(n.type.value, n.payload[0]) for n in [await notes.__anext__() for _ in "12"]]
        assert sorted(got) == [("stream_added", "s2"), ("stream_disowned", "s1")]
        await client.aclose()
        admin.close()


async def test_loading_readonly_and_a_lost_group_are_waited_out(consumer, make_server):
    with make_server() as server:
        admin = redis.Redis.from_url(server.url)
        service = Service(admin)
        client = consumer(url=server.url, retry=PATIENT, heartbeat_interval=20.0)
        notes = await client.init()
        service.announce("s0")
        await take(notes, 1)
        admin.config_set("replica-read-only", "yes")
        admin.replicaof("127.0.0.1", "1")
        await asyncio.sleep(0.3)
        finishing = asyncio.create_task(client.done_stream("s0"))
        await asyncio.sleep(0.3)
        assert not finishing.done()
        admin.replicaof("NO", "ONE")
        await finishing
        service.announce("s1")
        assert names(await take(notes, 1)) == ["s1"]
        admin.xgroup_destroy(service.lbs, service.group)
        service.announce("s2")
        assert names(await take(notes, 1)) == ["s2"]
        await client.aclose()
        admin.close()


async def test_a_server_that_is_still_loading_is_waited_for(consumer, make_server, caplog):
    # In us, for each command: it says that it is loading after each thousand of them.
    with make_server(config={"appendonly": "yes", "key-load-delay": "300"}) as server:
        admin = redis.Redis.from_url(server.url)
        service = Service(admin)
        client = consumer(url=server.url, retry=PATIENT, heartbeat_interval=30.0)
        notes = await client.init()
        service.announce("s0")
        await take(notes, 1)
        with admin.pipeline(transaction=False) as pipeline:
            for i in range(6000):
                pipeline.set("ballast", i)
            pipeline.execute()
        await asyncio.to_thread(server.restart)
        assert any("LOADING" in record.getMessage() for record in caplog.records)
        service.announce("s1")
        assert names(await take(notes, 1)) == ["s1"]
        await client.aclose()
        admin.close()


async def test_after_the_last_retry_the_reason_is_told_and_the_iterator_ends(consumer, make_server):
    with make_server() as server:
        recorder = Heard()
        retry = RetryConfig(max_retries=2, initial_delay=0.01)
        client = consumer(url=server.url, retry=retry, recorder=recorder)
        notes = await client.init()
        await nothing_comes(notes, 0.1)
        await asyncio.to_thread(server.kill)
        got = [n async for n in notes]
        assert [n.type for n in got] == [TERMINATED]
        assert "fetcher failed: can't connect" in got[0].additional_info["info"]
        assert recorder.events[-1] == ("terminated", got[0].additional_info["info"])
        await client.aclose()


async def cut_until_it_ends(client, service):
    """A connection that is cut between two reads is just opened anew."""

    def ended():
        service.redis.client_kill_filter(_type="normal", skipme=True)
        return client._engine.reason

    await eventually(ended)


async def test_no_retries_means_none(consumer, service):
    client = consumer(retry=RetryConfig(max_retries=0))
    notes = await client.init()
    await nothing_comes(notes, 0.1)
    await cut_until_it_ends(client, service)
    assert [n.type async for n in notes] == [TERMINATED]


async def test_what_is_owned_can_be_finished_after_the_client_has_ended(consumer, service):
    service.announce("s1")
    client = consumer(retry=RetryConfig(max_retries=0))
    notes = await client.init()
    await take(notes, 1)
    await cut_until_it_ends(client, service)
    assert [n.type async for n in notes] == [TERMINATED]
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() == 1)
    assert len(service.locks()) == 1
    try:
        await client.done_stream("s1")
    except ConnectionFailed:  # its connection was cut as well, and there are no retries
        await client.done_stream("s1")
    assert service.entries() == []


async def test_closing_does_not_wait_for_a_server_that_is_gone(consumer, make_server):
    with make_server() as server:
        client = consumer(url=server.url)
        service = Service(redis.Redis.from_url(server.url))
        service.announce("s1")
        await take(await client.init(), 1)
        await asyncio.to_thread(server.kill)
        await asyncio.wait_for(client.aclose(), 15)
        service.redis.close()


async def test_closing_twice_and_at_once_is_one_closing(consumer, service):
    service.announce("s1")
    client = consumer()
    await take(await client.init(), 1)
    closing = client.aclose(), client.aclose(), client.done()
    *outcomes, refused = await asyncio.gather(*closing, return_exceptions=True)
    await client.aclose()
    assert outcomes == [None, None]
    assert len(service.entries()) == 1
    assert isinstance(refused, ClientClosed)  # it can't say that all is finished


async def test_closing_goes_on_when_nobody_waits_for_it_any_more(consumer, service):
    service.announce("s1")
    client = consumer()
    await take(await client.init(), 1)
    closing = asyncio.create_task(client.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await client.aclose()
    assert (service.locks(), service.pending()) == ({}, [])


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_opening_can_be_cancelled_at_any_moment(consumer, service, steps):
    client = consumer()
    opening = asyncio.create_task(client.init())
    for _ in range(steps):
        await asyncio.sleep(0)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    await client.aclose()


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_closing_ends_an_opening(consumer, service, steps):
    client = consumer()
    opening = asyncio.create_task(client.init())
    for _ in range(steps):
        await asyncio.sleep(0)
    await client.aclose()
    try:
        notes = await opening
    except ClientClosed:
        return
    assert [note.type async for note in notes] in ([], [TERMINATED])


async def test_a_client_that_could_not_open_leaves_nothing(consumer, service):
    service.redis.config_set("notify-keyspace-events", "Kg")
    client = consumer()
    with pytest.raises(ConfigConflict, match="force_config_override"):
        await client.init()
    gc.collect()


async def test_a_client_never_opened_can_be_closed(consumer):
    client = consumer()
    await client.aclose()
    assert client.id == "c1"


async def test_a_waiting_application_hears_of_the_end(consumer):
    client = consumer()
    notes = await client.init()
    waiting = asyncio.create_task(notes.__anext__())
    await asyncio.sleep(0.05)
    await client.aclose()
    assert (await waiting).type is TERMINATED
    with pytest.raises(StopAsyncIteration):
        await notes.__anext__()


async def test_a_single_shard_has_no_topology_to_reset(consumer):
    client = consumer()
    await client.init()
    await client.reset_topology()  # there is but one shard
    await client.reinit_topology()


async def test_the_recorder_hears_of_all_of_it(consumer, service, redis_url):
    recorder = Heard()
    heard = recorder.events
    client = consumer(recorder=recorder, heartbeat_interval=2.0)
    notes = await client.init()
    service.redis.xadd(service.lbs, {"bad": "entry"})
    service.announce("s1")
    await take(notes, 1)
    service.redis.set("x<MUTEX_KEY_SEP>1-1", "somebody", px=1)
    await take(notes, 1, NotificationType.STREAM_EXPIRED)
    await eventually(lambda: recorder.calls("lock_extension"))
    ((succeeded, failed, took), *_) = recorder.calls("lock_extension")
    assert (succeeded, failed) == (1, 0)
    assert 0 < took < 5
    await client.done_stream("s1")
    kinds = [event[0] for event in heard]
    assert ("keyspace_setup", True) in heard
    assert ("dlq_routing", [None], "unparseable") in heard
    assert ("keyspace_notification_received", "x") in heard
    ended = [event for event in heard if event[0] in ("lock_release", "stream_processing_end")]
    assert [event[:3] for event in ended] == [
        ("lock_release", 1, 0),
        ("stream_processing_end", ["s1"], "done"),
    ]
    assert 0 < ended[0][3] < 5
    ((succeeded, failed, took),) = recorder.calls("lock_acquisition")
    assert (succeeded, failed) == (1, 0)
    assert 0 < took < 5
    assert kinds.index("lock_acquisition") < kinds.index("stream_processing_start")


async def test_a_recorder_that_fails_harms_nobody(consumer, service):
    class Broken:
        def lock_acquisition(self, **_: object) -> None:
            raise ZeroDivisionError

    service.announce("s1")
    client = consumer(recorder=Broken())
    await take(await client.init(), 1)
    await client.done_stream("s1")


async def test_expiry_events_beyond_the_queue_are_dropped_and_counted(consumer, service):
    class Counting(Recorder):
        received = dropped = 0

        def keyspace_notification_received(self, **_: object) -> None:
            self.received += 1

        def keyspace_notification_dropped(self) -> None:
            self.dropped += 1

    counting = Counting()
    notes = await consumer(queue_size=10, recorder=counting).init()
    for i in range(25):
        service.redis.set(f"x{i}<MUTEX_KEY_SEP>1-{i}", "somebody", px=1)
    await eventually(lambda: counting.received == 25)
    assert counting.dropped == 15
    service.announce("s1")  # what is added is never dropped
    seen = [await notes.__anext__() for _ in range(11)]
    assert seen[-1].payload.data_stream_name == "s1"


async def test_a_busy_producer_and_a_slow_consumer_keep_bounded_memory(consumer, redis_url):
    big = {"blob": "x" * 100_000}
    async with Producer(redis_url, "svc") as producer:
        await producer.announce_many([(f"s{i}", big) for i in range(1500)])
    client = consumer(queue_size=100_000)
    notes = await client.init()
    await asyncio.sleep(1.5)
    assert client._engine.notifications._waiting_bytes < 100e6
    assert len({n.payload for n in await take(notes, 1500, timeout=30)}) == 1500
