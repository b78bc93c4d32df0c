"""Fuzzes the core: `python tests/core/fuzz.py --seconds 60`, or `--seed 7 --first 1234 --runs 1`.

Each run draws a target and its input from the seed and the number of the run alone. The runs happen
in a process of their own, so that one that crashes is named, too. Oracles are `hiredis.Reader` and
`orjson`, plain Python, and the same bytes cut into other pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import binascii
import math
import mmap
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hiredis
import orjson
from misuse import (
    FIELD,
    RETRY_FIELD,
    SEPARATOR,
    Info,
    Queue,
    Told,
    array,
    batch_of,
    bulk,
    entries_of,
    page_of,
    plan_of,
)

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
    Entry,
    EntryIds,
    OwnedStreams,
    PendingPage,
    Plan,
    Push,
    Reader,
    Template,
    announcements,
    backoff,
    by_owner,
    commands,
    discard,
    enter,
    first_error,
    forget,
    grant,
    jittered,
    key_slot,
    pack,
    parse_id,
    scatter,
)
from relstream.errors import ProtocolError, ReplyError

Random = random.Random

# --- bytes ----------------------------------------------------------------------------------------


def an_entry(id_: bytes, *fields: bytes) -> bytes:
    return array(bulk(id_), array(*map(bulk, fields)))


def a_pending(id_: bytes, name: bytes, idle: int) -> bytes:
    return array(bulk(id_), bulk(name), b":%d\r\n" % idle, b":1\r\n")


_announced = [
    an_entry(b"1-0", FIELD, b'{"DataStreamName":"a","Info":{"k":[1,-2.5,true,null,"x"]}}'),
    an_entry(b"1-1", FIELD, b'{"DataStreamName":"b","Info":null}', RETRY_FIELD, b"3"),
    an_entry(b"2-0", FIELD, b'{"DataStreamName":"\\u0061","more":1}', b"x", b""),
    an_entry(b"18446744073709551615-18446744073709551615", b"other", b"\r\n"),
    array(bulk(b"3-0"), b"*-1\r\n"),
]
_rows = [a_pending(b"%d-1" % n, b"consumer-%d" % (n // 2), n) for n in range(5)]
CORPUS: dict[int, list[bytes]] = {
    OBJECT: [
        b"+OK\r\n:1\r\n:-12\r\n$5\r\nhello\r\n$-1\r\n*-1\r\n_\r\n#t\r\n#f\r\n,1.5\r\n,inf\r\n",
        b"*3\r\n*2\r\n+a\r\n:9223372036854775807\r\n~1\r\n$0\r\n\r\n%1\r\n+k\r\n*0\r\n",
        b">3\r\n$7\r\nmessage\r\n+c\r\n$2\r\nhi\r\n-ERR no\r\n!5\r\nERR x\r\n=7\r\ntxt:abc\r\n",
        b"|1\r\n+ttl\r\n:9\r\n*1\r\n|1\r\n*1\r\n+a\r\n+b\r\n(12345678901234567890123\r\n",
        b"%2\r\n*1\r\n%0\r\n+v\r\n-ERR\r\n:1\r\n" + b"*1\r\n" * 31 + b":1\r\n",
        b"*2\r\n+OK\rX$262000\r\n+second\r\n",
        b"+OK\r\n:1\r\n-ERR no\r\n$5\r\nhello\r\n$-1\r\n*-1\r\n:-12\r\n+\r\n",
        b"*4\r\n*2\r\n+a\r\n:9223372036854775807\r\n$1\r\nx\r\n*-1\r\n:-5\r\n+OK\r\n_\r\n#t\r\n",
        b"*3\r\n$2\r\n\r\n\r\n~2\r\n:7\r\n#f\r\n*1\r\n*1\r\n+deep\r\n$12\r\nanother text\r\n",
    ],
    STREAMS: [
        array(array(bulk(b"key"), array(*_announced))),
        b"%2\r\n" + bulk(b"one") + array(*_announced[:2]) + bulk(b"two") + b"*0\r\n",
        b"*-1\r\n_\r\n-NOGROUP no\r\n",
    ],
    ENTRIES: [array(*_announced), b"*0\r\n*-1\r\n-ERR no\r\n", array(*_announced[:1])],
    PENDING: [array(*_rows), b"*0\r\n_\r\n", array(_rows[0])],
}
PIECES = [
    b"\r\n", b"\r", b"\n", b"\0", b"-1", b"0", b"1", b"2", b"9223372036854775807", b"536870912",
    b"16777217", b"99999999999999999999", b"18446744073709551616", b"*1\r\n",
    b"$1\r\nx\r\n", b"+OK\r",
    b"*0\r\n", b"_\r\n", b"|1\r\n", b"%1\r\n", b":1\r\n", b">1\r\n", b"=4\r\ntxt:\r\n",
    b"!3\r\nERR\r\n",
    b"#t\r\n", b",nan\r\n", b"(1\r\n", b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\xff",
    b'"DataStreamName":', b'"Info":', b"null", b"true", b"1e9", b"-0", b"0.", b"01", b"\\ud800",
    b" ",
]  # fmt: skip


def mutated(rng: Random, data: bytes) -> bytes:
    """Like this, with some bytes changed, put in, taken out, doubled or cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice((0, 1, 1, 2, 4, 30)))
        kind = rng.randrange(5)
        if kind == 0:
            out[at:to] = rng.choice(PIECES)
        elif kind == 1:
            out[at:at] = rng.choice(PIECES)
        elif kind == 2:
            out[at:to] = bytes(rng.randrange(256) for _ in range(to - at))
        elif kind == 3:
            out[at:at] = out[at:to] * rng.choice((1, 2, 9))
        else:
            del out[at : to if rng.random() < 0.9 else len(out)]
    return bytes(out)


def pieces(rng: Random, data: bytes) -> list[bytes]:
    """Cut at random, or into single bytes."""
    if rng.random() < 0.2:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# --- the reader -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A form that can be compared."""
    if isinstance(value, (ReplyError, hiredis.ReplyError)):
        return "error", str(value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else ("float", value)
    if isinstance(value, Batch):
        assert [value.id(at) for at in range(len(value))] == value.ids()
        assert [value.fields(at) for at in range(len(value))] == [one for _, one in value]
        assert value.values(FIELD) == [(one or {}).get(FIELD) for _, one in value]
        return "batch", value.key, list(value), [value.pairs(at) for at in range(len(value))]
    if isinstance(value, PendingPage):
        assert list(value.idle(3)) == [row[0] for row in value if row[2] >= 3]
        return "page", list(value)
    if isinstance(value, (Push, list, tuple)):
        return ["push" if isinstance(value, Push) else "list", *map(plain, value)]
    if isinstance(value, dict):
        return "map", [(plain(k), plain(v)) for k, v in value.items()]
    return type(value).__name__, value


def read(parts: list[bytes], decode: int, *, views: bool) -> tuple[list[Any], list[Any], bool]:
    """The replies, the push frames, and whether the reader ended with an error."""
    reader = Reader()
    out: list[Any] = []
    try:
        for part in parts:
            if views:
                view = reader.get_buffer()
                view[: len(part)] = part
                reader.advance(len(part))
            else:
                reader.feed(part)
            reader.fill(out, 1 << 30, decode)
    except ProtocolError:
        return plain(out), plain(reader.take_pushes()), True
    return plain(out), plain(reader.take_pushes()), False


def fuzz_reader(rng: Random) -> None:
    decode = rng.choice((OBJECT, STREAMS, ENTRIES, PENDING))
    data = mutated(rng, rng.choice(CORPUS[decode if rng.random() < 0.9 else OBJECT]))
    whole = read([data], decode, views=False)
    assert read(pieces(rng, data), decode, views=rng.random() < 0.5) == whole
    if decode == OBJECT:
        like_hiredis(data, whole[0][1:], failed=whole[2])


# What hiredis reads otherwise, or not at all: attributes, bulk errors, big numbers, verbatim text,
# maps, CR or LF in a line, levels beyond 9, push frames, numbers that are written unusually, and
# counts of items that it makes room for before it has read one.
OTHERWISE = re.compile(
    rb"[|!(=%>,]|[+-][^\r\n]*(?:\r(?!\n)|(?<!\r)\n)|[:*~$](?:[+]|-?0\d|-0)|(?:[*~]\d+\r\n){7}|[*~]\d{7}"
)


def like_hiredis(data: bytes, replies: list[Any], *, failed: bool) -> None:
    if OTHERWISE.search(data):
        return
    reader = hiredis.Reader(replyError=hiredis.ReplyError)
    reader.feed(data)
    got: list[Any] = []
    try:
        while (reply := reader.gets(False)) is not False or reader.has_data():
            if reply is False and len(got) >= len(replies):
                break
            got.append(reply)
    except hiredis.HiredisError:
        pass
    both = min(len(got), len(replies))
    assert [plain(reply) for reply in got[:both]] == replies[:both]
    # What hiredis takes for whole is whole, unless it is wrong: it does not look how strings end.
    assert failed or len(got) <= len(replies), (got, replies)


# --- JSON -----------------------------------------------------------------------------------------

MESSAGES = [
    b'{"DataStreamName":"a","Info":{"k":[1,-2.5,true,false,null,"x",{"y":{}}],"z":[]}}',
    b'{"DataStreamName":"session-1","Info":null}',
    b' { "DataStreamName" : "a" , "Info" : { "k" : 0.5 } } ',
    b'{"Info":{"k":"\xc3\xbc"},"datastreamname":"\\u00e4"}',
    b'{"DataStreamName":"a","Info":' + b'{"k":[' * 14 + b"1" + b"]}" * 14 + b"}",
]


def understood(raw: bytes) -> tuple[str, Any] | None:
    try:
        message = orjson.loads(raw)
    except ValueError:
        return None
    name = info = None
    for key, value in message.items() if isinstance(message, dict) else ():
        if key.casefold() == "datastreamname":
            name = name if value is None else value
        elif key.casefold() == "info":
            info = value
    if not isinstance(name, str) or not name or not isinstance(info, dict | None):
        return None
    return name, info


def fuzz_json(rng: Random) -> None:
    raw = mutated(rng, rng.choice(MESSAGES))
    [batch] = read_batch([an_entry(b"5-1", FIELD, raw)])
    entries, bad, gone = announcements(batch, FIELD, RETRY_FIELD, SEPARATOR, orjson.loads)
    expected = understood(raw)
    assert [(one.data_stream_name, one.info) for one in entries] == ([expected] if expected else [])
    assert (len(bad), gone) == (expected is None, [])
    for one in entries:
        assert one.announcement is not None
        assert understood(one.announcement) == expected
        assert one.lock_key == one.data_stream_name.encode() + SEPARATOR + b"5-1"
    plan = Plan(EntryIds([b"5-1"]), [batch], FIELD, SEPARATOR, RETRY_FIELD, orjson.loads)
    assert plan.lock_keys() == [one.lock_key for one in entries]
    assert plan.names() == [one.data_stream_name for one in entries]


def read_batch(entries: list[bytes]) -> list[Batch]:
    reader, out = Reader(), []  # type: tuple[Reader, list[Any]]
    reader.feed(array(*entries))
    assert reader.fill(out, 1, ENTRIES) == 1
    return out


# --- commands -------------------------------------------------------------------------------------


def some_bytes(rng: Random) -> bytes:
    return rng.choice((b"", b"a", b"\r\n", rng.randbytes(rng.randrange(40)), b"x" * 1000))


def fuzz_commands(rng: Random) -> None:
    several = [
        [
            rng.choice((some_bytes(rng), "t\u00e4xt", rng.randrange(-(10**20), 10**20)))
            for _ in range(rng.randrange(1, 5))
        ]
        for _ in range(rng.randrange(4))
    ]
    packed = [pack(*args) for args in several]
    assert commands(b"".join(packed)) == packed
    data = mutated(rng, b"".join(packed))
    with suppress(ValueError):
        assert b"".join(commands(data)) == data
    args = [ITEM if rng.random() < 0.4 else some_bytes(rng) for _ in range(rng.randrange(5))]
    items = [some_bytes(rng) for _ in range(rng.randrange(5))]
    assert Template(*args).pack(items) == b"".join(
        pack(*(item if arg is ITEM else arg for arg in args)) for item in items
    )


# --- what is planned and owned --------------------------------------------------------------------


def fuzz_plan(rng: Random) -> None:
    def some_fields() -> list[bytes]:
        kinds = (
            (FIELD, mutated(rng, rng.choice(MESSAGES))),
            (RETRY_FIELD, rng.choice((b"1", b"-", b"99"))),
            (some_bytes(rng), some_bytes(rng)),
        )
        return [text for _ in range(rng.randrange(4)) for text in rng.choice(kinds)]

    entries = [
        an_entry(b"%d-%d" % (n, rng.randrange(3)), *some_fields())
        if rng.random() < 0.9
        else array(bulk(b"%d-0" % n), b"*-1\r\n")
        for n in range(rng.randrange(8))
    ]
    [batch] = read_batch(entries)
    ids = [id_ for id_ in batch.ids() if rng.random() < 0.9] + [b"50-1"] * rng.randrange(2)
    plan = Plan(EntryIds(ids), [batch], FIELD, SEPARATOR, RETRY_FIELD, orjson.loads)
    assert len(plan) + len(plan.gone) + len(plan.unparseable) == len(ids)
    assert plan.mget() == pack(b"MGET", *plan.lock_keys())
    values = [rng.choice((None, b"held")) for _ in range(len(plan))]
    alive, letters = plan.judge(values, rng.randrange(4), rng.randrange(9))
    counting, locks, fenced = (rng.random() < 0.5 for _ in range(3))
    told = plan.returning(counting)
    assert alive + len(letters) + len(told) == len(plan)
    made = plan.calls(
        b"sha",
        b"st",
        b"gr",
        counting=counting,
        locks=locks,
        most=rng.randrange(1, 5),
        size=rng.randrange(1, 500),
        leader=b"ld" if fenced else None,
        fence=b"me" if fenced else b"",
    )
    found: list[tuple[bytes, list[bytes]]] = []
    keys: list[bytes] = []
    for call in made:
        args = arguments(call)
        named = int(args[2])
        assert args[:2] == [b"EVALSHA", b"sha"]
        assert args[3] == b"st"
        assert args[4 : 4 + fenced] == [b"ld"] * fenced
        keys += args[4 + fenced : 3 + named]
        assert args[3 + named] == b"gr"
        assert args[5 + named] == b"me" * fenced
        size, rest = int(args[4 + named]), args[6 + named :]
        while rest:
            found.append((rest[0], rest[1 : 1 + size]))
            rest = rest[1 + size :]
    assert found == [(id_, pairs) for id_, pairs, _ in told]
    assert keys == ([key for _, _, key in told] if locks else [])


def arguments(packed: bytes) -> list[bytes]:
    reader, out = Reader(), []  # type: tuple[Reader, list[Any]]
    reader.feed(packed)
    assert reader.fill(out, 1) == 1
    assert not reader.buffered
    found: list[bytes] = out[0]
    return found


def fuzz_owned(rng: Random) -> None:
    entries = entries_of(rng.randrange(12))
    rng.shuffle(entries)
    replies = [rng.choice((None, b"OK", ReplyError("OOM"))) for _ in entries]
    owned: dict[str, Entry] = {}
    new, locked, refusal = grant(entries, replies, owned, 1.0, 5.0)
    assert locked == [one for one, reply in zip(entries, replies, strict=True) if reply == b"OK"]
    assert new == locked == list(owned.values())
    assert (refusal is None) == (first_error(replies) is None)
    endings = CompletionQueue(lambda: None)
    endings.open(Future)  # type: ignore[arg-type]
    for one in locked:
        endings.ask(one)
    taken: list[Entry] = []
    while endings:
        batch = endings.next_batch(rng.randrange(1, 4), rng.choice((0, 10, 1000)))
        taken += batch.entries()
        batch.succeed()
    assert taken == locked
    forget(taken, owned)
    assert not owned
    rows = sorted(rng.sample(range(15), rng.randrange(12)))
    [page] = read_page([a_pending(b"%d-1" % n, b"me", n) for n in rows])
    missing, strays = Audit(entries).page(page, 5, True)
    here = {int(one.id.split(b"-")[0]): one for one in entries}
    assert missing == [here[n] for n in sorted(here) if n not in rows]
    assert strays == [b"%d-1" % n for n in rows if n not in here and n >= 5]


class Future:
    def done(self) -> bool:
        return False

    def set_result(self, value: None) -> None: ...


def read_page(rows: list[bytes]) -> list[PendingPage]:
    reader, out = Reader(), []  # type: tuple[Reader, list[Any]]
    reader.feed(array(*rows))
    assert reader.fill(out, 1, PENDING) == 1
    return out


def fuzz_arithmetic(rng: Random) -> None:
    key = mutated(rng, rng.choice((b"key", b"{tag}key", b"a{}b", b"{{x}}", b"}{")))
    hashed = re.search(rb"\{([^}]+)\}", key[key.find(b"{") :]) if b"{" in key else None
    tag = hashed[1] if hashed and hashed.start() == 0 else key
    assert key_slot(key) == binascii.crc_hqx(tag, 0) & 0x3FFF
    text = mutated(rng, rng.choice((b"1-1", b"18446744073709551615-0", b"00000000000000000001-1")))
    match = re.fullmatch(rb"(\d{1,20})-(\d{1,20})", text)
    id_ = (int(match[1]), int(match[2])) if match else None
    assert parse_id(text) == (id_ if id_ and max(id_) < 2**64 else None)
    keys = [b"%d" % rng.randrange(50) for _ in range(rng.randrange(20))]
    owners = ["a"] * 8192 + ["b"] * 8192
    places = [at for at in range(len(keys)) if rng.random() < 0.8]
    replies: list[Any] = [None] * len(keys)
    for owner, some in by_owner(keys, places, owners):
        assert all(owners[key_slot(keys[at])] == owner for at in some)
        scatter(replies, some, [(owner, at) for at in some])
    assert [reply[1] for reply in replies if reply] == places
    table: dict[bytes, None] = {}
    enter(table, keys)
    discard(table, keys[::2])
    assert list(table) == [key for key in dict.fromkeys(keys) if key not in keys[::2]]
    initial, chance = rng.random(), rng.random()
    assert initial / 2 <= backoff(rng.randrange(-5, 99), initial, 1.0, chance) <= 1.0
    assert 1.0 <= jittered(1.0, 0.5, chance) <= 1.5


# --- anything with anything -----------------------------------------------------------------------

FUNCTIONS: list[Any] = [
    member
    for name, member in sorted(vars(_core).items())
    if callable(member)
    and not name.startswith("_")
    and getattr(member, "__module__", "") == _core.__name__
]

KINDS = [one for one in FUNCTIONS if isinstance(one, type) and one is not Push]
# What every object has, and what would change a class for the runs that follow.
NOT_CALLED = {*dir(object), "__dict__"}


def anything(rng: Random, known: list[Any]) -> Any:
    kind = rng.randrange(12)
    if kind < 5:
        return rng.choice(known)
    if kind < 8:
        return [rng.choice(known) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(("a", "s0", b"k", 1)): rng.choice(known) for _ in range(3)}
    return rng.choice((
        None, 0, 1, -1, 2, 3, 2**31, 2**63 - 1, -(2**63), 2**64, 0.5, math.nan, math.inf, "s0", "",
        b"", b"1-1", FIELD, RETRY_FIELD, SEPARATOR, pack("GET", "a"), b"*0\r\n", (), [], {}, set(),
        bytearray(b"+OK\r\n"), memoryview(b":1\r\n"), Told, Info, tuple, int, orjson.loads, len,
        print_nothing, Future, ITEM, ReplyError("ERR"), True, ["o"] * 16384, rng,
    ))  # fmt: skip


def print_nothing(*args: object) -> None: ...


def fuzz_calls(rng: Random) -> None:
    plan = plan_of(3)
    endings = CompletionQueue(print_nothing)
    endings.open(Future)  # type: ignore[arg-type]
    queue = Queue(Told, 0, Info, None)
    known: list[Any] = [
        *entries_of(3), batch_of(3), page_of(3), plan, endings, queue, Reader(), EntryIds([b"1-1"]),
        Audit(entries_of(2)), Template("GET", ITEM), queue.__anext__(), None, 0, 1, b"x",
        OwnedStreams(Told, [{"s0": entries_of(1)[0]}]),  # type: ignore[list-item]
    ]  # fmt: skip
    core = [one for one in known if isinstance(one, tuple(KINDS))]
    for _ in range(12):
        # Most of what is raised comes from what was handed in. These two are the core's mistakes.
        try:
            made = a_call(rng, core, known)
        except (SystemError, AssertionError):
            raise
        except Exception:  # noqa: BLE001
            continue
        if asyncio.iscoroutine(made):
            made.close()
        if made is not None:
            known.append(made)
        if isinstance(made, tuple(KINDS)):
            core.append(made)


def a_call(rng: Random, core: list[Any], known: list[Any]) -> Any:
    target = rng.choice(FUNCTIONS)
    if rng.random() < 0.6:
        one = rng.choice(core)
        name = rng.choice([name for name in dir(one) if name not in NOT_CALLED])
        if rng.random() < 0.1:
            setattr(one, name, anything(rng, known))
        target = getattr(type(one) if rng.random() < 0.2 else one, name)
        if not callable(target):
            return target
    if getattr(target, "__name__", "") == "calls" and rng.random() < 0.8:
        options = {
            name: anything(rng, known) if rng.random() < 0.3 else 5
            for name in ("counting", "locks", "most", "size")
        }
        return target(b"sha", b"st", b"gr", **options)
    return target(*[anything(rng, known) for _ in range(rng.choice((0, 1, 1, 2, 3, 3, 5, 6)))])


# --- running --------------------------------------------------------------------------------------

TARGETS: list[tuple[Callable[[Random], None], int]] = [
    (fuzz_reader, 8),
    (fuzz_json, 4),
    (fuzz_commands, 2),
    (fuzz_plan, 2),
    (fuzz_owned, 1),
    (fuzz_arithmetic, 1),
    (fuzz_calls, 2),
]


def run(seed: int, first: int, runs: int, until: float, progress: mmap.mmap | None) -> int:
    """Runs until it is over, or one fails; the number of those that passed."""
    warnings.simplefilter("ignore")  # of coroutines that nobody awaits, say
    targets, weights = zip(*TARGETS, strict=True)
    passed: Counter[str] = Counter()
    for number in range(first, first + runs):
        if time.monotonic() > until:
            break
        if progress is not None:
            progress[:8] = number.to_bytes(8, "little")
        rng = Random(f"{seed} {number}")
        [target] = rng.choices(targets, weights)
        target(rng)
        passed[target.__name__] += 1
    sys.stdout.write(f"{passed.total()} runs passed: {dict(passed)}\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1 << 62)
    parser.add_argument("--progress", help="a file; used between the two processes")
    options = parser.parse_args()
    if options.progress:
        with open(options.progress, "r+b") as file:  # noqa: PTH123 - for its descriptor
            until = time.monotonic() + options.seconds
            shared = mmap.mmap(file.fileno(), 8)
            return run(options.seed, options.first, options.runs, until, shared)
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        again = [*sys.argv, "--seed", str(options.seed), "--progress", file.name]
        child = subprocess.run([sys.executable, "-X", "faulthandler", *again], check=False)
        file.seek(0)
        last = int.from_bytes(file.read(8), "little")
    if child.returncode:
        sys.stdout.write(
            f"ended with {child.returncode}; again: --seed {options.seed} --first {last} --runs 1\n"
        )
    return 1 if child.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
