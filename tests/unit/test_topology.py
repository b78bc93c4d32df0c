"""Which master serves a slot, as nodes and redirects say it."""

from __future__ import annotations

from typing import Any

import pytest

from relstream.errors import ConnectionFailed, ReplyError
from relstream.net import sentinel
from relstream.net.cluster import slots as slot_map
from relstream.net.cluster.router import ClusterTopology
from relstream.net.cluster.slots import SlotTable
from relstream.net.deployment import deployment_of
from relstream.net.endpoint import Endpoint
from relstream.net.handshake import connect

ASKED = "redis+cluster://asked.example:7000"


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> SlotTable:
    """The slots of a cluster whose nodes answer with `slots.rows`."""

    async def ask(endpoint: Endpoint, *args: Any) -> Any:
        return table.rows

    monkeypatch.setattr(slot_map, "query", ask)
    table: Any = deployment_of(ASKED).guide()
    assert isinstance(table, SlotTable)
    return table


def of_masters(*masters: list[Any]) -> list[list[Any]]:
    """What CLUSTER SLOTS says of these, a slot each."""
    return [[slot, slot, master] for slot, master in enumerate(masters)]


@pytest.mark.parametrize(
    ("said", "host"),
    [
        # https://redis.io/docs/latest/commands/cluster-slots/: the host is not always an address
        (b"10.0.0.1", "10.0.0.1"),
        (b"node-1.example", "node-1.example"),
        (b"2001:db8::1", "2001:db8::1"),
        (b"", "asked.example"),
        (None, "asked.example"),
    ],
)
async def test_where_a_master_is(slots: Any, said: bytes | None, host: str) -> None:
    slots.rows = of_masters([said, 7001, b"id", []])
    await slots.refresh()
    assert [(node.host, node.port) for node in slots.masters] == [(host, 7001)]
    assert slots.owners[0] is slots.masters[0]
    assert slots.owners[1] is None


@pytest.mark.parametrize(("first", "last"), [(-1, 0), (1, 0), (0, 16384), (2**62, 2**62)])
async def test_slots_that_there_are_not_are_not_believed(slots: Any, first: int, last: int) -> None:
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []])
    await slots.refresh()
    slots.rows = [*slots.rows, [first, last, [b"10.0.0.2", 7002, b"id", []]]]
    with pytest.raises(ConnectionFailed, match=f"tells of slots {first} to {last}, of 16384"):
        await slots.refresh()
    assert [node.port for node in slots.masters] == [7001]
    assert len(slots.owners) == 16384


@pytest.mark.parametrize(
    "rows",
    [b"OK", 1, [[0, 1]], [[0, 1, 2]], [[0, 1, []]], [[0, 1, [b"a", None]]], [[0, 1, [b"\xff", 1]]]],
)
async def test_what_is_no_answer_about_slots_is_called_that(slots: Any, rows: object) -> None:
    slots.rows = rows
    with pytest.raises(ConnectionFailed, match=r"asked.example.* answers CLUSTER SLOTS with"):
        await slots.refresh()


async def test_a_port_that_there_is_not_can_not_be_connected_to() -> None:
    with pytest.raises(ConnectionFailed, match="can't connect"):
        await connect(Endpoint(host="127.0.0.1", port=99999))


@pytest.mark.parametrize("address", [b"OK", [b"10.0.0.1"], [b"10.0.0.1", b"x"], [b"\xff", b"1"]])
async def test_what_names_no_master_is_called_that(
    monkeypatch: pytest.MonkeyPatch, address: object
) -> None:
    async def ask(endpoint: Endpoint, *args: Any) -> Any:
        return address

    monkeypatch.setattr(sentinel, "query", ask)
    guide: Any = deployment_of("redis+sentinel://asked.example/name").guide()
    with pytest.raises(ConnectionFailed, match=r"asked.example.* says of the master 'name'"):
        await guide.locate()


@pytest.mark.parametrize(
    ("message", "host", "port"),
    [
        ("MOVED 3999 10.0.0.2:6381", "10.0.0.2", 6381),
        ("ASK 3999 node-2.example:6381", "node-2.example", 6381),
        ("MOVED 3999 2001:db8::2:6381", "2001:db8::2", 6381),
        ("MOVED 3999 :6381", "asked.example", 6381),
        ("ASK 3999 :6381", "asked.example", 6381),
        ("ASK 3999 ?:7001", "10.0.0.1", 7001),
    ],
)
async def test_where_a_redirect_points(slots: Any, message: str, host: str, port: int) -> None:
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []])
    await slots.refresh()
    cluster = ClusterTopology(deployment_of(ASKED).endpoint, slots)
    target = cluster._target(ReplyError(message), deployment_of(ASKED).endpoint)
    assert target is not None
    assert (target.host, target.port) == (host, port)


async def test_a_redirect_to_a_node_whose_name_is_not_known(slots: Any) -> None:
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []])
    await slots.refresh()
    cluster = ClusterTopology(deployment_of(ASKED).endpoint, slots)
    assert cluster._target(ReplyError("ASK 3999 ?:6381"), slots.masters[0]) is None


@pytest.mark.parametrize(
    "metadata", [[b"ip", b"10.0.0.1"], {b"ip": b"10.0.0.1"}], ids=["RESP2", "RESP3"]
)
async def test_a_node_that_has_a_name_nobody_knows_yet(slots: Any, metadata: Any) -> None:
    slots.rows = of_masters([b"?", 7001, b"id", metadata])
    await slots.refresh()
    assert [(node.host, node.port) for node in slots.masters] == [("10.0.0.1", 7001)]


async def test_a_node_that_nobody_can_name(slots: Any) -> None:
    slots.rows = of_masters([b"?", 7001, b"id", []])
    with pytest.raises(ConnectionFailed, match="set cluster-announce-hostname"):
        await slots.refresh()


@pytest.mark.parametrize(
    "other",
    [
        [b"10.0.0.1", 7001, b"id", [b"hostname", b"node-1.example"]],
        [b"10.0.0.1", 7001, b"id", []],
        [b"?", 7001, b"id", [b"ip", b"10.0.0.1"]],
    ],
)
async def test_a_node_that_others_call_otherwise_is_the_same(slots: Any, other: Any) -> None:
    slots.rows = of_masters([b"node-1.example", 7001, b"id", [b"ip", b"10.0.0.1"]])
    await slots.refresh()
    before = slots.masters
    slots.noticed.clear()
    slots.rows = of_masters(other)
    await slots.refresh()
    assert slots.masters == before
    assert not slots.noticed.is_set(), "nobody has to be connected anew"
    assert slots.at("10.0.0.1", 7001) is before[0]


async def test_names_of_the_seeds_are_one_where_nodes_have_none(slots: Any) -> None:
    slots._seeds = (Endpoint(host="a.example", port=7000), Endpoint(host="b.example", port=7000))
    rows = [[0, 9, [None, 7001, b"id-1", []]], [10, 19, [None, 7002, b"id-2", []]]]
    slots.rows = rows
    await slots.refresh(Endpoint(host="a.example", port=7000))
    before = slots.masters
    await slots.refresh(Endpoint(host="b.example", port=7000))
    assert slots.masters == before
    assert [node.host for node in before] == ["a.example"] * 2


async def test_a_node_that_has_moved_is_somewhere_else(slots: Any) -> None:
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []])
    await slots.refresh()
    slots.rows = of_masters([b"10.0.0.2", 7001, b"id", []])
    await slots.refresh()
    assert [node.host for node in slots.masters] == ["10.0.0.2"]
    slots.rows = of_masters([b"10.0.0.2", 7002, b"id", []])
    await slots.refresh()
    assert [node.port for node in slots.masters] == [7002]


async def test_an_address_that_another_node_has_now(slots: Any) -> None:
    slots.rows = of_masters([b"n1.example", 7001, b"id-1", [b"ip", b"10.0.0.1"]])
    await slots.refresh()
    slots.rows = of_masters(
        [b"n1.example", 7001, b"id-1", [b"ip", b"10.0.0.2"]],
        [b"n2.example", 7001, b"id-2", [b"ip", b"10.0.0.1"]],
    )
    await slots.refresh()
    assert [node.host for node in slots.masters] == ["n1.example", "n2.example"]
    assert slots.at("10.0.0.1", 7001) is slots.masters[1]


async def test_who_imports_a_slot_is_a_master_for_a_while(
    slots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks may have moved there already, though the slot is not its own yet."""
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []])
    await slots.refresh()
    new = slots.at("10.0.0.9", 7009)
    slots.noticed.clear()
    slots.imports(new)
    assert slots.noticed.is_set()
    await slots.refresh()
    assert new in slots.masters
    monkeypatch.setattr(slot_map, "IMPORTING", 0.0)
    await slots.refresh()
    assert new not in slots.masters


async def test_who_has_imported_a_slot_is_one_master_not_two(slots: Any) -> None:
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []])
    await slots.refresh()
    new = slots.at("10.0.0.9", 7009)
    slots.imports(new)
    slots.rows = of_masters([b"10.0.0.1", 7001, b"id", []], [b"10.0.0.9", 7009, b"id", []])
    await slots.refresh()
    assert slots.masters.count(new) == 1
    slots.imports(new)
    assert slots.masters.count(new) == 1
