"""A leader judges the dead, and nobody else: whatever happens to its connections, key or server."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import redis
from faults.processes import Tap
from helpers import SEPARATOR, eventually, take

from relstream import RecoveryConfig

LEADER = "svc-input-reconciler"
# As a clock does that is set forward.
EXPIRE_ALL = """
for i, key in ipairs(redis.call('KEYS', '*')) do
  if redis.call('PTTL', key) > 0 then
    redis.call('PEXPIRE', key, 1)
  end
end
"""
HEARTBEAT = 1.0
COUNT = 100


async def own(consumer, service, count=COUNT, consumers=3, **options):
    """Consumers that own so many streams together; the ids of their entries."""
    clients = [consumer(f"c{i}", heartbeat_interval=HEARTBEAT, **options) for i in range(consumers)]
    for client in clients:
        await client.init()
    for i in range(count):
        service.announce(f"s{i}")
    await eventually(lambda: len(service.locks()) == count)
    return service.entries()


def masters_of(service):
    if isinstance(service.redis, redis.RedisCluster):
        return [service.redis.get_redis_connection(n) for n in service.redis.get_primaries()]
    return [service.redis]


@contextlib.asynccontextmanager
async def again_and_again(seconds, do):
    """Does this every so many seconds; it has done so twice."""
    times = 0

    async def repeat():
        nonlocal times
        while True:
            do()
            times += 1
            await asyncio.sleep(seconds)

    repeating = asyncio.ensure_future(repeat())
    try:
        await eventually(lambda: times > 2)
        yield
    finally:
        repeating.cancel()
        await asyncio.wait({repeating})


@pytest.mark.parametrize("info", [True, False], ids=["told who it is", "not told"])
async def test_connections_that_are_recycled_are_no_outage(consumer, service, info):
    """As by a proxy that lets none grow old; each time a leader waited for owners to renew."""
    masters = masters_of(service)
    if not info:
        for master in masters:
            master.acl_setuser("default", enabled=True, commands=["-info"])
    recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=1.0)
    client = consumer("c1", heartbeat_interval=4.0, recovery=recovery)
    notes = await client.init()

    def recycle():
        for master in masters:
            master.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    try:
        async with again_and_again(1.0, recycle):
            service.orphan(20)
            await take(notes, 20)
    finally:
        for master in masters:
            master.acl_setuser("default", enabled=True, commands=["+info"])


@pytest.mark.slow
async def test_a_server_that_stands_still_now_and_then(consumer, service):
    """Each time the living may be late, but they are not waited for without end."""
    recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=1.0)
    client = consumer("c1", heartbeat_interval=4.0, recovery=recovery)
    notes = await client.init()

    def stand_still():
        for master in masters_of(service):
            master.execute_command("CLIENT", "PAUSE", 1300, "ALL")

    async with again_and_again(2.6, stand_still):
        await asyncio.to_thread(service.orphan, 20)
        await take(notes, 20)


@pytest.mark.slow
@pytest.mark.only("single", "cluster", reason="clients behind Sentinel find ways past a Tap")
async def test_connections_that_end_again_and_again_do_not_add_up(consumer, service):
    """Pauses after failures grow, and a long one looks like an outage."""
    looks = cut = 0

    async def cutting(role: str, args: list[bytes]) -> bool:
        nonlocal looks, cut
        if role == "lead" and args == [b"GET", LEADER.encode()]:
            looks += 1
            if looks % 4 == 0:
                cut += 1
                raise ConnectionError
        return True

    async with Tap(service.redis, cutting) as tap:
        recovery = RecoveryConfig(min_idle_time=0.1, reconciliation_interval=1.0)
        client = consumer(url=tap.url, heartbeat_interval=4.0, recovery=recovery)
        notes = await client.init()
        await eventually(lambda: cut > 8)
        service.orphan(20)
        await take(notes, 20)
        await client.aclose()


@pytest.mark.only("single", "sentinel", reason="pauses the writes of one server")
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
async def test_writes_that_pause_for_longer_than_a_lease(consumer, service, scripts):
    """As while a service replaces its master. Scripts that were held up run before renewals do."""
    if not scripts:
        service.redis.acl_setuser("default", enabled=True, commands=["-evalsha", "-eval"])
    try:
        ids = await own(consumer, service, recovery=RecoveryConfig(min_idle_time=0.0))
        for _ in range(2):
            service.redis.execute_command("CLIENT", "PAUSE", 2500, "WRITE")
            await asyncio.sleep(2.5)
            await eventually(lambda: len(service.locks()) == COUNT)
            await asyncio.sleep(1.5 * HEARTBEAT)
        assert service.entries() == ids
        assert service.redis.xlen(service.dlq) == 0
    finally:
        service.redis.acl_setuser("default", enabled=True, commands=["+evalsha", "+eval"])


async def test_locks_that_are_gone_with_all_other_keys_that_expire(consumer, service):
    """A clock that was set forward, or keys that were evicted: nobody died by that."""
    ids = await own(consumer, service, recovery=RecoveryConfig(max_retries=3))
    masters = masters_of(service)
    for _ in range(5):
        for master in masters:  # each has a clock of its own
            master.eval(EXPIRE_ALL, 0)
        await asyncio.sleep(2.5 * HEARTBEAT)
        await eventually(lambda: len(service.locks()) == COUNT)
    assert service.entries() == ids
    assert service.redis.xlen(service.dlq) == 0


@pytest.mark.only("single", "sentinel", reason="a script sees the leader's key")
async def test_what_a_former_leader_judged_is_void(consumer, service, monkeypatch):
    """It is frozen just before it carries that out, and another leads when it wakes."""
    client = consumer(
        "c1",
        heartbeat_interval=HEARTBEAT,
        auto_claim=False,
        recovery=RecoveryConfig(min_idle_time=0.0, reconciliation_interval=0.5),
    )
    await client.init()
    recoverer = client._engine.partitions[0].recoverer
    put, judged, go = recoverer._requeuer.requeue_planned, asyncio.Event(), asyncio.Event()
    refused: list[BaseException] = []

    async def late(*args, **options):
        judged.set()
        await go.wait()
        try:
            return await put(*args, **options)
        except BaseException as error:
            refused.append(error)
            raise

    recoverer._requeuer.requeue_planned = late
    ids = service.orphan(10)
    await judged.wait()
    service.redis.set(LEADER, "another", px=60_000)
    go.set()
    await eventually(lambda: refused)
    assert getattr(refused[0], "code", None) == "FENCED"
    assert service.entries() == ids
    assert SEPARATOR not in "".join(service.entries())
