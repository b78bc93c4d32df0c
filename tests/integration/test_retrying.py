"""Reads that fail: what is waited out, what ends the client, and how the application learns it."""

from __future__ import annotations

import asyncio

import pytest
import redis
from helpers import TERMINATED, Service, eventually, names, take

from relstream import (
    AuthenticationFailed,
    ClientTerminated,
    ReplyError,
    RetryConfig,
    StreamClient,
    backoff,
)

QUICK = RetryConfig(initial_delay=0.02, max_delay=0.1)


# --- an outage --------------------------------------------------------------------------------


async def test_by_default_an_outage_ends_neither_the_client_nor_a_call(consumer, make_server):
    """Longer than five tries took, which was the default."""
    server = make_server(config={"appendonly": "yes", "appendfsync": "always"})
    client = consumer(url=server.url)
    notes = await client.init()
    with redis.Redis.from_url(server.url) as admin:
        service = Service(admin)
        for name in ("a", "b"):
            service.announce(name)
        await take(notes, 2)
        await asyncio.to_thread(server.kill)
        calls = [asyncio.ensure_future(call) for call in (client.done_stream("a"),)]
        calls.append(asyncio.ensure_future(client.release("b")))
        await asyncio.sleep(8)
        assert not client._engine.reason
        assert not any(call.done() for call in calls)
        await asyncio.to_thread(server.start)
        await asyncio.gather(*calls)
        assert names(await take(notes, 1)) == ["b"]
        await client.aclose()
        assert len(service.entries()) == 1


# --- what is forbidden ------------------------------------------------------------------------


@pytest.fixture
def acl(redis_sync, redis_url):
    """Changes the user `joe`, whose URL is `acl.url`."""

    def change(*rules: str) -> None:
        redis_sync.execute_command("ACL", "SETUSER", "joe", *rules)

    change("on", ">pw", "~*", "&*", "+@all")
    change.url = redis_url.replace("//", "//joe:pw@")
    return change


def refuse(acl, how, redis_sync):
    if how == "command":
        acl("-xreadgroup")
    else:
        acl("resetpass", ">other")
        for kind in ("normal", "pubsub"):
            redis_sync.client_kill_filter(_type=kind, skipme=True)


def allow(acl):
    acl("+xreadgroup", "resetpass", ">pw")


@pytest.mark.parametrize("how", ["command", "password"])
async def test_a_right_that_comes_back_ends_nothing(consumer, service, acl, how, caplog):
    client = consumer(url=acl.url, retry=QUICK)
    notes = await client.init()
    refuse(acl, how, service.redis)
    service.announce("s1")
    await eventually(lambda: "reading failed" in caplog.text)
    await asyncio.sleep(1)
    allow(acl)
    assert names(await take(notes, 1)) == ["s1"]
    await client.done_stream("s1")


async def test_what_stays_forbidden_ends_the_client(consumer, service, acl, monkeypatch):
    monkeypatch.setattr(backoff, "FORBIDDEN_FOR", 1.0)
    client = consumer(url=acl.url, retry=QUICK)
    notes = await client.init()
    started = asyncio.get_running_loop().time()
    refuse(acl, "command", service.redis)
    (last,) = await take(notes, 1, TERMINATED)
    assert asyncio.get_running_loop().time() - started > 0.9
    assert "NOPERM" in last.additional_info["info"]


async def test_a_password_that_is_refused_is_an_outage(consumer, service, acl, monkeypatch):
    """A server, or who gives passwords, may learn a new one late; however late."""
    monkeypatch.setattr(backoff, "FORBIDDEN_FOR", 0.5)
    client = consumer(url=acl.url, retry=QUICK)
    notes = await client.init()
    refuse(acl, "password", service.redis)
    await eventually(lambda: "did not accept user name" in " ".join(client.health().reasons))
    await asyncio.sleep(1.5)
    allow(acl)
    service.announce("s1")
    assert names(await take(notes, 1)) == ["s1"]
    await client.done_stream("s1")


async def test_forbidden_a_bound_holds_as_well(consumer, service, acl):
    client = consumer(url=acl.url, retry=RetryConfig(max_retries=1, initial_delay=0.01))
    notes = await client.init()
    refuse(acl, "command", service.redis)
    (last,) = await take(notes, 1, TERMINATED)
    assert "NOPERM" in last.additional_info["info"]


@pytest.mark.only("single", reason="elsewhere no bound holds for the first minute")
async def test_a_call_does_not_outlast_what_ended_the_client(consumer, service, acl):
    client = consumer(url=acl.url, retry=RetryConfig(max_retries=3, initial_delay=0.1))
    notes = await client.init()
    service.announce("s1")
    await take(notes, 1)
    refuse(acl, "password", service.redis)
    with pytest.raises(AuthenticationFailed):
        await asyncio.wait_for(client.done_stream("s1"), 20)
    await take(notes, 1, TERMINATED)


# --- how the application learns it ------------------------------------------------------------


async def died(client: StreamClient, service: Service) -> None:
    service.redis.delete(service.lbs)
    service.redis.set(service.lbs, "no stream")
    await eventually(lambda: client._engine.reason)


async def test_leaving_a_client_that_died_raises(consumer, service):
    reasons = []

    async def work() -> None:
        client = consumer()
        async with client as notes:
            await died(client, service)
            reasons.extend([n.additional_info["info"] async for n in notes if n.type is TERMINATED])

    with pytest.raises(ClientTerminated, match="by a failure: fetcher failed: WRONG") as caught:
        await work()
    assert reasons == [caught.value.reason]
    assert isinstance(caught.value.__cause__, ReplyError)
    assert service.locks() == {}


async def test_an_exception_on_its_way_is_not_replaced(consumer, service):
    async def work() -> None:
        client = consumer()
        async with client:
            await died(client, service)
            raise ValueError("on its way")

    with pytest.raises(ValueError, match="on its way"):
        await work()


async def test_a_cancellation_on_its_way_is_not_replaced(consumer, service):
    client = consumer()

    async def work() -> None:
        async with client:
            await died(client, service)
            await asyncio.sleep(60)

    working = asyncio.ensure_future(work())
    await eventually(lambda: client._engine.reason)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_closing_a_client_that_died_raises_nothing(consumer, service):
    for end in ("aclose", "done"):
        client = consumer(end)
        await client.init()
        await died(client, service)
        await getattr(client, end)()
        service.redis.delete(service.lbs)


async def test_without_an_error_there_is_no_cause(consumer):
    async def work() -> None:
        client = consumer()
        async with client:
            client._engine._running("audit", client._engine.partitions[0]).cancel()
            await eventually(lambda: client._engine.reason)

    with pytest.raises(ClientTerminated, match="audit was cancelled") as caught:
        await work()
    assert caught.value.__cause__ is None


async def test_leaving_a_client_that_lives_raises_nothing(consumer):
    async with consumer():
        pass
