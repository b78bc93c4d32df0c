"""Failing that is interrupted: a failed stream is never lost, and comes back once."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from faults.processes import Tap
from helpers import eventually, take

from relstream import ConnectionLost, RecoveryConfig

TTL = 0.4
LEAVE_ALONE = RecoveryConfig(reconciliation_interval=3600, min_idle_time=3600)


@pytest.fixture(params=["scripts", "steps"])
def user(request, service):
    """What stands before the host in the URL of a user who may run scripts, or may not."""
    if request.param == "scripts":
        return "://"
    service.redis.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-eval", "-evalsha"],
    )  # fmt: skip
    return "://app:x@"


class KillAt:
    """Kills a process just before command number `step` since it was armed reaches the server."""

    def __init__(self, step):
        self.step = step
        self.seen = []
        self.pid = None
        self.armed = self.killed = False

    async def __call__(self, role, args):
        if self.killed:
            return False
        # The audit looks with XPENDING and TIME, now and then; what leads works beside.
        if not self.armed or role != "command" or args[0] in (b"TIME", b"XPENDING", b"PING"):
            return True
        self.seen.append(args[0].decode())
        if len(self.seen) == self.step:
            await asyncio.sleep(0.02)  # what was passed on is done
            os.kill(self.pid, signal.SIGKILL)
            self.killed = True
        return not self.killed


async def killed_at(step, start, consumer, service, redis_url, user, max_retries):
    service.redis.script_flush()
    gate = KillAt(step)
    recovery = {"max_retries": max_retries, "retry_window": None}
    async with Tap(service.redis, gate) as tap:
        victim = start(
            "victim", url=tap.url.replace("://", user), heartbeat_interval=TTL, auto_claim=False,
            recovery=recovery,
        )  # fmt: skip
        gate.pid = victim.pid
        await victim.heard("ready")
        service.announce("s1", '{"n": 1}')
        await victim.heard("stream_added")
        gate.armed = True
        victim.tell("fail s1 0.5")
        await eventually(lambda: gate.killed or victim.said("fail"))
        victim.kill()
    client = consumer("fresh", heartbeat_interval=TTL, recovery=RecoveryConfig(**recovery))
    notes = await client.init()

    def letters():
        return [fields[b"_source_id"] for _, fields in service.redis.xrange(service.dlq)]

    if max_retries:
        (got,) = await take(notes, 1)
        # Killed where the entry is pending and delayed, it comes twice: but never again after that.
        assert got.additional_info == {"n": 1}
        assert got.retry_count == 1
        await client.done_stream(got.payload)
        await asyncio.sleep(1.0)
        assert len(service.entries()) <= (user != "://"), gate.seen
    else:
        await eventually(lambda: letters() and not service.pending())
        assert len(set(letters())) == 1
    await client.aclose()
    service.redis.flushall()
    return gate.killed


@pytest.mark.slow
@pytest.mark.parametrize("max_retries", [0, 3])
async def test_killed_between_any_two_commands(
    start, consumer, service, redis_url, user, max_retries
):
    step = 1
    while await killed_at(step, start, consumer, service, redis_url, user, max_retries):
        step += 1
        assert step < 20
    assert step > 1


class LosesTheReply:
    """A link whose connection is lost just after it carried out a command of this name; once."""

    def __init__(self, link, name):
        self._link = link
        self._name = name
        self.lost = 0

    def __getattr__(self, name):
        return getattr(self._link, name)

    async def pipeline(self, packed, replies, **options):
        reply = await self._link.pipeline(packed, replies, **options)
        if self._name in packed and not self.lost:
            self.lost += 1
            raise ConnectionLost("just now")
        return reply

    async def execute(self, *args, **options):
        reply = await self._link.execute(*args, **options)
        if args[0] == self._name and not self.lost:
            self.lost += 1
            raise ConnectionLost("just now")
        return reply


@pytest.mark.parametrize(
    ("user", "name"),
    [("scripts", b"EVALSHA"), ("steps", b"XACK"), ("steps", b"XDEL")],
    indirect=["user"],
)
@pytest.mark.parametrize("end", ["fail", "reject"])
async def test_a_reply_that_is_lost(consumer, service, user, redis_url, name, end):
    """It is carried out once, however often it is asked for."""
    client = consumer(url=redis_url.replace("://", user), auto_claim=False, recovery=LEAVE_ALONE)
    notes = await client.init()
    service.announce("s1")
    (got,) = await take(notes, 1)
    completer = client._engine.partitions[0].completer
    link = completer._completion._link = LosesTheReply(completer._completion._link, name)
    if end == "fail":
        await client.fail(got.payload, delay=60)
        assert service.redis.zcard("{svc-input}-delayed") == 1
    else:
        await client.reject(got.payload)
        assert service.redis.xlen(service.dlq) == 1
    assert (service.entries(), service.pending(), service.locks()) == ([], [], {})
    assert link.lost
