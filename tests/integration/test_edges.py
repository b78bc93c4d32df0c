"""Where things meet: closing while calls are under way, refusals, freezes, servers far away."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis
from helpers import (
    DISOWNED,
    QUICK,
    SEPARATOR,
    TERMINATED,
    Renewals,
    Service,
    eventually,
    names,
    nothing_comes,
    take,
)
from wire import Proxy

from relstream import Producer, RecoveryConfig, RelstreamError, RetryConfig
from relstream.ownership import fetcher, renewer


async def test_calls_under_way_are_finished_before_the_client_closes(consumer, service):
    client = consumer(queue_size=3000)
    notes = await client.init()
    for i in range(2000):
        service.announce(f"s{i}")
    owned = names(await take(notes, 2000))
    calls = [asyncio.create_task(client.done_stream(name)) for name in owned[:1500]]
    calls += [asyncio.create_task(client.release(name)) for name in owned[1500:]]
    await asyncio.sleep(0)
    await client.aclose()
    assert set(await asyncio.gather(*calls)) == {None}
    assert len(service.entries()) == 500
    assert (service.pending(), service.locks()) == ([], {})


async def test_what_was_worked_on_is_finished_though_the_rest_can_not_be_read(consumer, service):
    for i in range(9):
        service.announce(f"s{i}")
    client = consumer()
    notes = await client.init()
    await take(notes, 9)
    (stray,) = service.announce_last("stray")
    await eventually(lambda: stray not in service.entries())
    await client.done()
    assert service.locks() == {}
    assert len(service.entries()) == 1


async def test_init_fails_when_the_renewal_thread_can_not_start(consumer, monkeypatch):
    def broken() -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(renewer, "new_event_loop", broken)
    client = consumer()
    with pytest.raises(RelstreamError, match="too many open files"):
        await client.init()
    await asyncio.wait_for(client.aclose(), 12)


async def test_out_of_memory_a_consumer_does_not_take_what_it_can_not_lock(consumer, service):
    for i in range(300):
        service.announce(f"s{i}")
    service.redis.xgroup_create(service.lbs, service.group, "0")
    service.redis.config_set("maxmemory", 1)
    notes = await consumer(max_streams=20, queue_size=40).init()
    await asyncio.sleep(1.5)
    assert len(service.pending()) <= 20
    service.redis.config_set("maxmemory", 0)
    assert len(await take(notes, 20)) == 20


async def test_what_a_former_life_held_beyond_the_limit_goes_to_others(consumer, service):
    service.orphan(30, "c1")
    got = names(await take(await consumer("c1", max_streams=5, auto_claim=False).init(), 5))
    got += names(await take(await consumer("c2", auto_claim=False).init(), 25))
    assert sorted(got) == sorted(f"s{i}" for i in range(30))
    # It may be what ended that life.
    counts = [fields.get(b"_retry_count") for _, fields in service.redis.xrange(service.lbs)]
    assert counts == [b"1"] * 30


@pytest.mark.parametrize(
    "options",
    [{"heartbeat_interval": QUICK}, {"recovery": RecoveryConfig(min_idle_time=QUICK)}],
    ids=["looking", "scan"],
)
async def test_an_entry_recovered_while_the_application_blocked_is_not_told(
    consumer, service, monkeypatch, options
):
    monkeypatch.setattr(fetcher, "BLOCK", 30.0)
    client = consumer(auto_claim=False, max_streams=1, **options)
    notes = await client.init()
    await eventually(lambda: service.reads("c1"))
    entry_id = service.announce("s1")  # goes into the read that waits, and into the socket
    time.sleep(0.1)  # noqa: ASYNC251
    lock = f"s1{SEPARATOR}{service.requeuer(entry_id)}"
    service.redis.xreadgroup(service.group, "c2", {service.lbs: ">"})
    service.redis.set(lock, "c2", px=60_000)
    time.sleep(0.6)  # noqa: ASYNC251
    await nothing_comes(notes, 0.7)
    assert service.locks() == {lock: "c2"}


async def test_leases_are_kept_at_a_server_far_away(
    consumer, service, server, redis_url, monkeypatch
):
    monkeypatch.setattr(renewer, "RENEWAL_WINDOW", 100)
    async with Proxy(server.port) as proxy, Producer(redis_url, "svc") as producer:
        await producer.announce_many([(f"s{i}", None) for i in range(1_200)])
        client = consumer(url=proxy.url, queue_size=1_200)
        notes = await client.init()
        await take(notes, 1_200)
        proxy.delay = 0.25  # so that one window after the other would take longer than they live
        renewals = Renewals(service)
        await eventually(lambda: renewals.seen() == 2)
        assert len(service.locks()) == 1_200
        proxy.delay = 0.0
        await client.aclose()


async def test_one_lock_that_is_forbidden_costs_no_other(consumer, service, redis_url):
    def allow(*keys: str) -> None:
        service.redis.execute_command(
            *("ACL", "SETUSER", "joe", "reset", "on", ">pw", "allchannels", "+@all"),
            *("~svc-*", *keys),
        )

    allow("~*")
    client = consumer(url=redis_url.replace("//", "//joe:pw@"), heartbeat_interval=2.0)
    notes = await client.init()
    for i in range(150):
        service.announce(f"s{i}")
    await take(notes, 150)
    allow(*(f"~s{i}{SEPARATOR}*" for i in range(150) if i != 7))
    assert names(await take(notes, 1, DISOWNED)) == ["s7"]
    renewals = Renewals(service, [key for key in service.locks() if not key.startswith("s7<")])
    await eventually(lambda: renewals.seen() == 2)
    await eventually(lambda: len(service.locks()) == 149)  # s7's may not even be given back
    await nothing_comes(notes, 0.1)


async def test_one_lock_that_can_not_be_extended_hides_nothing_of_others(
    consumer, service, redis_url
):
    def allow(*keys: str) -> None:
        service.redis.execute_command(
            *("ACL", "SETUSER", "joe", "reset", "on", ">pw", "allchannels", "+@all"),
            *("~svc-*", "~{svc-*", *keys),
        )

    if int(service.redis.info("server")["redis_version"].split(".")[0]) < 7:
        pytest.skip("Redis before 7.0 knows no right to read a key and not to write it")
    allow("~*")
    url = redis_url.replace("//", "//joe:pw@")
    client = consumer(url=url, heartbeat_interval=2.0, auto_claim=False)
    notes = await client.init()
    ids = [service.announce(f"s{i}") for i in range(20)]
    await take(notes, 20)
    keys = [f"s{i}{SEPARATOR}{ids[i]}" for i in range(20)]
    allow(*(f"~{key}" for i, key in enumerate(keys) if i != 7), f"%R~{keys[7]}")
    service.redis.set(keys[8], "another", px=60_000)
    assert names(await take(notes, 1, DISOWNED)) == ["s8"]
    allow("~*")  # so that all can be given back


async def test_cancelling_everything_hands_over_and_tells(consumer, service):
    for i in range(5):
        service.announce(f"s{i}")
    client = consumer()
    notes = await client.init()
    await take(notes, 5)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    assert [n.type async for n in notes] == [TERMINATED]
    await asyncio.wait_for(client.aclose(), 5)
    assert (service.locks(), service.pending()) == ({}, [])
    assert len(service.entries()) == 5


async def test_streams_nobody_was_told_of_are_released_when_the_client_ends(consumer, service):
    for i in range(50):
        service.announce(f"s{i}")
    client = consumer(retry=RetryConfig(max_retries=0))
    notes = await client.init()
    await take(notes, 1)
    await eventually(lambda: len(service.locks()) == 50)
    (read,) = [c for c in service.redis.client_list() if c["name"] == "relstream:c1:read"]
    service.redis.client_kill_filter(addr=read["addr"])
    await eventually(lambda: client._engine.reason)
    assert [n.type async for n in notes] == [TERMINATED]
    await eventually(lambda: len(service.locks()) == 1)
    assert len(service.pending()) == 1


async def test_a_lost_stream_stays_lost_though_its_rest_can_not_be_returned(consumer, make_server):
    with make_server() as server:
        admin = redis.Redis.from_url(server.url)
        service = Service(admin)
        client = consumer(url=server.url, retry=RetryConfig(max_retries=0), auto_claim=False)
        notes = await client.init()
        service.announce("s1")
        await take(notes, 1)
        service.announce("s1")
        await eventually(lambda: client._engine.partitions[0].leases.get("s1").again)
        head = client._engine.partitions[0].leases.get("s1")
        server.pause()  # or it would put the rest back in time, to be owned anew
        client._engine.partitions[0].lose([(head, list(head.again))])
        await asyncio.to_thread(server.kill)
        await take(notes, 1, DISOWNED)
        await eventually(lambda: not client._engine.partitions[0].completer._others)
        assert len(client._engine.partitions[0].leases) == 0
        admin.close()


async def test_an_entry_with_more_fields_than_a_script_can_pass_on(consumer, service):
    fields = {f"f{i}": "x" for i in range(4000)}
    service.announce("s1", **fields)
    client = consumer(max_streams=1)
    notes = await client.init()
    await take(notes, 1)
    await client.release("s1")
    await take(notes, 1)
    ((_, kept),) = service.redis.xrange(service.lbs)
    assert len(kept) == 4001
