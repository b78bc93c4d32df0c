"""What a consumer knows of itself: owned streams, health, pausing, draining, and twins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import threading
import time

import pytest
import redis
from faults.processes import Tap
from helpers import (
    DISOWNED,
    HEARTBEAT,
    QUICK,
    SEPARATOR,
    TERMINATED,
    eventually,
    names,
    nothing_comes,
    take,
)

from relstream import (
    ClientClosed,
    ConnectionFailed,
    Health,
    InvalidOption,
    LBSInfo,
    OwnedStream,
    Producer,
    ReplyError,
    StreamClient,
)
from relstream.engine.health import HealthMonitor
from relstream.lbs.locks import Locks

JOE = ("ACL", "SETUSER", "joe", "reset", "on", ">pw", "allchannels")


def reasons(client: StreamClient) -> str:
    return "; ".join(client.health().reasons)


async def said_within(client: StreamClient, text: str, seconds: float) -> Health:
    """The first health whose reasons contain this."""
    deadline = time.monotonic() + seconds
    while text not in (said := reasons(client)):
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.01)
    return client.health()


# --- owned streams ------------------------------------------------------------------------------


async def test_owned_lists_each_stream_with_token_and_lease(consumer, service):
    ids = [service.announce(f"s{i}") for i in range(5)]
    client = consumer()
    assert list(client.owned()) == []
    before = time.monotonic()
    notes = await client.init()
    await take(notes, 5)
    owned = sorted(client.owned())  # they come from several masters
    assert all(type(one) is OwnedStream for one in owned)
    assert [(one.data_stream_name, one.id_in_lbs) for one in owned] == [
        (f"s{i}", ids[i]) for i in range(5)
    ]
    for one in owned:
        assert before < one.since < time.monotonic()
        assert before + HEARTBEAT < one.lease_deadline < time.monotonic() + HEARTBEAT
        left = service.redis.pttl(f"{one.data_stream_name}{SEPARATOR}{one.id_in_lbs}") / 1000
        # The lock never ends before the lease, by more than the server rounds away.
        assert time.monotonic() + left > one.lease_deadline - 0.002


async def test_owned_is_a_snapshot_of_the_call(consumer, service):
    for i in range(3):
        service.announce(f"s{i}")
    client = consumer()
    await take(await client.init(), 3)
    owned = client.owned()
    assert iter(owned) is owned
    await client.done_stream("s1")
    assert [one.data_stream_name for one in owned] == ["s0", "s1", "s2"]
    assert [one.data_stream_name for one in client.owned()] == ["s0", "s2"]


async def test_streams_that_wait_are_owned_and_those_that_end_are_not(consumer, service):
    service.announce("s0")
    client = consumer()
    notes = await client.init()
    await eventually(lambda: len(list(client.owned())) == 1)
    assert not client.is_owned("s0")  # nobody was notified
    (note,) = await take(notes, 1)
    assert client.is_owned("s0")
    assert client.is_owned(note.payload)
    ending = asyncio.ensure_future(client.done_stream("s0"))
    await asyncio.sleep(0)
    assert not client.is_owned("s0")
    assert list(client.owned()) == []
    await ending


async def test_is_owned_heeds_the_token(consumer, service):
    entry_id = service.announce("s1")
    client = consumer()
    (note,) = await take(await client.init(), 1)
    ms, _, seq = entry_id.partition("-")
    assert client.is_owned(note.payload)
    assert not client.is_owned(LBSInfo("s1", f"{int(ms) - 1}-{seq}"))
    assert not client.is_owned(LBSInfo("s2", entry_id))
    assert not client.is_owned("s2")
    again = service.announce("s1")
    await eventually(lambda: client.is_owned(LBSInfo("s1", again)))
    with pytest.raises(InvalidOption, match="stream=5"):
        client.is_owned(5)
    with pytest.raises(InvalidOption):
        client.is_owned(None)


@pytest.mark.parametrize("threaded", [True, False])
async def test_renewal_extends_the_lease(consumer, service, threaded):
    service.announce("s1")
    client = consumer(renew_in_thread=threaded, heartbeat_interval=2.0)
    await take(await client.init(), 1)
    (first,) = client.owned()
    await eventually(lambda: next(client.owned()).lease_deadline > first.lease_deadline + 1.5)
    (later,) = client.owned()
    assert later.since == first.since
    assert later.lease_deadline < time.monotonic() + 2.0


@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
async def test_a_lease_that_is_not_renewed_ends_though_nobody_said_so(consumer, service):
    blocked = False

    async def gate(role: str, args: list[bytes]) -> bool:
        return not blocked

    service.announce("s1")
    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url, heartbeat_interval=1.0)
        notes = await client.init()
        (note,) = await take(notes, 1)
        blocked = True  # nothing is answered any more, on whichever connection
        await eventually(lambda: not client.is_owned(note.payload), 3.0)
        (one,) = client.owned()
        assert one.lease_deadline <= time.monotonic()
        await nothing_comes(notes, 0.0)
        blocked = False
    with contextlib.suppress(Exception):
        await client.aclose()


async def test_a_revived_lock_has_a_new_deadline(consumer, service):
    entry_id = service.announce("s1")
    client = consumer(heartbeat_interval=QUICK, auto_claim=False)
    await take(await client.init(), 1)
    (first,) = client.owned()
    lock = f"s1{SEPARATOR}{entry_id}"
    service.redis.delete(lock)
    await eventually(lambda: lock in service.locks())
    await eventually(lambda: next(client.owned()).lease_deadline > first.lease_deadline)


async def test_a_lock_that_is_not_renewed_keeps_no_other_from_a_new_deadline(
    consumer, service, monkeypatch
):
    renew_each = Locks.renew_each

    async def refused(self, keys: list[bytes]) -> list:
        outcomes = await renew_each(self, keys)
        return [
            ReplyError("MISCONF no") if key.startswith(b"s1<") else outcome
            for key, outcome in zip(keys, outcomes, strict=True)
        ]

    monkeypatch.setattr(Locks, "renew_each", refused)
    for i in range(3):
        service.announce(f"s{i}")
    client = consumer(heartbeat_interval=HEARTBEAT, auto_claim=False)
    await take(await client.init(), 3)
    before = [one.lease_deadline for one in client.owned()]

    def extended() -> list[bool]:
        owned = client.owned()
        return [one.lease_deadline > old for one, old in zip(owned, before, strict=True)]

    await eventually(lambda: extended() == [True, False, True])


# --- health -------------------------------------------------------------------------------------


async def test_a_healthy_consumer_has_no_reasons(consumer, service):
    client = consumer(heartbeat_interval=2.0)
    new = client.health()
    assert (new.live, new.ready, new.leader, new.owned, new.waiting) == (
        *(False, False, False),
        *(0, 0),
    )
    assert (new.last_renewal_age, new.last_read_age) == (None, None)
    assert "not open" in reasons(client)
    service.announce("s1")
    service.announce("s2")
    notes = await client.init()
    await eventually(lambda: client.health().waiting == 2)
    await take(notes, 1)
    await eventually(lambda: client.health().leader)
    for _ in range(60):
        health = client.health()
        assert health.reasons == ()
        assert health.live
        assert health.ready
        assert (health.owned, health.waiting) == (2, 1)
        assert health.last_renewal_age < 2.0
        assert health.last_read_age < 2.0
        await asyncio.sleep(0.05)
    await client.aclose()
    closed = client.health()
    assert not closed.live
    assert not closed.ready
    assert closed.reasons == ("the client is closed",)
    with pytest.raises(AttributeError):
        closed.live = True


async def test_an_idle_consumer_keeps_its_renewal_connection(consumer):
    client = consumer(heartbeat_interval=1.0)
    await client.init()
    await asyncio.sleep(1.5)
    health = client.health()
    assert health.reasons == ()
    assert health.last_renewal_age < 1.0


async def test_a_full_consumer_is_ready(consumer, service):
    service.announce("s1")
    client = consumer(heartbeat_interval=1.0, max_streams=1)
    await take(await client.init(), 1)
    await asyncio.sleep(2.5)
    assert client.health().ready
    assert client.health().reasons == ()


@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
@pytest.mark.parametrize("role", ["renew", "read"])
@pytest.mark.parametrize("how", ["refused", "silent"])
async def test_health_names_a_connection_that_fails_within_a_heartbeat(
    consumer, service, role, how
):
    failing = ""

    async def gate(of: str, args: list[bytes]) -> bool:
        if of == failing and how == "refused":
            raise ConnectionResetError
        return of != failing

    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url, heartbeat_interval=HEARTBEAT)
        await client.init()
        await eventually(lambda: client.health().last_read_age is not None)
        assert client.health().ready
        failing = role
        about = "leases" if role == "renew" else "reading"
        await eventually(lambda: about in reasons(client), HEARTBEAT)
        if role == "read":
            assert not client.health().ready
            assert client.health().live
        failing = ""
        await eventually(lambda: client.health().ready and not client.health().reasons)
        await client.aclose()


@pytest.mark.only("single", "sentinel")
async def test_health_names_what_the_user_may_not_do_any_more(consumer, service, redis_url):
    service.redis.execute_command(*JOE, "~*", "+@all")
    client = consumer(url=redis_url.replace("//", "//joe:pw@"))
    await client.init()
    service.redis.execute_command(*("ACL", "SETUSER", "joe", "-pexpire"))
    health = await said_within(client, "pexpire", HEARTBEAT)
    assert "leases can't be renewed" in "; ".join(health.reasons)
    service.redis.execute_command(*("ACL", "SETUSER", "joe", "+pexpire"))
    await eventually(lambda: client.health().reasons == ())


async def test_health_names_a_background_task_that_ended(consumer):
    client = consumer()
    notes = await client.init()
    task = next(task for task, (name, _) in client._engine._tasks.items() if name == "audit")
    task.cancel()
    await take(notes, 1, TERMINATED)
    health = client.health()
    assert not health.live
    assert not health.ready
    assert "audit was cancelled" in "; ".join(health.reasons)


async def test_health_names_a_blocked_loop_when_asked_in_another_thread(consumer):
    client = consumer(heartbeat_interval=2.0)
    await client.init()
    await asyncio.sleep(0.1)
    seen: list[Health] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.02):
            seen.append(client.health())

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(2.0)  # noqa: ASYNC251
    over.set()
    thread.join()
    blocked = [health for health in seen if not health.live]
    assert blocked
    assert all("the event loop has not run" in health.reasons[0] for health in blocked)
    assert "has had no answer" not in reasons(client)
    assert client.health().live  # asked on the loop, which answers
    await asyncio.sleep(0.1)
    assert client.health().reasons == ()


async def test_no_pulse_is_left_after_closing(consumer, monkeypatch):
    beats = 0
    pulse = HealthMonitor._pulse

    def counted(self) -> None:
        nonlocal beats
        beats += 1
        pulse(self)

    monkeypatch.setattr(HealthMonitor, "_pulse", counted)
    client = consumer(heartbeat_interval=0.4)
    await client.init()
    await eventually(lambda: beats > 3)
    await client.aclose()
    beats = 0
    await asyncio.sleep(0.5)
    assert beats == 0


# --- pausing and draining -----------------------------------------------------------------------


async def test_a_paused_consumer_reads_nothing_until_it_resumes(consumer, service):
    service.announce("s0")
    client = consumer()
    notes = await client.init()
    await take(notes, 1)
    await eventually(lambda: service.reads("c1"))
    start = time.monotonic()
    await client.pause()
    assert time.monotonic() - start < 0.8  # the read was ended, not waited for
    assert not service.reads("c1")
    service.announce("s1")
    await client.pause()
    await nothing_comes(notes, 1.3)
    health = client.health()
    assert health.live
    assert not health.ready
    assert "paused" in reasons(client)
    assert service.pending() != service.entries()
    await client.done_stream("s0")  # owned streams go on
    client.resume()
    client.resume()
    assert names(await take(notes, 1)) == ["s1"]
    assert client.health().ready


async def test_what_was_read_before_the_pause_is_owned_and_notified(consumer, service):
    client = consumer()
    notes = await client.init()
    for i in range(400):
        service.announce(f"s{i}")
    await client.pause()
    await asyncio.sleep(0.5)
    owned = len(list(client.owned()))
    assert owned == len(service.pending("c1")) == len(service.locks())
    if owned:
        await take(notes, owned)
    client.resume()
    await take(notes, 400 - owned)


async def test_pausing_a_client_that_is_not_open_says_so(consumer):
    client = consumer()
    with pytest.raises(ClientClosed):
        await client.pause()
    with pytest.raises(ClientClosed):
        client.resume()
    with pytest.raises(ClientClosed):
        await client.drain()
    await client.init()
    await client.aclose()
    with pytest.raises(ClientClosed):
        await client.pause()
    with pytest.raises(ClientClosed):
        client.resume()
    assert await asyncio.wait_for(client.drain(), 1.0)  # nothing is left


@pytest.mark.parametrize("timeout", [-1, math.nan, math.inf, True, "1", 1e12])
async def test_drain_refuses_a_timeout_that_is_none(consumer, timeout):
    with pytest.raises(InvalidOption, match="timeout="):
        await consumer().drain(timeout)


async def test_drain_waits_until_all_is_finished(consumer, service):
    for i in range(3):
        service.announce(f"s{i}")
    client = consumer()
    notes = await client.init()
    await eventually(lambda: client.health().owned == 3)
    assert await client.drain(0.1) is False
    assert await client.drain(0) is False
    service.announce("later")
    draining = asyncio.ensure_future(client.drain())
    for note in await take(notes, 3):
        await asyncio.sleep(0.1)
        assert not draining.done()
        await client.done_stream(note.payload)
    assert await asyncio.wait_for(draining, 1.0) is True
    await nothing_comes(notes, 1.2)  # it stays paused
    assert await client.drain(0) is True
    client.resume()
    assert names(await take(notes, 1)) == ["later"]


async def test_a_drain_that_is_cancelled_leaves_nothing_but_the_pause(consumer, service):
    service.announce("s0")
    client = consumer()
    notes = await client.init()
    await take(notes, 1)
    before = asyncio.all_tasks()
    draining = asyncio.ensure_future(client.drain())
    await asyncio.sleep(0.2)
    draining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await draining
    assert not {task for task in asyncio.all_tasks() - before if task.get_name() == "drain"}
    service.announce("s1")
    await nothing_comes(notes, 1.2)
    client.resume()
    await take(notes, 1)


async def test_drain_ends_when_the_client_closes(consumer, service):
    service.announce("s0")
    client = consumer()
    await take(await client.init(), 1)
    draining = asyncio.ensure_future(client.drain())
    await asyncio.sleep(0.1)
    closing = asyncio.ensure_future(client.aclose())
    await asyncio.sleep(0)
    late = asyncio.ensure_future(client.drain(10))
    await closing
    assert await asyncio.wait_for(draining, 1.0) is True
    assert await asyncio.wait_for(late, 1.0) is True


async def test_drain_ends_after_the_client_was_terminated(consumer, service):
    service.announce("s0")
    client = consumer()
    notes = await client.init()
    await take(notes, 1)
    next(task for task, (name, _) in client._engine._tasks.items() if name == "fetcher").cancel()
    await take(notes, 1, TERMINATED)
    assert await client.drain(0.2) is False
    await client.done_stream("s0")
    assert await client.drain(1.0) is True


async def test_pausing_with_partitions_reaches_them_all(consumer, redis_url):
    client = consumer(partitions=3)
    notes = await client.init()
    await asyncio.sleep(0.3)
    await client.pause()
    async with Producer(redis_url, "svc", partitions=3) as producer:
        await producer.announce_many([(f"s{i}", None) for i in range(30)])
    await nothing_comes(notes, 1.3)
    client.resume()
    assert sorted(names(await take(notes, 30))) == sorted(f"s{i}" for i in range(30))
    assert len(list(client.owned())) == 30
    assert all(client.is_owned(f"s{i}") for i in range(30))


# --- twins --------------------------------------------------------------------------------------


def instance_key(service, name: str = "c1") -> str:
    return f"{{{service.lbs}}}-instance-{name}"


def complaints(caplog) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.ERROR and "another living consumer" in record.getMessage()
    ]


async def test_two_living_consumers_of_one_name_are_found_out(consumer, service, caplog):
    one = consumer(heartbeat_interval=QUICK)
    await one.init()
    other = consumer(heartbeat_interval=QUICK)
    await other.init()
    await eventually(lambda: "another living consumer" in reasons(one), 8 * QUICK)
    await eventually(lambda: "another living consumer" in reasons(other), 8 * QUICK)
    await asyncio.sleep(4 * QUICK)
    said = complaints(caplog)
    assert len(said) == 2  # once each
    for text in (*said, reasons(one)):
        assert f"{socket.gethostname()} pid {os.getpid()}" in text
    assert "consumer_id" in said[0]
    await other.aclose()
    await eventually(lambda: one.health().reasons == (), 8 * QUICK)
    assert len(complaints(caplog)) == 2


async def test_the_former_self_is_no_twin(consumer, service, caplog):
    service.redis.set(instance_key(service), "dead-instance somewhere pid 1", px=60_000)
    client = consumer(heartbeat_interval=QUICK)
    await client.init()
    await asyncio.sleep(4 * QUICK)
    assert client.health().reasons == ()
    assert not complaints(caplog)
    assert 0 < service.redis.pttl(instance_key(service)) <= 2 * QUICK * 1000
    service.redis.set(instance_key(service), "living elsewhere pid 7", px=60_000)
    await eventually(lambda: "elsewhere pid 7" in reasons(client))
    assert len(complaints(caplog)) == 1
    await client.aclose()
    assert service.redis.get(instance_key(service)) is None


async def test_the_instance_of_another_is_not_removed(consumer, service):
    client = consumer(heartbeat_interval=30.0)
    await client.init()
    await eventually(lambda: service.redis.get(instance_key(service)))
    service.redis.set(instance_key(service), "another")
    await client.aclose()
    assert service.redis.get(instance_key(service)) == b"another"


@pytest.mark.only("single", "sentinel")
async def test_without_the_right_to_its_key_nothing_is_found_out_and_nothing_breaks(
    consumer, service, redis_url, caplog
):
    caplog.set_level(logging.DEBUG, "relstream")
    allowed = ("~svc-*", f"~*{SEPARATOR}*", "~{svc-input}-finished-*", "+@all")
    service.redis.execute_command(*JOE, *allowed)
    service.announce("s1")
    client = consumer(url=redis_url.replace("//", "//joe:pw@"), heartbeat_interval=QUICK)
    await take(await client.init(), 1)
    await asyncio.sleep(3 * QUICK)
    about = [r for r in caplog.records if "-instance-" in r.getMessage()]
    assert [record.levelno for record in about] == [logging.INFO]
    assert client.health().reasons == ()
    await client.done_stream("s1")


async def test_only_the_first_partition_has_an_instance(consumer, service):
    await consumer(partitions=3).init()
    await eventually(lambda: list(service.redis.scan_iter(match="*-instance-*")))
    await asyncio.sleep(0.2)
    assert len(list(service.redis.scan_iter(match="*-instance-*"))) == 1


# --- a consumer that can't renew ----------------------------------------------------------------


class Broken:
    """A gate that lets nothing of one connection pass, or cuts it."""

    def __init__(self) -> None:
        self.role = ""
        self.silently = False

    async def __call__(self, role: str, args: list[bytes]) -> bool:
        if role != self.role:
            return True
        if not self.silently:
            raise ConnectionResetError
        return False


def retries(service) -> list[bytes | None]:
    return [fields.get(b"_retry_count") for _, fields in service.redis.xrange(service.lbs)]


@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
@pytest.mark.parametrize("silently", [False, True])
async def test_a_consumer_that_can_not_renew_hands_over_and_reads_nothing(
    consumer, service, caplog, silently
):
    gate = Broken()
    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url)
        notes = await client.init()
        for i in range(20):
            service.announce(f"s{i}")
        payloads = [note.payload for note in await take(notes, 20)]
        ids = service.entries()
        gate.silently, gate.role = silently, "renew"
        lost = await take(notes, 20, DISOWNED, HEARTBEAT)
        assert {note.payload for note in lost} == set(payloads)
        assert not any(map(client.is_owned, payloads))
        # Before a lock had expired, uncounted, and read by nobody since.
        entries = service.entries()
        assert len(entries) == 20
        assert not set(entries) & set(ids)
        assert retries(service) == [None] * 20
        assert service.pending() == []
        assert service.locks() == {}
        service.announce("new")
        await nothing_comes(notes, 1.3)
        health = client.health()
        assert not health.ready
        assert "nothing new is read" in reasons(client)
        told = [r for r in caplog.records if "handed over" in r.getMessage()]
        assert len(told) == 1
        assert "20 owned streams" in told[0].getMessage()
        gate.role = ""
        assert len(await take(notes, 21)) == 21
        assert retries(service) == [None] * 21
        await eventually(lambda: client.health().reasons == ())
        await client.aclose()


@pytest.fixture
def masters(deployment, redis_sync, request) -> list[redis.Redis]:
    """A connection to each master, which is there already when no more are allowed."""
    clients = [redis_sync]
    if deployment == "cluster":
        clients = [node.client for node in request.getfixturevalue("cluster").masters()]
    for each in clients:
        each.ping()
    return clients


async def test_at_maxclients_streams_are_handed_over_uncounted(consumer, service, masters):
    """Renewal can't connect again, all else goes on; on a cluster with each master."""
    client = consumer()
    notes = await client.init()
    for i in range(60):
        service.announce(f"s{i}")
    payloads = {note.payload for note in await take(notes, 60)}
    try:
        for master in masters:
            master.config_set("maxclients", 1)
            for each in master.client_list():
                if each["name"].endswith(":renew"):
                    master.client_kill_filter(_id=each["id"])
        lost = await take(notes, 60, DISOWNED, 2 * HEARTBEAT)
        assert {note.payload for note in lost} == payloads
        assert retries(service) == [None] * 60
        assert service.pending() == []
        assert "nothing new is read" in reasons(client)
    finally:
        for master in masters:
            master.config_set("maxclients", 10_000)
    assert len(await take(notes, 60)) == 60
    assert retries(service) == [None] * 60


@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
async def test_a_consumer_that_owns_nothing_and_can_not_renew_takes_nothing(consumer, service):
    gate = Broken()
    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url, heartbeat_interval=1.0)
        notes = await client.init()
        gate.role = "renew"
        await eventually(lambda: "nothing new is read" in reasons(client))
        service.announce("s1")
        await nothing_comes(notes, 1.3)
        assert service.locks() == {}
        gate.role = ""
        await take(notes, 1)
        await client.aclose()


@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
async def test_init_fails_when_the_renewal_connection_does(consumer, service):
    gate = Broken()
    gate.role = "renew"
    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url)
        with pytest.raises(ConnectionFailed):
            await client.init()
        await client.aclose()


@pytest.mark.parametrize("silently", [False, True])
@pytest.mark.parametrize("beats", [1.2, 2.5])
@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
async def test_an_outage_causes_no_hand_over(consumer, service, caplog, silently, beats):
    up = asyncio.Event()
    up.set()

    async def gate(role: str, args: list[bytes]) -> bool:
        if not up.is_set() and not silently:
            raise ConnectionResetError
        await up.wait()
        return True

    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url, heartbeat_interval=1.0, auto_claim=False)
        notes = await client.init()
        for i in range(20):
            service.announce(f"s{i}")
        await take(notes, 20)
        ids = service.entries()
        up.clear()
        await nothing_comes(notes, beats)
        up.set()
        await nothing_comes(notes, 2.0)
        assert service.entries() == ids
        assert len(service.locks()) == 20
        assert not [r for r in caplog.records if "handed over" in r.getMessage()]
        await eventually(lambda: client.health().reasons == ())
        await client.aclose()


@pytest.mark.only("single", "sentinel", reason="clients of a cluster find ways past a Tap")
async def test_renewed_again_is_logged_only_when_it_is_true(consumer, service, caplog):
    gate = Broken()
    async with Tap(service.redis, gate) as tap:
        client = consumer(url=tap.url, heartbeat_interval=1.0)
        await client.init()
        gate.role = "renew"
        await eventually(lambda: "can't be renewed" in caplog.text)
        await asyncio.sleep(2.0)
        assert "renewed again" not in caplog.text
        gate.role = ""
        await eventually(lambda: "leases can be renewed again" in caplog.text)
        assert "leases are renewed again" not in caplog.text, "there are none"
        await client.aclose()
