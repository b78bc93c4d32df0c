"""Calls that no caller should make, each in one function; `test_arguments.py` runs them elsewhere.

`python misuse.py 3` runs all but the first three, and writes a line of JSON before and after each:
of one that ends the process there is no outcome.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import orjson

from relstream import _core
from relstream._core import (
    ENTRIES,
    ITEM,
    OBJECT,
    PENDING,
    STREAMS,
    Audit,
    Batch,
    CompletionQueue,
    Deliveries,
    Entry,
    EntryIds,
    OwnedStreams,
    PendingPage,
    Plan,
    Reader,
    Template,
    announcements,
    by_owner,
    commands,
    discard,
    ending_before,
    enter,
    entry_ids,
    extend,
    first_error,
    forget,
    grant,
    holds,
    id_range,
    key_slot,
    lock_keys,
    pack,
    parse_id,
    scatter,
)
from relstream.errors import ProtocolError

FIELD, RETRY_FIELD, SEPARATOR = b"lbs-input", b"_retry_count", b"<SEP>"
STRANGERS: list[Any] = [None, 5, "text", b"bytes", object(), [], Entry]


class Told(NamedTuple):
    kind: Any
    payload: Any
    info: Any
    retries: Any


class Info(NamedTuple):
    name: Any
    id: Any


class Queue(Deliveries):
    async def _next(self) -> Any:
        raise StopAsyncIteration

    def _make_room(self) -> None: ...


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def array(*items: bytes) -> bytes:
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def read(data: bytes, decode: int) -> Any:
    reader, out = Reader(), []  # type: tuple[Reader, list[Any]]
    reader.feed(data)
    assert reader.fill(out, 1, decode) == 1
    return out[0]


def batch_of(count: int, *, announced: bytes = b'{"DataStreamName":"s%d","Info":{}}') -> Batch:
    found: Batch = read(
        array(
            *(
                array(bulk(b"%d-1" % n), array(bulk(FIELD), bulk(announced % n)))
                for n in range(count)
            )
        ),
        ENTRIES,
    )
    return found


def entries_of(count: int) -> list[Entry]:
    return announcements(batch_of(count), FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)[0]


def plan_of(count: int, **options: Any) -> Plan:
    batch = batch_of(count, **options)
    return Plan(EntryIds(batch.ids()), [batch], FIELD, SEPARATOR, RETRY_FIELD, orjson.loads)


def calls(plan: Plan, *, most: int = 3, size: int = 1000) -> list[bytes]:
    return plan.calls(b"sha", b"st", b"gr", counting=True, locks=True, most=most, size=size)


def page_of(count: int) -> PendingPage:
    found: PendingPage = read(
        array(*(array(bulk(b"%d-1" % n), bulk(b"me"), b":1\r\n", b":1\r\n") for n in range(count))),
        PENDING,
    )
    return found


@contextmanager
def meanwhile(run: Callable[[], object]) -> Iterator[None]:
    """Runs this in every collection of garbage, and collects garbage all the time."""
    busy = False

    def callback(phase: str, info: object) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                with suppress(Exception):
                    run()
            finally:
                busy = False

    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


class Finalized:
    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def __del__(self) -> None:
        self.run()


class Index:
    """A place in a list that does something when it is looked up."""

    def __init__(self, place: int, run: Callable[[], object]) -> None:
        self.place, self.run = place, run

    def __index__(self) -> int:
        self.run()
        return self.place


# What has to be refused, by a TypeError or a ValueError; and what may also go well.
REFUSED: dict[str, Callable[[], object]] = {}
SURVIVED: dict[str, Callable[[], object]] = {}


def refused(name: str, work: Callable[..., object], *args: Any, **options: Any) -> None:
    assert name not in REFUSED, name
    REFUSED[name] = lambda: work(*args, **options)


def survived(work: Callable[[], object]) -> Callable[[], object]:
    SURVIVED[work.__name__] = work
    return work


# --- another type where an object is expected -----------------------------------------------------


def endings_with(head: Any) -> CompletionQueue:
    endings = CompletionQueue(lambda: None)
    endings.heads.append(head)
    endings.futures.append(None)  # type: ignore[arg-type]
    return endings


def entry_with(other: Any) -> Entry:
    [entry] = entries_of(1)
    entry.delivered = True
    entry.again = [other]
    return entry


IN_A_LIST: dict[str, Callable[[Any], object]] = {
    "lock_keys": lambda it: lock_keys([it]),
    "entry_ids": lambda it: entry_ids([it]),
    "id_range": lambda it: id_range([it]),
    "id_range later": lambda it: id_range([*entries_of(1), it]),
    "Audit": lambda it: Audit([it]),
    "forget": lambda it: forget([it], {}),
    "grant": lambda it: grant([it], [b"OK"], {}),
    "extend": lambda it: extend([it], [1], 9.0),
    "ending_before": lambda it: ending_before([it], 9.0),
    "Deliveries._enqueue": lambda it: Queue(Told, 0, Info, None)._enqueue([it]),
    "CompletionQueue.next_batch": lambda it: endings_with(it).next_batch(1, 1),
    "CompletionQueue.entries": lambda it: endings_with(it).entries(),
    "OwnedStreams": lambda it: OwnedStreams(Told, [{"s": it}]),
    "grant owned": lambda it: grant(entries_of(1), [b"OK"], {"s0": it}),
    "holds again": lambda it: holds(entry_with(it), "other", 0.0),
    "ending_before again": lambda it: ending_before([entry_with(it)], -1.0),
    "Plan": lambda it: Plan(EntryIds([b"1-1"]), [it], FIELD, SEPARATOR, RETRY_FIELD, orjson.loads),
    "EntryIds": lambda it: EntryIds([it]),
}
for number, stranger in enumerate(STRANGERS):
    for name, work in IN_A_LIST.items():
        refused(f"a list: {name}: {number} {type(stranger).__name__}", work, stranger)
for number, stranger in enumerate([None, 5, "text", bytearray(b"x"), object()]):
    kind = f"{number} {type(stranger).__name__}"
    refused(
        f"a list: Template.pack: {kind}", lambda it: Template(ITEM).pack([b"fine", it]), stranger
    )
    refused(f"a list: by_owner: {kind}", lambda it: by_owner([it], [0], ["o"] * 16384), stranger)
for number, stranger in enumerate([None, 0.5, "text", b"b", object()]):
    kind = f"{number} {type(stranger).__name__}"
    refused(
        f"a place: by_owner: {kind}", lambda it: by_owner([b"k"], [it], ["o"] * 16384), stranger
    )
    refused(f"a place: scatter: {kind}", lambda it: scatter([None], [it], [b"OK"]), stranger)
for number, stranger in enumerate([None, 1.5, True, [], object(), "\ud800"]):
    refused(f"an argument: pack: {number} {type(stranger).__name__}", pack, b"SET", stranger)

an_entry = entries_of(1)[0]
a_batch = batch_of(1)
for number, stranger in enumerate([None, 5, "text", (), {}, object()]):
    kind = f"{number} {type(stranger).__name__}"
    a_dict = stranger if type(stranger) is not dict else []
    for name, work in {
        "lock_keys": lambda it: lock_keys(it),
        "entry_ids": lambda it: entry_ids(it),
        "id_range": lambda it: id_range(it),
        "Audit": lambda it: Audit(it),
        "Audit.page": lambda it: Audit([]).page(it, 0, True),
        "forget": lambda it: forget(it, {}),
        "grant": lambda it: grant(it, [], {}),
        "grant replies": lambda it: grant([], it, {}),
        "extend": lambda it: extend(it, [], 0.0),
        "extend outcomes": lambda it: extend([], it, 0.0),
        "ending_before": lambda it: ending_before(it, 0.0),
        "enter keys": lambda it: enter({}, it),
        "discard keys": lambda it: discard({}, it),
        "first_error": lambda it: first_error(it),
        "scatter": lambda it: scatter(it, [], []),
        "scatter places": lambda it: scatter([], it, []),
        "scatter part": lambda it: scatter([], [], it),
        "by_owner": lambda it: by_owner(it, [], ["o"] * 16384),
        "by_owner places": lambda it: by_owner([], it, ["o"] * 16384),
        "by_owner owners": lambda it: by_owner([], [], it),
        "OwnedStreams": lambda it: OwnedStreams(Told, it),
        "OwnedStreams kind": lambda it: OwnedStreams(it, []),
        "Deliveries kind": lambda it: Queue(it, 0, Info, None),
        "Deliveries info": lambda it: Queue(Told, 0, it, None),
        "Deliveries._enqueue": lambda it: Queue(Told, 0, Info, None)._enqueue(it),
        "CompletionQueue.ask": lambda it: CompletionQueue(lambda: None).ask(it),
        "CompletionQueue.open": lambda it: (
            lambda endings: (endings.open(it), endings.ask(an_entry))
        )(CompletionQueue(lambda: None)),
        "CompletionQueue wake": lambda it: (
            lambda endings: (endings.open(lambda: None), endings.ask(an_entry))
        )(CompletionQueue(it)),
        "Template.pack": lambda it: Template(ITEM).pack(it),
        "commands": lambda it: commands(it),
        "parse_id": lambda it: parse_id(it),
        "key_slot": lambda it: key_slot(it),
        "EntryIds": lambda it: EntryIds(it) if it is not None else EntryIds(5),
        "Batch.values": lambda it: a_batch.values(it),
        "Plan ids": lambda it: Plan(it, [], FIELD, SEPARATOR, RETRY_FIELD, orjson.loads),
        "Plan batches": lambda it: Plan(
            EntryIds([]), it, FIELD, SEPARATOR, RETRY_FIELD, orjson.loads
        ),
        "Plan field": lambda it: Plan(EntryIds([]), [], it, SEPARATOR, RETRY_FIELD, orjson.loads),
        "Plan separator": lambda it: Plan(EntryIds([]), [], FIELD, it, RETRY_FIELD, orjson.loads),
        "Plan retry": lambda it: Plan(EntryIds([]), [], FIELD, SEPARATOR, it, orjson.loads),
        "Plan.judge": lambda it: plan_of(1).judge(it, 3),
        "Plan.judge retries": lambda it: plan_of(1).judge([None], it if it != 5 else ""),
        "Plan.calls": lambda it: plan_of(1).calls(
            it, b"", b"", counting=True, locks=True, most=1, size=1
        ),
        "announcements": lambda it: announcements(it, FIELD, RETRY_FIELD, SEPARATOR, orjson.loads),
        "announcements field": lambda it: announcements(
            a_batch, it, RETRY_FIELD, SEPARATOR, orjson.loads
        ),
        "announcements separator": lambda it: announcements(
            a_batch, FIELD, RETRY_FIELD, it, orjson.loads
        ),
        "announcements loads": lambda it: announcements(
            batch_of(1, announced=b"{%d"), FIELD, RETRY_FIELD, SEPARATOR, it
        ),
        "Reader.feed": lambda it: Reader().feed(it),
        "Reader.fill": lambda it: Reader().fill(it, 1),
        "Entry.again": lambda it: setattr(an_entry, "again", 5 if it is None else it),
    }.items():
        refused(f"{name}: {kind}", work, stranger)
    for name, work in {
        "forget owned": lambda it: forget([], it),
        "grant owned": lambda it: grant([], [], it),
        "enter": lambda it: enter(it, []),
        "discard": lambda it: discard(it, []),
        "OwnedStreams table": lambda it: OwnedStreams(Told, [it]),
    }.items():
        refused(f"{name}: {kind}", work, a_dict)

for wrong in (int, object, list, str, type):
    refused(f"OwnedStreams of {wrong.__name__}", OwnedStreams, wrong, [{"s": entries_of(1)[0]}])
    refused(f"Deliveries of {wrong.__name__}", Queue, wrong, 0, Info, None)
    refused(f"Deliveries with {wrong.__name__}", Queue, Told, 0, wrong, None)
refused("OwnedStreams of struct_time", OwnedStreams, time.struct_time, [{"s": entries_of(1)[0]}])
refused("OwnedStreams of tuple", OwnedStreams, tuple, [{"s": entries_of(1)[0]}])
refused("OwnedStreams of two values", OwnedStreams, Info, [{"s": entries_of(1)[0]}])
refused("OwnedStreams never made", lambda: list(OwnedStreams.__new__(OwnedStreams)))
refused("Template never made", lambda: Template.__new__(Template).pack([b"a"]))


# --- places, sizes and counts ---------------------------------------------------------------------

for place in (-1, 1, 10**6, 2**62, -(2**62)):
    refused(f"by_owner {place}", by_owner, [b"k"], [place], ["o"] * 16384)
    refused(f"scatter {place}", scatter, [None], [place], [b"OK"])
for count in (0, 16383, 16385):
    refused(f"by_owner of {count} owners", by_owner, [b"k"], [0], ["o"] * count)
refused("scatter of other lengths", scatter, [None], [0, 0], [b"OK"])
refused("grant of other lengths", grant, entries_of(2), [b"OK"], {})
refused("extend of other lengths", extend, entries_of(2), [1], 0.0)
refused("judge of other lengths", lambda: plan_of(2).judge([None], 3))
refused("take -1", lambda: endings_with(entries_of(1)[0]).next_batch(-1))
refused("take -1 bytes", lambda: endings_with(entries_of(1)[0]).next_batch(1, -1))
for most, size in ((0, 9), (-1, 9), (9, 0), (9, -1)):
    refused(
        f"calls {most} {size}",
        lambda most, size: calls(plan_of(1), most=most, size=size),
        most,
        size,
    )
for packed in (
    pack(),
    b"*-1\r\n",
    b"*1\r\n$-1\r\n",
    b"*1\r\n$-9\r\n",
    b"*1\r\n$9\r\nabc\r\n",
    b"*9\r\n$1\r\na\r\n",
    b"*99999999999999999999\r\n",
    b"$1\r\na\r\n",
    b"*",
    b"*1",
    b"*1\r\n$",
    b"\r\n",
):
    refused(f"commands {packed!r}", commands, packed)
    if packed != b"*":
        refused(f"commands later {packed!r}", commands, pack(b"GET", b"a") + packed)
for size in (-1, 1, 2**40):
    refused(f"advance {size}", lambda size: Reader().advance(size), size)
for decode in (-1, 4, 99):
    refused(f"fill {decode}", lambda decode: Reader().fill([], 1, decode), decode)


def template_overflows(places: int, items: int, size: int) -> None:
    template = Template(*[ITEM] * places)
    template.pack([b"x" * size] * items)


refused("Template sizes", template_overflows, 1 << 20, 1 << 20, 1 << 24)


# --- methods of another object --------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "feed": (b"x",), "fill": ([], 1), "advance": (0,), "get_buffer": (9,),
    "id": (0,), "fields": (0,), "pairs": (0,), "values": (b"a",),
    "idle": (0,), "pack": ([],), "open": (None,), "close": (None,), "ask": (entries_of(1)[0],),
    "take": (1,), "page": (page_of(1), 0, True), "_enqueue": ([],), "judge": ([], 1),
    "returning": (True,), "calls": (b"", b"", b""), "send": (None,), "throw": (ValueError,),
}  # fmt: skip


for a_class in (
    Reader,
    Batch,
    EntryIds,
    PendingPage,
    Template,
    CompletionQueue,
    Deliveries,
    OwnedStreams,
    Plan,
    Audit,
    Entry,
    _core.Next,
):  # type: ignore[attr-defined]
    for name, member in vars(a_class).items():
        if callable(member) and name not in (
            "__new__",
            "__init__",
            "__reduce__",
            "__getattribute__",
        ):
            wants = {"counting": True, "locks": True, "most": 1, "size": 1}
            for other in (5, None, Reader() if a_class is not Reader else Entry.__new__(Entry)):
                refused(
                    f"{a_class.__name__}.{name} of {type(other).__name__}",
                    member,
                    other,
                    *ARGUMENTS.get(name, ()),
                    **(wants if name == "calls" else {}),
                )


# --- code that runs in the middle -----------------------------------------------------------------


@survived
def an_outcome_that_clears_the_lists() -> None:
    entries = entries_of(50)

    class Outcome:
        def __eq__(self, other: object) -> bool:
            entries.clear()
            outcomes.clear()
            return True

        __hash__ = None  # type: ignore[assignment]

    outcomes: list[Any] = [Outcome() for _ in range(50)]
    extend(entries, outcomes, 9.0)


@survived
def a_place_that_clears_the_keys() -> None:
    keys = [b"k%d" % n for n in range(50)]
    by_owner(keys, [Index(n, keys.clear) for n in range(50)], ["o"] * 16384)  # type: ignore[misc]


@survived
def a_place_that_clears_the_owners() -> None:
    owners = [object() for _ in range(16384)]
    by_owner([b"k"] * 50, [Index(n, owners.clear) for n in range(50)], owners)  # type: ignore[misc]


@survived
def a_place_that_clears_all() -> None:
    replies: list[Any] = [None] * 50
    part: list[Any] = [b"OK"] * 50
    places: list[Any] = []

    def clear() -> None:
        replies.clear(), part.clear(), places.clear()

    places += [Index(n, clear) for n in range(50)]
    scatter(replies, places, part)


@survived
def a_reply_whose_end_clears_all() -> None:
    replies: list[Any] = []
    places = list(range(50))
    part: list[Any] = [b"OK"] * 50

    def clear() -> None:
        replies.clear(), part.clear(), places.clear()

    replies += [Finalized(clear) for _ in range(50)]
    scatter(replies, places, part)


@survived
def a_name_that_clears_the_lists() -> None:
    entries = entries_of(50)
    replies: list[Any] = [b"OK"] * 50

    class Name(str):
        def __eq__(self, other: object) -> bool:
            entries.clear(), replies.clear(), owned.clear()
            return True

        __hash__ = str.__hash__

    owned: dict[str, Any] = {Name(f"s{n}"): entries[n] for n in range(50)}
    grant(entries, replies, owned)


@survived
def a_table_whose_names_clear_it() -> None:
    entries = entries_of(50)

    class Name(str):
        def __eq__(self, other: object) -> bool:
            entries.clear(), owned.clear()
            return True

        __hash__ = str.__hash__

    owned: dict[str, Any] = {Name(f"s{n}"): entries[n] for n in range(50)}
    forget(entries, owned)


@survived
def garbage_that_clears_the_entries() -> None:
    for work in (
        lambda some: grant(some, [b"OK"] * 300, {}),
        lambda some: extend(some, [1] * 300, 1.0),
        lambda some: forget(some, {}),
        lambda some: ending_before(some, 9.0),
        lambda some: OwnedStreams(Told, [{str(n): one for n, one in enumerate(some)}]),
        lambda some: Queue(Told, 0, Info, None)._enqueue(some),
        lock_keys,
        entry_ids,
        id_range,
        Audit,
    ):
        entries = entries_of(300)
        with meanwhile(entries.clear), suppress(TypeError, ValueError):
            work(entries)  # type: ignore[no-untyped-call]


@survived
def garbage_that_uses_the_reader() -> None:
    reader = Reader()
    data = array(*[b"*1\r\n%1\r\n+a\r\n-ERR\r\n"] * 50)

    def use() -> None:
        for work in (
            lambda: reader.feed(b"x" * (1 << 20)),
            lambda: reader.fill([], 1),
            reader.get_buffer,
            lambda: reader.advance(0),
            reader.take_pushes,
        ):
            with suppress(ValueError):
                work()

    for decode in (OBJECT, STREAMS, ENTRIES, PENDING):
        reader = Reader()
        with meanwhile(use):
            for at in range(0, len(data), 7):
                try:
                    reader.feed(data[at : at + 7])
                    reader.fill([], 9, decode)
                    view = reader.get_buffer()
                    view[: len(data)] = data
                    reader.advance(0)
                    reader.feed(b"y" * (1 << 19))
                except Exception:  # noqa: BLE001 - it may have read anything by then
                    reader = Reader()


@survived
def a_view_whose_end_uses_the_reader() -> None:
    import weakref

    reader = Reader()
    used: list[object] = []

    def use(_: object) -> None:
        with suppress(ValueError):
            used.append(reader.feed(b"$100\r\n" + b"x" * 5000))

    whole = reader.get_buffer().obj
    watch = [weakref.ref(one, use) for one in gc.get_referrers(whole) if type(one) is memoryview]
    reader.feed(b"+OK\r\n" * (1 << 18))
    reader.feed(b"+OK\r\n" * (1 << 20))
    reader.fill([], 1 << 30)
    assert watch is not None


@survived
def garbage_that_uses_the_plan() -> None:
    plan = plan_of(200)

    def use() -> None:
        for work in (
            lambda: plan.judge([None, b"held"] * 100, 3),
            lambda: plan.judge([None] * 200, 3),
            lambda: calls(plan),
            lambda: plan.returning(True),
            plan.ids,
            plan.mget,
        ):
            with suppress(ValueError):
                work()

    with meanwhile(use):
        for _ in range(5):
            plan.judge([b"held", None] * 100, 3)
            calls(plan)
            calls(plan, most=1000, size=1 << 20)


@survived
def retries_that_use_the_plan() -> None:
    plan = plan_of(50)
    values: list[Any] = [None] * 50

    class Retries(int):
        def __lt__(self, other: object) -> bool:
            values.clear()
            return False

    plan.judge(values, Retries(0))


@survived
def garbage_that_clears_the_values() -> None:
    values: list[Any] = [None] * 200
    plan = plan_of(200)
    with meanwhile(values.clear):
        plan.judge(values, 0)


@survived
def decoding_that_clears_the_batches() -> None:
    batch = batch_of(50, announced=b'{"DataStreamName":"\\u0061%d"}')
    batches = [batch]
    ids = EntryIds(batch.ids())

    def loads(raw: bytes) -> object:
        batches.clear()
        return orjson.loads(raw)

    Plan(ids, batches, FIELD, SEPARATOR, RETRY_FIELD, loads).ids()


@survived
def decoding_that_changes_its_mind() -> None:
    answers: list[Any] = [{"DataStreamName": "s"}, None, [], 5]
    batch = batch_of(1, announced=b'{"DataStreamName":"\\u0061%d"}')
    [entry], _, _ = announcements(batch, FIELD, RETRY_FIELD, SEPARATOR, lambda raw: answers.pop(0))
    while answers:
        with suppress(TypeError):
            entry.info  # noqa: B018


@survived
def heads_that_somebody_took_away() -> None:
    entries = entries_of(50)

    class Future:
        def done(self) -> bool:
            endings.heads.clear()
            endings.futures.clear()
            return False

        def set_result(self, value: None) -> None: ...

    endings = CompletionQueue(lambda: None)
    endings.open(Future)  # type: ignore[arg-type]
    for entry in entries:
        endings.ask(entry)
    endings.next_batch(9)
    endings.succeed()
    assert len(endings) == 0
    endings.next_batch(2**62, 2**62)
    endings.close(ValueError)
    endings.entries()


@survived
def a_take_of_all_there_can_be() -> None:
    endings = CompletionQueue(lambda: None)
    endings.heads.extend(entries_of(9))
    endings.futures.extend([None] * 9)  # type: ignore[list-item]
    assert len(endings.next_batch(2)) == 2
    assert len(endings.next_batch(2**63 - 1, 2**63 - 1)) == 7


@survived
def deliveries_that_were_never_made() -> None:
    queue = Queue.__new__(Queue)
    assert queue._take() is None
    queue._items = deque(entries_of(1))
    queue._take()


@survived
def deliveries_of_what_is_no_delivery() -> None:
    class Odd(Deliveries):
        pass

    odd = Odd(Told, 0, Info, None)
    odd._room_wanted = True
    odd._enqueue(entries_of(1))
    for _ in range(3):
        with suppress(AttributeError):
            odd.__anext__().send(None)


@survived
def entries_that_announce_nothing() -> None:
    entry = Entry.__new__(Entry)
    for name in dir(entry):
        getattr(entry, name)
    repr(entry)
    lock_keys([entry]), entry_ids([entry]), id_range([entry])
    owned: dict[str, Entry] = {}
    grant([entry, entry], [b"OK", b"OK"], owned)
    list(OwnedStreams(Told, [owned]))
    forget([entry], owned)


@survived
def a_batch_of_nothing() -> None:
    batch = Batch.__new__(Batch)
    assert not list(batch)
    assert not batch.ids()
    assert not batch.values(b"x")
    announcements(batch, FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)
    assert not list(PendingPage.__new__(PendingPage).idle(0))


# --- a view that is written to after it was handed in ---------------------------------------------


def overwritten(first: bytes, then: bytes, decode: int) -> None:
    """What was read up to the last byte is replaced before that comes."""
    reader = Reader()
    view = reader.get_buffer()
    view[: len(first)] = first
    reader.advance(len(first) - 1)
    out: list[Any] = []
    reader.fill(out, 1, decode)
    view[: len(then)] = then
    kept = reader.get_buffer()
    kept[:1] = first[-1:]
    reader.advance(1)
    reader.fill(out, 1, decode)
    for one in out:
        for batch in one if type(one) is list else [one]:
            if type(batch) is Batch:
                list(batch), batch.ids(), batch.values(FIELD)
                announcements(batch, FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)
                [batch.pairs(at) for at in range(len(batch))]


def entry_reply(value: bytes, *, stream: bool) -> bytes:
    entries = array(array(bulk(b"1-1"), array(*map(bulk, (b"f", value, b"g", b"")))))
    return array(array(bulk(b"key"), entries)) if stream else entries


SECOND = [
    b"$536870912\r\n", b"$9223372036854775807\r\n", b"$-5\r\n", b"*9223372036854775807\r\n",
    b"*16000000\r\n", b"%9223372036854775807\r\n", b"~99999999\r\n", b">99\r\n", b"=99999\r\ntxt:",
    b"!99999\r\n", b"=-9\r\n", b"!-9\r\n", b"|9223372036854775807\r\n", b"|1\r\n", b":" + b"9" * 90,
    b"(" + b"9" * 90, b"+" + b"9" * 90, b"#", b"_", b"_\r", b"*1\r\n" * 30, b"%1\r\n" * 25,
    b"*2\r\n$3\r\n1-1\r\n*2\r\n$1\r\nf\r\n$9999999\r\n", b"*2\r\n$9999999\r\n", b"*2\r\n$-3\r\n",
    b"*2\r\n$3\r\n1-1\r\n*9223372036854775806\r\n", b"*4\r\n$3\r\n1-1\r\n$9999999\r\n",
    b"*4\r\n$3\r\n1-1\r\n$1\r\nc\r\n:9\r\n:" + b"9" * 40, b"\x00" * 90, b"$" + b"1" * 90,
]  # fmt: skip


@survived
def views_that_are_written_to_later() -> None:
    filler = b"x" * 300
    wholes = {
        OBJECT: [array(bulk(filler), b"+a\r\n", b":1\r\n"), bulk(filler), array(*[b":1\r\n"] * 80)],
        STREAMS: [entry_reply(filler, stream=True)],
        ENTRIES: [entry_reply(filler, stream=False)],
        PENDING: [array(array(bulk(b"1-1"), bulk(filler), b":1\r\n", b":1\r\n"))],
    }
    starts = [
        b"",
        b"*1\r\n",
        b"*2\r\n",
        b"*4\r\n",
        b"*1\r\n*2\r\n$3\r\nkey\r\n",
        b"*1\r\n*2\r\n$3\r\nkey\r\n*1\r\n",
        b"%1\r\n$3\r\nkey\r\n*1\r\n",
    ]
    for decode, some in wholes.items():
        for whole in some:
            for start in starts:
                for second in SECOND:
                    for tail in (b"", b"9" * 400, b"\r\n" * 200, b"*1\r\n" * 100):
                        with suppress(ProtocolError):
                            overwritten(whole, (start + second + tail)[: len(whole) - 1], decode)


@survived
def a_view_nested_deeply_later() -> None:
    """Deeper than the C stack is."""
    filler = array(bulk(b"x" * 2_000_000), b":1\r\n")
    for nested in (b"*1\r\n", b"%1\r\n", b"|1\r\n", b">1\r\n"):
        reader = Reader()
        reader.feed(filler[:-1])
        reader.fill([], 1)
        for view in [one for one in gc.get_objects() if type(one) is memoryview]:
            if not view.readonly and view.nbytes > 1_600_000:
                view[:1_600_000] = nested * (1_600_000 // len(nested))
        reader.feed(filler[-1:])
        with suppress(ProtocolError):
            reader.fill([], 1)


ALL = {**REFUSED, **SURVIVED}


def outcome(name: str) -> str:
    try:
        ALL[name]()
    except (TypeError, ValueError):
        return "refused"
    except Exception as error:  # noqa: BLE001 - whatever else
        return repr(error)
    return "done"


if __name__ == "__main__":
    for number, chosen in enumerate(ALL):
        if number >= int(sys.argv[1]):
            print(json.dumps([chosen]), flush=True)  # noqa: T201
            print(json.dumps([chosen, outcome(chosen)]), flush=True)  # noqa: T201
