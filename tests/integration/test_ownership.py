"""Announced, owned, finished, handed over."""

from __future__ import annotations

import asyncio

import pytest
from helpers import (
    ADDED,
    QUICK,
    SEPARATOR,
    TERMINATED,
    Renewals,
    eventually,
    names,
    nothing_comes,
    take,
)

from relstream import ClientClosed, Producer, StreamNotOwned
from relstream.ownership import fetcher


async def test_each_stream_goes_to_exactly_one_consumer(consumer, service, redis_url):
    first, second = consumer("c1", queue_size=50), consumer("c2", queue_size=50)
    notes = [await first.init(), await second.init()]
    got: dict[str, list[str]] = {"c1": [], "c2": []}

    async def collect(name, notifications):
        async for notification in notifications:
            if notification.type is ADDED:
                got[name].append(notification.payload.data_stream_name)

    tasks = [asyncio.create_task(collect(f"c{i + 1}", n)) for i, n in enumerate(notes)]
    async with Producer(redis_url, "svc") as producer:
        await producer.announce_many([(f"s{i}", None) for i in range(2000)])
    await eventually(lambda: sum(map(len, got.values())) >= 2000)
    await asyncio.sleep(0.2)
    assert sorted(got["c1"] + got["c2"]) == sorted(f"s{i}" for i in range(2000))
    assert got["c1"]
    assert got["c2"]
    owners = {key.split(SEPARATOR)[0]: owner for key, owner in service.locks().items()}
    assert owners == {name: owner for owner, all_of in got.items() for name in all_of}
    await first.aclose()
    await second.aclose()
    await asyncio.gather(*tasks)


async def test_what_was_announced_before_the_first_consumer_came_is_served(consumer, service):
    ids = [service.announce(f"s{i}", f'{{"n": {i}}}') for i in range(3)]
    notes = await consumer().init()
    got = await take(notes, 3)
    assert [n.payload.id_in_lbs for n in got] == ids
    assert [n.additional_info for n in got] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_a_stream_is_locked_before_it_is_told(consumer, service):
    notes = await consumer().init()
    for i in range(20):
        entry_id = service.announce(f"s{i}")
        await take(notes, 1)
        assert service.locks()[f"s{i}{SEPARATOR}{entry_id}"] == "c1"


async def test_done_leaves_nothing_of_the_stream(consumer, service):
    service.announce("s1")
    service.announce("s2")
    client = consumer()
    notes = await client.init()
    await take(notes, 2)
    await client.done_stream("s1")
    assert service.locks().keys() == {f"s2{SEPARATOR}{service.entries()[0]}"}
    assert len(service.pending()) == len(service.entries()) == 1
    with pytest.raises(StreamNotOwned, match="s1"):
        await client.done_stream("s1")
    with pytest.raises(StreamNotOwned, match="never"):
        await client.done_stream("never")


async def test_many_finish_at_once(consumer, service):
    for i in range(300):
        service.announce(f"s{i}")
    client = consumer()
    got = names(await take(await client.init(), 300))
    await asyncio.gather(*[client.done_stream(name) for name in got])
    assert (service.locks(), service.pending(), service.entries()) == ({}, [], [])


async def test_a_cancelled_done_finishes_all_the_same(consumer, service):
    service.announce("s1")
    client = consumer()
    await take(await client.init(), 1)
    finishing = asyncio.create_task(client.done_stream("s1"))
    await asyncio.sleep(0)
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    await eventually(lambda: not service.entries() and not service.locks())


async def test_finishing_twice_at_once_is_refused_once(consumer, service):
    service.announce("s1")
    client = consumer()
    await take(await client.init(), 1)
    outcomes = await asyncio.gather(
        client.done_stream("s1"), client.done_stream("s1"), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), StreamNotOwned]


async def test_announced_twice_is_told_once_and_finished_once(consumer, service):
    service.announce("s1")
    client = consumer()
    notes = await client.init()
    await take(notes, 1)
    service.announce("s1")
    service.announce("s2")
    service.announce("s1")
    assert names(await take(notes, 1)) == ["s2"]
    await eventually(lambda: len(client._engine.partitions[0].leases.get("s1").again or ()) == 2)
    await client.done_stream("s1")
    assert [key.split(SEPARATOR)[0] for key in service.locks()] == ["s2"]
    assert len(service.entries()) == len(service.pending()) == 1


async def test_announced_again_after_it_was_finished_is_told_again(consumer, service):
    client = consumer()
    notes = await client.init()
    for _ in range(5):
        service.announce("s1")
        await take(notes, 1)
        await client.done_stream("s1")
    assert service.locks() == {}


async def test_announced_again_while_it_is_being_finished_is_told_again(consumer, service):
    client = consumer()
    notes = await client.init()
    for _ in range(20):
        service.announce("s1")
        await take(notes, 1)
        finishing = asyncio.create_task(client.done_stream("s1"))
        await asyncio.sleep(0)
        service.announce("s1")
        await finishing
        await take(notes, 1)
        await client.done_stream("s1")
    assert (service.locks(), service.entries()) == ({}, [])


async def test_release_hands_over_without_counting_a_retry(consumer, service, monkeypatch):
    monkeypatch.setattr(fetcher, "BLOCK", 30.0)
    old_id = service.announce("s1", '{"a": 1}', _retry_count="2", other="kept")
    first = consumer("c1", max_streams=1)
    await take(await first.init(), 1)
    second = consumer("c2")
    notes = await second.init()
    await eventually(lambda: service.reads("c2"))  # and is served before c1, which has no room yet
    await first.release("s1")
    (got,) = await take(notes, 1)
    assert got.payload.data_stream_name == "s1"
    assert got.payload.id_in_lbs > old_id
    assert got.additional_info == {"a": 1}
    ((_, fields),) = service.redis.xrange(service.lbs, got.payload.id_in_lbs)
    assert (fields[b"_retry_count"], fields[b"other"]) == (b"2", b"kept")
    assert set(service.locks().values()) == {"c2"}
    with pytest.raises(StreamNotOwned):
        await first.release("s1")


async def test_closing_hands_everything_over(consumer, service):
    for i in range(700):
        service.announce(f"s{i}")
    first = consumer("c1", queue_size=100)
    notes = await first.init()
    await take(notes, 30)
    await eventually(lambda: len(service.locks()) >= 100)
    await first.aclose()
    assert service.locks() == {}
    assert service.pending() == []
    assert len(service.entries()) == 700
    second = await consumer("c2", queue_size=1000).init()
    assert sorted(names(await take(second, 700))) == sorted(f"s{i}" for i in range(700))


async def test_leaving_the_context_hands_over(consumer, service):
    service.announce("s1")
    async with consumer() as notes:
        await take(notes, 1)
    assert (service.locks(), service.pending(), len(service.entries())) == ({}, [], 1)


async def test_done_finishes_what_was_told_and_hands_over_the_rest(consumer, service):
    for i in range(40):
        service.announce(f"s{i}")
    client = consumer()
    notes = await client.init()
    told = names(await take(notes, 15))
    await eventually(lambda: len(service.locks()) == 40)
    await client.done()
    left = [f[b"lbs-input"].decode() for _, f in service.redis.xrange(service.lbs)]
    assert len(left) == 25
    assert not any(f'"{name}"' in value for name in told for value in left)
    assert (service.locks(), service.pending()) == ({}, [])


async def test_after_closing_nothing_is_delivered_any_more(consumer, service):
    client = consumer()
    notes = await client.init()
    await nothing_comes(notes, 0.2)
    await client.aclose()
    service.announce("s1")
    await asyncio.sleep(0.3)
    assert service.pending() == []
    assert [n.type async for n in notes] == [TERMINATED]
    with pytest.raises(ClientClosed):
        await client.done_stream("s1")
    with pytest.raises(ClientClosed):
        await client.init()
    await client.aclose()


async def test_closing_under_load_strands_nothing(consumer, service, redis_url):
    async def announce_for_ever(producer):
        number = 0
        while True:
            await producer.announce_many([(f"s{number + i}", None) for i in range(50)])
            number += 50

    async with Producer(redis_url, "svc") as producer:
        announcing = asyncio.create_task(announce_for_ever(producer))
        for round_ in range(5):
            client = consumer(f"c{round_}")
            notes = await client.init()
            await take(notes, 100)
            await client.aclose()
            assert service.pending() == []
            assert service.locks() == {}
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)


async def test_max_streams_bounds_what_is_owned(consumer, service):
    for i in range(30):
        service.announce(f"s{i}")
    client = consumer(max_streams=7)
    notes = await client.init()
    owned = names(await take(notes, 7))
    await nothing_comes(notes, 0.3)
    assert len(service.locks()) == len(service.pending()) == 7
    for _ in range(23):
        await client.done_stream(owned.pop())
        owned += names(await take(notes, 1))
        assert len(service.pending()) <= 7
    assert len(service.locks()) == 7


async def test_a_full_queue_stops_reading_but_not_renewing(consumer, service):
    for i in range(500):
        service.announce(f"s{i}")
    client = consumer(queue_size=40)
    notes = await client.init()
    await eventually(lambda: len(service.locks()) > 30)  # a quarter must be free to read on
    renewals = Renewals(service)
    await eventually(lambda: renewals.seen() == 2)
    assert 30 < len(service.locks()) == len(service.pending()) <= 40
    assert names(await take(notes, 500)) == [f"s{i}" for i in range(500)]
    await nothing_comes(notes, 0.2)


async def test_a_consumer_that_comes_back_resumes_what_its_former_self_held(consumer, service):
    held = f"s0{SEPARATOR}{service.orphan(5, 'c1')[0]}"
    service.redis.set(held, "c1", px=60_000)  # died a moment ago
    notes = await consumer("c1", heartbeat_interval=QUICK, auto_claim=False).init()
    assert sorted(names(await take(notes, 4))) == ["s1", "s2", "s3", "s4"]
    service.redis.delete(held)  # its time is up
    assert names(await take(notes, 1)) == ["s0"]
    await eventually(lambda: len(service.locks()) == 5)


async def test_an_entry_whose_reply_got_lost_is_found(consumer, service):
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    notes = await client.init()
    await nothing_comes(notes, 0.1)
    # As if the server had answered the client's own read, into a connection that broke.
    service.redis.client_kill_filter(_type="normal", skipme=True)
    service.announce("s1")
    assert names(await take(notes, 1)) == ["s1"]
    service.announce("s2")
    service.redis.xgroup_setid(service.lbs, service.group, "$")
    service.redis.xclaim(service.lbs, service.group, "c1", 0, [service.entries()[-1]], force=True)
    assert names(await take(notes, 1)) == ["s2"]
