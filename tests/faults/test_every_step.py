"""A recovery that ends between any two of its commands: the next one recovers what it left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter

import pytest
from faults.processes import Tap
from helpers import SEPARATOR, eventually

from relstream import NotificationType, RecoveryConfig, StreamClient
from relstream.lbs.vanished import HEARD

# Small pages: many steps.
RECOVERY = {"reconciliation_interval": 1.0, "min_idle_time": 0.1, "batch_size": 3}
TTL = 0.4
# Services that this is done to at the same time, on one server.
AT_ONCE = 5
GOOD = [f"s{i}" for i in range(5)]


class KillAt:
    """Kills a process just before its recovery's command number `step` would reach the server."""

    def __init__(self, step):
        self.step = step
        self.seen = []
        self.pid = None
        self.reached = self.killed = False

    async def __call__(self, role, args):
        if self.reached:
            return False
        if role != "recover" or args[0] in (b"HELLO", b"XINFO", b"PING"):
            return True
        if args[0] in (b"GET", b"SET", b"PEXPIRE") and args[1].endswith(b"-reconciler"):
            return True
        self.seen.append(args[0].decode())
        if len(self.seen) == self.step:
            self.reached = True  # nothing passes over other connections, either
            await asyncio.sleep(0.02)  # what was passed on is done
            os.kill(self.pid, signal.SIGKILL)
            self.killed = True
        return not self.reached


def orphans(service, name):
    """One entry of each kind, all read by a consumer that died, but for one whose owner lives.

    Another's: who holds a lock lives, and may finish what is gone from the stream.
    """
    redis, stem = service.redis, '{{"DataStreamName": "{}", "Info": {{"n": 1}}}}'
    redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
    ids = {}
    for kind in [*GOOD[:2], "gone", "poison", "worn out", *GOOD[2:], "living"]:
        announced = stem.format(f"{name}:{kind}")
        fields = {"lbs-input": "no JSON" if kind == "poison" else announced}
        if kind == "worn out":
            fields["_retry_count"] = "3"
        ids[kind] = redis.xadd(service.lbs, fields).decode()
        reader = "owner" if kind == "living" else "ghost"
        redis.xreadgroup(service.group, reader, {service.lbs: ">"})
    redis.xdel(service.lbs, ids["gone"])
    redis.set(f"{name}:living{SEPARATOR}{ids['living']}", "owner")
    return ids


async def interrupted(start, url, service, step):
    """Lets a process recover until it is killed at this step. Returns whether it came to that."""
    name = f"svc{step}"
    service = service.other(name)
    ids = orphans(service, name)
    await asyncio.sleep(HEARD)  # or its read proves that the one that died lives
    gate = KillAt(step)
    async with Tap(service.redis, gate) as tap:
        victim = start(
            "victim", url=tap.url, service=name, heartbeat_interval=TTL, recovery=RECOVERY
        )
        gate.pid = victim.pid
        with contextlib.suppress(AssertionError):
            await eventually(lambda: gate.killed or not service.pending("ghost"))
        left = service.pending("ghost")
        assert gate.killed or not left, (step, gate.seen, ids, left, victim.lines)
        killed = gate.killed
        victim.kill()
    what = f"killed at {step}, after {gate.seen}"

    client = StreamClient(
        url, name, consumer_id="fresh", heartbeat_interval=TTL, recovery=RecoveryConfig(**RECOVERY)
    )
    added, lost = Counter(), Counter()

    def own(stream):
        """Streams are named after their service: the locks of all are in one database."""
        assert stream.startswith(f"{name}:")
        return stream.removeprefix(f"{name}:")

    async def hear(notifications):
        async for notification in notifications:
            heard = {NotificationType.STREAM_ADDED: added, NotificationType.STREAM_DISOWNED: lost}
            if notification.type in heard:
                heard[notification.type][own(notification.payload.data_stream_name)] += 1

    hearing = asyncio.ensure_future(hear(await client.init()))
    try:

        def all_is_well():
            return (
                set(GOOD) <= added.keys()
                and service.pending("ghost") == service.pending("victim") == []
                and service.pending("owner") == [ids["living"]]
            )

        with contextlib.suppress(AssertionError):
            await eventually(all_is_well)
        state = added, service.pending("ghost"), service.pending("victim"), service.locks()
        assert all_is_well(), (what, ids, *state)
        await asyncio.sleep(1.5 * TTL)
        assert added == Counter(GOOD), what
        assert lost == Counter(), what
        # What was acknowledged and not yet deleted stays behind: nobody is given that any more.
        routed = {ids["poison"], ids["worn out"]}
        announced = [
            json.loads(fields[b"lbs-input"])
            for entry_id, fields in service.redis.xrange(service.lbs)
            if entry_id.decode() not in routed
        ]
        names = Counter(own(value["DataStreamName"]) for value in announced)
        assert names == Counter([*GOOD, "living"]), what
        assert all(value["Info"] == {"n": 1} for value in announced), what
        letters = Counter(
            (fields[b"_source_id"].decode(), fields[b"_dlq_reason"].decode())
            for _, fields in service.redis.xrange(service.dlq)
        )
        assert letters.keys() == {
            (ids["poison"], "unparseable"),
            (ids["worn out"], "max_retries_exceeded"),
        }, what
        assert max(letters.values()) <= 2, (what, letters)
        ours = tuple(f"{name}:{kind}" for kind in GOOD)
        assert {who for key, who in service.locks().items() if key.startswith(ours)} <= {"fresh"}
    finally:
        await client.aclose()
        await hearing
    return killed, gate.seen


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_killed_between_any_two_commands(start, redis_url, service):
    killed, step, seen = True, 1, []
    while killed:
        assert step < 100
        service.redis.script_flush()
        steps = range(step, step + AT_ONCE)
        outcomes = await asyncio.gather(
            *[interrupted(start, redis_url, service, step) for step in steps],
            return_exceptions=True,  # all of them come to their ends
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        killed = all(killed for killed, _ in outcomes)
        seen += [commands for _, commands in outcomes]
        step += AT_ONCE
    # All kinds of steps were there to be killed at. Pages overlap, so their order may change.
    wanted = {"XPENDING", "XRANGE", "XADD", "XACK", "XDEL", "EVALSHA"}
    assert wanted <= {command for commands in seen for command in commands}
    assert len(seen) >= 20


@pytest.mark.parametrize("step", [2, 9, 15])
async def test_killed_at_some_step(start, redis_url, service, step):
    killed, _ = await interrupted(start, redis_url, service, step)
    assert killed
