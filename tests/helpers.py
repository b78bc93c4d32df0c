"""What many tests need: waiting for things, and looking at a service's state on the server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import redis

from relstream import Notification, Notifications, NotificationType, Recorder
from relstream._core import Batch

ADDED = NotificationType.STREAM_ADDED
DISOWNED = NotificationType.STREAM_DISOWNED
EXPIRED = NotificationType.STREAM_EXPIRED
TERMINATED = NotificationType.STREAM_TERMINATED
SEPARATOR = "<MUTEX_KEY_SEP>"

# Long enough that a machine that stands still for a second costs nobody a lock.
HEARTBEAT = 4.0
# For losses, which are looked for twice in a heartbeat, and the audit, which comes once in it. On a
# busy machine locks may expire: without `auto_claim` they are taken again.
QUICK = 0.5


# Of the methods of a recorder, as they are called.
SIGNATURES = {
    name: inspect.signature(getattr(Recorder(), name))
    for name in vars(Recorder)
    if not name.startswith("_")
}


class Heard(Recorder):
    """Keeps all that a client records, as `(what, *arguments)`, in the order of the signature.

    Arguments that the signature does not name, or not all of them, would be an error.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name in ("events", "calls"):
            return super().__getattribute__(name)
        signature = SIGNATURES[name]

        def heard(*args: Any, **arguments: Any) -> None:
            bound = signature.bind(*args, **arguments)
            self.events.append((name, *bound.arguments.values()))

        return heard

    def calls(self, what: str) -> list[tuple[Any, ...]]:
        """The arguments of each time that this was recorded."""
        return [event[1:] for event in self.events if event[0] == what]


async def eventually(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Waits until `condition` holds; fails after `timeout` seconds."""
    deadline = asyncio.get_running_loop().time() + timeout
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come to pass in time"
        await asyncio.sleep(0.02)


async def take(
    notifications: Notifications, count: int, kind: NotificationType = ADDED, timeout: float = 20.0
) -> list[Notification]:
    """The next `count` notifications, which must all be of this kind.

    Expired locks are passed over unless asked for: when the server tells of them is up to it.
    """
    taken: list[Notification] = []
    while len(taken) < count:
        notification = await asyncio.wait_for(notifications.__anext__(), timeout)
        if notification.type is kind:
            taken.append(notification)
        else:
            assert notification.type is EXPIRED, notification
    return taken


async def nothing_comes(notifications: Notifications, seconds: float) -> None:
    """Fails if there is a notification, but of an expired lock, within this time."""
    try:
        (got,) = await asyncio.wait_for(_not_expired(notifications), seconds)
    except TimeoutError:
        return
    raise AssertionError(f"unexpected: {got}")


async def _not_expired(notifications: Notifications) -> list[Notification]:
    while (notification := await notifications.__anext__()).type is EXPIRED:
        pass
    return [notification]


def names(notifications: list[Notification]) -> list[str]:
    return [notification.payload.data_stream_name for notification in notifications]


class Service:
    """The state of a service, as a stranger sees it who talks to the server directly."""

    def __init__(self, client: redis.Redis, name: str = "svc") -> None:
        self.redis = client
        self.name = name
        self.lbs = f"{name}-input"
        self.group = f"{name}-group"
        self.dlq = f"{name}-input-dlq"
        self._orphans = itertools.count()

    def other(self, name: str) -> Service:
        """The state of another service in the same place."""
        return Service(self.redis, name)

    def announce(self, name: str, info: str = "null", **fields: str) -> str:
        value = f'{{"DataStreamName": "{name}", "Info": {info}}}'
        return self.redis.xadd(self.lbs, {"lbs-input": value, **fields}).decode()

    def locks(self) -> dict[str, str]:
        """Who holds which lock."""
        keys = [key.decode() for key in self.redis.scan_iter(match=f"*{SEPARATOR}*", count=10_000)]
        return {
            key: value.decode()
            for key, value in zip(keys, self.redis.mget(keys) if keys else [], strict=True)
            if value is not None
        }

    def locks_together(self) -> dict[str, str]:
        """Such as are there at one and the same time."""
        return self.locks()  # their values are read in one step

    def ttls(self, keys: list[str]) -> list[int]:
        """The milliseconds that keys have left; negative: none."""
        script = (
            "local r = {} for i, k in ipairs(KEYS) do r[i] = redis.call('PTTL', k) end return r"
        )
        return self.redis.eval(script, len(keys), *keys)

    def pending(self, consumer: str | None = None) -> list[str]:
        """The ids of pending entries."""
        try:
            rows = self.redis.xpending_range(
                self.lbs, self.group, "-", "+", 100_000, consumername=consumer
            )
        except redis.ResponseError:
            return []
        return [row["message_id"].decode() for row in rows]

    def reads(self, consumer: str) -> bool:
        """Whether the consumer's read waits on the server for what is announced next."""
        return any(
            client["name"].endswith(f":{consumer}:read") and "b" in client["flags"]
            for client in self.redis.client_list()
        )

    def announce_last(self, *names: str) -> list[str]:
        """Announces these and runs out of memory in one step, or they could be locked."""
        with self.redis.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.xadd(self.lbs, {"lbs-input": f'{{"DataStreamName": "{name}", "Info": null}}'})
            pipe.config_set("maxmemory", 1)
            return [entry_id.decode() for entry_id in pipe.execute()[:-1]]

    def orphan(self, count: int, consumer: str = "ghost", **fields: str) -> list[str]:
        """Streams `s0`, `s1`, … that a consumer has read, and done no more with; their ids.

        In one step, or one that lives could read them. The next call's names go on from there.
        """
        with contextlib.suppress(redis.ResponseError):  # it exists
            self.redis.xgroup_create(self.lbs, self.group, "0", mkstream=True)
        with self.redis.pipeline(transaction=True) as pipe:
            for i in itertools.islice(self._orphans, count):
                value = f'{{"DataStreamName": "s{i}", "Info": null}}'
                pipe.xadd(self.lbs, {"lbs-input": value, **fields})
            pipe.xreadgroup(self.group, consumer, {self.lbs: ">"}, count=count)
            return [entry_id.decode() for entry_id in pipe.execute()[:-1]]

    def entries(self) -> list[str]:
        return [entry_id.decode() for entry_id, _ in self.redis.xrange(self.lbs)]

    def route_to_dlq(self, count: int) -> list[str]:
        """Dead letters of streams `s0`, `s1`, …, as recovery leaves them; their ids."""
        with self.redis.pipeline(transaction=False) as pipe:
            for i in range(count):
                pipe.xadd(
                    self.dlq,
                    {
                        "lbs-input": f'{{"DataStreamName":"s{i}","Info":{{"n":{i}}}}}',
                        "other": "kept",
                        "_retry_count": "4",
                        "_dlq_reason": "max_retries_exceeded",
                        "_source_id": f"1-{i}",
                    },
                )
            return [entry_id.decode() for entry_id in pipe.execute()]

    def requeuer(self, entry_id: str) -> str:
        """What another consumer does with an entry whose owner seems dead."""
        ((_, fields),) = self.redis.xrange(self.lbs, entry_id, entry_id)
        assert self.redis.xack(self.lbs, self.group, entry_id) == 1
        new_id = self.redis.xadd(self.lbs, fields)
        self.redis.xdel(self.lbs, entry_id)
        return new_id.decode()


def weigh(link: Any) -> list[int]:
    """Bytes of each exchange over this link from now on: what is sent, or the entries that come."""
    pipeline, sizes = link.pipeline, []

    async def weighed(packed: bytes, replies: int, **options: Any) -> list[Any]:
        received = await pipeline(packed, replies, **options)
        parts = [each for part in received for each in (part if isinstance(part, list) else [part])]
        came = sum(part.nbytes for part in parts if isinstance(part, Batch))
        sizes.append(max(len(packed), came))
        return received

    link.pipeline = weighed
    return sizes


class Renewals:
    """Watches keys that live for a while being given their full time again.

    However slow the machine is: who waits for renewals seen, and not for a time to pass, fails only
    if there are none, or if one comes so late that a key is gone.
    """

    def __init__(self, service: Service, keys: Iterable[str] | None = None) -> None:
        """Of all locks, unless told which keys."""
        self._keys = list(service.locks() if keys is None else keys)
        self._look: Callable[[], list[int]] = lambda: service.ttls(self._keys)
        self._left = self._look()
        self._seen = [0] * len(self._keys)

    def seen(self) -> int:
        """How often each of them was renewed, at least; fails when one is gone."""
        before, self._left = self._left, self._look()
        gone = [key for key, left in zip(self._keys, self._left, strict=True) if left < 0]
        assert not gone, f"not renewed in time: {gone}"
        for i, left in enumerate(self._left):
            self._seen[i] += left > before[i]
        return min(self._seen)


def forget_settings(admin: redis.Redis) -> None:
    """Takes back what earlier tests may have changed on a server, but for its data."""
    admin.script_flush()
    admin.config_set("notify-keyspace-events", "")
    admin.config_set("maxmemory", 0)
    admin.config_set("maxmemory-policy", "noeviction")
    for user in admin.acl_users():
        if user != "default":
            admin.acl_deluser(user)
    admin.execute_command(
        *("ACL", "SETUSER", "default", "reset", "on", "nopass", "~*", "&*", "+@all")
    )


def engine_connections(admin: redis.Redis) -> list[dict[str, str]]:
    return [c for c in admin.client_list() if c["name"].startswith("relstream")]


def connections_left(servers: Iterable[redis.Redis]) -> list[dict[str, str]]:
    """The engine's connections that don't end in time. They are ended, then."""
    # A server hears of a closed connection a little later than the test did.
    deadline = time.monotonic() + 10
    left: list[dict[str, str]] = []
    for admin in servers:
        while (there := engine_connections(admin)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for connection in there:
            admin.client_kill_filter(_id=connection["id"])  # the next test is not to blame
        left += there
    return left


class Monitor:
    """The commands that reach the server meanwhile, as text, but for those of its own."""

    def __init__(self, admin: redis.Redis) -> None:
        self._admin = admin
        self._monitor = admin.monitor()

    def __enter__(self) -> Monitor:
        self._monitor.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._monitor.__exit__(*exc_info)

    def seen(self) -> list[str]:
        """Those since the last call."""
        return [command for _, command in self.timed()]

    def timed(self) -> list[tuple[float, str]]:
        """The same, each with the server's time, in seconds."""
        self._admin.echo("the end")
        seen = []
        while (said := self._monitor.next_command())["command"] != "ECHO the end":
            seen.append((said["time"], said["command"]))
        return seen
