"""Any order of events keeps the invariants: a model of LBS, pending entries and locks.

Several consumers run on one server, without the clocks that start what they do in the background:
this starts it, and lets it go on from one command to the next, in the orders that Hypothesis comes
up with. Locks expire when it says so.

Where scripts are forbidden entries are put back in two steps, and three things may happen that a
script rules out, and no others: who crashes between the steps loses what it has acknowledged; an
owner that takes its expired lock anew after that lock was seen free has, until it looks again, an
entry that is not its own any more; and if it finishes that between the steps it comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
import redis
from helpers import SEPARATOR, Service
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from relstream import LBSInfo, NotificationType, RecoveryConfig, RelstreamError, StreamClient
from relstream.engine.engine import State
from relstream.lbs import requeue, two_phase
from relstream.lbs.locks import Locks, held_locks
from relstream.lbs.two_phase import TwoPhaseRequeue
from relstream.net.connection import Connection
from relstream.net.protocol import RedisProtocol
from relstream.net.topology import SingleTopology
from relstream.ownership import fetcher as intake_module
from relstream.recovery.result import ScanResult
from relstream.testing.server import Server

NAMES = ["c0", "c1", "c2"]
# Locks live for that long unless the test ends them.
TTL = 600.0

stepwise: contextvars.ContextVar[bool] = contextvars.ContextVar("stepwise", default=False)


def fence_of(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


class Steps:
    """Stops stepwise tasks before each command; knows when all have come to stand."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.waiting: list[asyncio.Future[None]] = []
        self.under_way = 0
        # Ids of entries between two steps, by who puts them back; of all that ever were; and of
        # those whose locks really were free when that was looked at.
        self.moving: list[tuple[TwoPhaseRequeue, set[str]]] = []
        self.moved: set[str] = set()
        self.seen_free: set[str] = set()

    @contextlib.contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        pipeline, send = Connection.pipeline, RedisProtocol.send
        look, move = held_locks, TwoPhaseRequeue._move

        async def stopping(link, *args, **options):
            if stepwise.get():
                future = asyncio.get_running_loop().create_future()
                self.waiting.append(future)
                await future
            return await pipeline(link, *args, **options)

        def counted(protocol, *args, **options):
            future = send(protocol, *args, **options)
            self.under_way += 1
            future.add_done_callback(self._answered)
            return future

        async def looked(topology, entries):
            taken = await look(topology, entries)
            held = self.service.locks()
            self.seen_free |= {
                entry_id.decode()
                for entry_id, _, lock in entries
                if lock is not None and lock.decode() not in held
            }
            return taken

        async def noted(requeuer, entries):
            ids = {entry_id.decode() for entry_id, _, _ in entries}
            self.moved |= ids
            self.moving.append((requeuer, ids))
            try:
                return await move(requeuer, entries)
            finally:
                self.moving.remove((requeuer, ids))

        with monkeypatch.context() as patch:
            patch.setattr(requeue, "held_locks", looked)
            patch.setattr(two_phase, "held_locks", looked)
            patch.setattr(TwoPhaseRequeue, "_move", noted)
            patch.setattr(Connection, "pipeline", stopping)
            patch.setattr(RedisProtocol, "send", counted)
            patch.setattr(intake_module, "BLOCK", 0.001)
            yield

    def _answered(self, future) -> None:
        self.under_way -= 1

    async def stand_still(self) -> None:
        calm = 0
        while calm < 25:
            await asyncio.sleep(0.0005 if self.under_way else 0)
            calm = 0 if self.under_way else calm + 1
        self.waiting = [future for future in self.waiting if not future.done()]

    async def step(self, which: int) -> None:
        if self.waiting:
            future = self.waiting.pop(which % len(self.waiting))
            if not future.done():
                future.set_result(None)
            await self.stand_still()


class Life:
    """One life of a consumer: a client without its clocks."""

    def __init__(self, url: str, name: str, max_retries: int) -> None:
        self.name = name
        self.client = StreamClient(
            url,
            "svc",
            consumer_id=name,
            heartbeat_interval=TTL,
            renew_in_thread=False,
            recovery=RecoveryConfig(batch_size=2, max_retries=max_retries, min_idle_time=0.0),
        )
        client = self.client
        self.notifications = client._engine.notifications
        self.leases = client._engine.partitions[0].leases
        part = client._engine.partitions[0]
        self.requeuer = [part._requeuer._two_phase, part.recoverer._requeuer._two_phase]
        loop = asyncio.get_running_loop()
        client._engine.state = State.OPEN
        client._engine.renewer._app_loop = loop
        self.keeping = SingleTopology(Connection(client._engine.partitions[0].link.endpoint))
        locks = Locks(self.keeping, name, round(TTL * 1000), client._engine._logger)
        self.work = {
            "renew": lambda: client._engine.renewer._renew_all(self.keeping, locks, 0.0),
            "audit": lambda: client._engine.partitions[0].audit(TTL),
            "recover": lambda: client._engine.partitions[0].recoverer.scanner.walk(0, ScanResult()),
        }
        self.tasks: dict[str, asyncio.Task] = {}
        self.told: list[tuple[NotificationType, str]] = []
        self.fences: dict[str, tuple[int, ...]] = {}
        self.start("completer", client._engine.partitions[0].completer.run())
        self.start("ear", self._hear())

    async def _hear(self) -> None:
        async for notification in self.notifications:
            name, entry_id = notification.payload
            self.told.append((notification.type, name))
            if notification.type is NotificationType.STREAM_ADDED:
                fence = fence_of(entry_id)
                # What is told twice with one id can't be told apart.
                assert fence > self.fences.get(name, (0,)), f"{name} is {fence} again, or older"
                self.fences[name] = fence

    def start(self, what: str, work) -> asyncio.Task | None:
        """Starts something, to go on step by step, unless it is still doing the same."""
        before = self.tasks.get(what)
        if before is not None and not before.done():
            work.close()
            return None
        context = contextvars.copy_context()
        context.run(stepwise.set, True)
        self.tasks[what] = context.run(asyncio.ensure_future, work)
        return self.tasks[what]

    async def read(self) -> None:
        await self.client._engine.partitions[0].fetcher._step()
        await self.client._engine.partitions[0].fetcher._finish_locking()

    def owned(self) -> dict[str, object]:
        return {head.data_stream_name: head for head in self.leases.all()}

    async def end(self) -> None:
        """It is gone, with all that was under way."""
        for task in self.tasks.values():
            task.cancel()
        outcomes = await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        for requeuer in self.requeuer:
            await requeuer.close()
        self.notifications.end("crashed")
        await self.client._engine._connections.close()
        await self.keeping.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, RelstreamError):
                raise outcome


class Model:
    """What must be true of a service, and what can happen to it."""

    def __init__(self, url: str, service: Service, steps: Steps) -> None:
        self.url = url
        self.service = service
        self.steps = steps
        self.lives = {}
        self.announced: list[str] = []
        self.entry_ids: list[LBSInfo] = []
        self.finished: set[str] = set()
        self.maybe_finished: set[str] = set()
        self.finishing: list[tuple[Life, str, asyncio.Task]] = []
        self.crashed = False
        self.lost: set[str] = set()  # by a crash between two steps

    # --- what happens -------------------------------------------------------------------------

    async def announce(self, which, worn):
        name = f"s{len(self.announced)}"
        self.announced.append(name)
        self.service.announce(name, **({"_retry_count": "3"} if worn else {}))

    async def read(self, which, _):
        await self.life(which).read()

    async def background(self, which, what):
        life = self.life(which)
        if what in life.work:
            life.start(what, life.work[what]())

    async def whole(self, which, what):
        """The same, and all else that is under way, to the end."""
        await self.background(which, what)
        await self.run_out()

    async def overtake(self, which, what):
        """The same, to its end, while all else stands."""
        life = self.life(which)
        task = life.start(what, life.work[what]())
        await self.steps.stand_still()
        while task is not None and not task.done():
            await self.steps.step(-1)

    async def end(self, which, how):
        """The application finishes a stream, or hands it over."""
        life = self.life(which)
        owned = [name for name, head in life.owned().items() if head.delivered]
        if not owned:
            return
        name = owned[which % len(owned)]
        if life.leases.get(name).finishing:
            return
        if how:
            task = life.start(f"done {name}", life.client.done_stream(name))
            self.finishing.append((life, name, task))
            head = life.leases.get(name)
            ids = {entry.id_in_lbs for entry in (head, *(head.again or ()))}
            task.add_done_callback(lambda _: self.ended(name, ids))
        else:
            life.start(f"release {name}", life.client.release(name))

    def ended(self, name, ids):
        if any(ids & moving for _, moving in self.steps.moving):
            self.maybe_finished.add(name)

    async def claim(self, which, number):
        if self.entry_ids:
            info = self.entry_ids[number % len(self.entry_ids)]
            self.life(which).start(f"claim {info}", self.life(which).client.claim(info))

    async def expire(self, which, _):
        """It stands still for too long."""
        name = NAMES[which % len(NAMES)]
        for key, owner in self.service.locks().items():
            if owner == name:
                self.service.redis.delete(key)

    async def crash(self, which, _):
        name = NAMES[which % len(NAMES)]
        if name in self.lives:
            life = self.lives.pop(name)
            moving = [ids for requeuer, ids in self.steps.moving if requeuer in life.requeuer]
            entries, _, live = self.in_lbs()
            self.lost |= {entries[i] for i in set().union(*moving) & entries.keys()} - {
                entries[i] for i in live
            }
            await life.end()
            self.crashed = True
            for other, stream, task in self.finishing:
                if other is life and (task.cancelled() or task.exception() is not None):
                    self.maybe_finished.add(stream)

    async def step(self, which, _):
        await self.steps.step(which)

    def life(self, which) -> Life:
        name = NAMES[which % len(NAMES)]
        if name not in self.lives:
            self.lives[name] = Life(self.url, name, max_retries=3)
        return self.lives[name]

    # --- what must be true --------------------------------------------------------------------

    def check(self) -> None:
        entries, pending, live = self.in_lbs()
        between = {entries[i] for _, ids in self.steps.moving for i in ids & entries.keys()}
        # Acknowledged, and deleted in another step.
        entries = {i: name for i, name in entries.items() if i in live or i not in self.steps.moved}
        self.entry_ids = [LBSInfo(name, entry_id) for entry_id, name in entries.items()]
        letters = [
            fields[b"lbs-input"].split(b'"')[3].decode()
            for _, fields in self.service.redis.xrange(self.service.dlq)
        ]
        locks = self.service.locks()
        owners: dict[str, list[str]] = {}
        for life in self.lives.values():
            for name, head in life.owned().items():
                held = [
                    entry.lock_key
                    for entry in (head, *(head.again or ()))
                    # Unless the lock was taken anew after it had been seen to be free.
                    if pending.get(entry.id_in_lbs) == life.name
                    or entry.id_in_lbs not in self.steps.seen_free
                ]
                if life.name in [locks.get(key.decode()) for key in held]:
                    owners.setdefault(name, []).append(life.name)
        under_way = set()
        still = []
        for life, name, task in self.finishing:
            if not task.done():
                under_way.add(name)
                still.append((life, name, task))
            elif not task.cancelled() and task.exception() is None:
                if name in self.maybe_finished:
                    continue
                self.finished.add(name)
                # I3: whoever finishes a stream is its owner: nobody else has it, or is given it.
                assert name not in entries.values(), f"{name} was finished, and is there"
                assert not owners.get(name), f"{name} was finished, and is owned by {owners[name]}"
        self.finishing = still
        # I1: nothing is lost.
        there = set(entries.values()) | set(letters)
        gone = set(self.announced) - there - self.finished - self.maybe_finished - under_way
        gone -= between | self.lost
        assert not gone, f"lost: {gone}"
        back = self.finished & set(entries.values())
        assert not back, f"finished, and still there: {back}"
        # I2: no second owner while the lock of the first one lives.
        twice = {name: who for name, who in owners.items() if len(who) > 1}
        assert not twice, f"owned twice: {twice}"
        for life in self.lives.values():
            # Never told twice in a row that it owns a stream, or has lost it.
            for name in {stream for _, stream in life.told}:
                told = [
                    kind
                    for kind, stream in life.told
                    if stream == name and kind is not NotificationType.STREAM_EXPIRED
                ]
                wanted = [NotificationType.STREAM_ADDED, NotificationType.STREAM_DISOWNED]
                for before, after in pairwise(told):
                    if after is wanted[1]:
                        assert before is wanted[0], f"{name} was lost twice"

    # --- in the end ---------------------------------------------------------------------------

    async def settle(self) -> None:
        """Everything goes on until there is nothing left to do; then all is owned, once."""
        await self.run_out()
        backed = {
            entry.lock_key.decode(): life.name
            for life in self.lives.values()
            for head in life.leases.all()
            for entry in (head, *(head.again or ()))
        }
        for key, owner in self.service.locks().items():
            if backed.get(key) != owner:  # that of a life that is over: nobody renews it
                self.service.redis.delete(key)
        for _ in range(6):
            for which in range(len(NAMES)):
                for what in ("renew", "audit", "recover"):
                    await self.background(which, what)
                    await self.run_out()
                await self.read(which, None)
                await self.steps.stand_still()
                self.check()
        letters = Counter(
            fields[b"lbs-input"].split(b'"')[3].decode()
            for _, fields in self.service.redis.xrange(self.service.dlq)
        )
        if not self.crashed:
            assert letters == Counter(set(letters) - self.finished), "dead letters too many"
        owned = [name for life in self.lives.values() for name in life.owned()]
        assert len(owned) == len(set(owned)), f"owned twice: {sorted(owned)}"
        left = set(self.announced) - set(owned) - set(letters) - self.finished - self.maybe_finished
        left -= self.lost
        assert not left, f"nobody has {left}"
        locks = self.service.locks()
        assert {key.rpartition(SEPARATOR)[0] for key in locks} == set(owned)
        entries, _, live = self.in_lbs()
        assert set(owned) - self.maybe_finished <= {entries[i] for i in live}

    def in_lbs(self) -> tuple[dict[str, str], dict[str, str], set[str]]:
        """Streams by the ids of their entries; owners of those pending; and all that can be read.

        What is neither pending nor yet to be read nobody will ever see again.
        """
        entries = {
            entry_id.decode(): fields[b"lbs-input"].split(b'"')[3].decode()
            for entry_id, fields in self.service.redis.xrange(self.service.lbs)
        }
        rows = self.service.redis.xpending_range(
            self.service.lbs, self.service.group, "-", "+", 10_000
        )
        pending = {row["message_id"].decode(): row["consumer"].decode() for row in rows}
        (group,) = self.service.redis.xinfo_groups(self.service.lbs)
        read = fence_of(group["last-delivered-id"].decode())
        live = {i for i in entries if i in pending or fence_of(i) > read}
        return entries, pending, live

    async def run_out(self) -> None:
        await self.steps.stand_still()
        while self.steps.waiting:
            await self.steps.step(0)


who = st.integers(0, 11)
works = st.sampled_from(["renew", "audit", "recover", "recover"])
events = st.one_of(
    st.tuples(st.just("announce"), who, st.sampled_from([False, False, True])),
    *[st.tuples(st.just("read"), who, st.none())] * 2,
    st.tuples(st.just("background"), who, works),
    *[st.tuples(st.just("whole"), who, works)] * 2,
    st.tuples(st.just("overtake"), who, works),
    st.tuples(st.just("end"), who, st.booleans()),
    st.tuples(st.just("claim"), who, st.integers(0, 20)),
    *[st.tuples(st.just("expire"), who, st.none())] * 2,
    st.tuples(st.just("crash"), who, st.none()),
    *[st.tuples(st.just("step"), who, st.none())] * 3,
)


# What has to be got right, and is not come upon in every run. c0 owns three streams from the start.
A_ZOMBIE_RENEWS = [
    ("expire", 0, None),
    ("whole", 1, "recover"),
    ("read", 1, None),
    ("whole", 0, "renew"),
]
A_ZOMBIE_FINISHES = [*A_ZOMBIE_RENEWS[:3], ("end", 0, True), ("end", 1, False)]
A_ZOMBIE_FINISHES_WHAT_IT_READ_AGAIN = [
    ("expire", 0, None),
    ("whole", 1, "recover"),
    ("read", 0, None),
    ("end", 0, True),
    ("whole", 1, "recover"),
]


def meanwhile(steps):
    """Expired locks are taken anew when recovery has come so far."""
    return [
        ("expire", 0, None),
        ("background", 1, "recover"),
        *[("step", 0, None)] * steps,
        ("overtake", 0, "renew"),
        ("whole", 1, "recover"),
        ("read", 1, None),
    ]


def side_by_side(steps):
    """Two recover the same, in turns for a while."""
    return [
        ("expire", 0, None),
        ("background", 1, "recover"),
        ("background", 2, "recover"),
        *[("step", i, None) for i in range(steps)],
        ("whole", 1, "recover"),
        ("read", 1, None),
        ("read", 2, None),
    ]


@pytest.fixture(scope="module")
def own_server(pytestconfig, server) -> Iterator[Server]:
    # So that a read that waits for a millisecond does not wait for much longer.
    with Server(binary=server.binary, config={"hz": 500}) as own:
        yield own


async def play(url, service, steps, happening):
    model = Model(url, service, steps)
    try:
        service.redis.xgroup_create(service.lbs, service.group, "0", mkstream=True)
        for _ in range(3):
            await model.announce(0, False)
        await model.read(0, None)
        for what, which, detail in happening:
            await getattr(model, what)(which, detail)
            await steps.stand_still()
            model.check()
        await model.settle()
    finally:
        for life in model.lives.values():
            await life.end()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("denied", [[], ["-eval", "-evalsha"]], ids=["script", "two-steps"])
def test_any_order_of_events_keeps_the_invariants(own_server, monkeypatch, denied):
    url = own_server.url.replace("://", "://app:x@")

    @settings(
        max_examples=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
    )
    @example(A_ZOMBIE_RENEWS)
    @example(A_ZOMBIE_FINISHES)
    @example(A_ZOMBIE_FINISHES_WHAT_IT_READ_AGAIN)
    @given(st.lists(events, min_size=15, max_size=60))
    def run(happening):
        with redis.Redis.from_url(own_server.url) as admin:
            admin.flushall()
            admin.acl_setuser(
                "app", enabled=True, nopass=True, keys=["*"], channels=["*"],
                commands=["+@all", *denied],
            )  # fmt: skip
            service = Service(admin)
            steps = Steps(service)
            with steps.installed(monkeypatch):
                asyncio.run(play(url, service, steps, happening))

    for steps in range(20 if denied else 12):
        run = example(meanwhile(steps))(run)
        if denied:
            run = example([*meanwhile(steps), ("end", 0, True)])(run)
            run = example(side_by_side(steps))(run)
    run()
