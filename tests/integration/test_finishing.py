"""`done_stream` is one step on the server, and exact about what was ours, whatever gets lost."""

from __future__ import annotations

import asyncio

import pytest
from helpers import DISOWNED, SEPARATOR, names, take

from relstream import ConnectionLost, StreamNotOwned
from relstream.lbs.scripts import FINISH
from relstream.ownership.renewer import LeaseRenewer

pytestmark = pytest.mark.only("single", "sentinel", reason="a cluster's locks are elsewhere")


class Losing:
    """A link over which the answer to the first call of the script gets lost."""

    def __init__(self, link):
        self._link = link
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._link, name)

    async def pipeline(self, packed, replies, **options):
        if FINISH.digest not in packed and FINISH.source not in packed:
            return await self._link.pipeline(packed, replies, **options)
        (reply,) = got = await self._link.pipeline(packed, replies, **options)
        if isinstance(reply, bytes):
            self.calls += 1
            if self.calls == 1:
                raise ConnectionLost("just now")
        return got


async def _owning(consumer, service, monkeypatch, count):
    """A client that owns so many streams, and does not find out by itself which of them it lost."""

    async def nothing(*args: object) -> None:
        pass

    monkeypatch.setattr(LeaseRenewer, "_renew_all", nothing)
    ids = [service.announce(f"s{i}") for i in range(count)]
    client = consumer(heartbeat_interval=60, max_streams=count)
    notes = await client.init()
    await take(notes, count)
    return client, notes, ids


async def test_an_answer_that_gets_lost_is_given_again(consumer, service, monkeypatch):
    """Of what was finished nothing is left that tells it from what was lost, but the receipt."""
    client, notes, ids = await _owning(consumer, service, monkeypatch, 4)
    service.redis.delete(f"s1{SEPARATOR}{ids[1]}", f"s2{SEPARATOR}{ids[2]}")
    new_id = service.requeuer(ids[1])  # s2 has only lost its lock
    completer = client._engine.partitions[0].completer
    losing = completer._completion._link = Losing(completer._completion._link)
    ended = [client.done_stream(f"s{i}") for i in range(4)]
    outcomes = await asyncio.gather(*ended, return_exceptions=True)
    assert losing.calls == 2
    assert [type(outcome) for outcome in outcomes] == [
        *(type(None), StreamNotOwned, type(None), type(None))
    ]
    assert names(await take(notes, 1, DISOWNED)) == ["s1"]
    assert names(await take(notes, 1)) == ["s1"]  # now that there is room for it
    assert list(service.locks()) == [f"s1{SEPARATOR}{new_id}"]
    assert service.entries() == [new_id]


async def test_nothing_is_left_of_receipts(consumer, service, monkeypatch):
    client, _, _ = await _owning(consumer, service, monkeypatch, 300)
    await asyncio.gather(*[client.done_stream(f"s{i}") for i in range(300)])
    receipts = [*service.redis.scan_iter(match="{svc-input}-finished-*")]
    assert 1 <= len(receipts) <= 4
    assert all(0 < service.redis.pttl(key) <= 600_000 for key in receipts)
    await client.aclose()
    assert not [*service.redis.scan_iter(match="{svc-input}-finished-*")]


async def test_what_was_lost_can_be_told_out_of_memory(consumer, service, monkeypatch):
    """There is no room for a receipt then, and none is needed: nothing was changed."""
    client, notes, ids = await _owning(consumer, service, monkeypatch, 2)
    service.redis.delete(f"s0{SEPARATOR}{ids[0]}")
    new_id = service.requeuer(ids[0])
    service.redis.config_set("maxmemory", 1)
    with pytest.raises(StreamNotOwned):
        await client.done_stream("s0")
    await client.done_stream("s1")
    service.redis.config_set("maxmemory", 0)
    assert service.entries() == [new_id]
    assert names(await take(notes, 1, DISOWNED)) == ["s0"]


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "not-locked-yet"])
@pytest.mark.parametrize("give_up", ["done_stream", "release"])
async def test_what_a_stranger_gave_to_another_under_its_old_id_is_the_others(
    consumer, service, monkeypatch, give_up, locked
):
    """XCLAIM, once our lock is gone: the entry is pending, but not for us."""
    client, notes, ids = await _owning(consumer, service, monkeypatch, 2)
    lock = f"s0{SEPARATOR}{ids[0]}"
    service.redis.delete(lock)
    service.redis.xclaim(service.lbs, service.group, "c2", 0, [ids[0]])
    theirs = {lock: "c2"} if locked else {}
    for key, owner in theirs.items():
        service.redis.set(key, owner, px=60_000)
    fields = service.redis.xrange(service.lbs, ids[0], ids[0])
    with pytest.raises(StreamNotOwned, match="lost"):
        await getattr(client, give_up)("s0")
    assert names(await take(notes, 1, DISOWNED)) == ["s0"]
    assert service.pending("c2") == [ids[0]]
    assert service.redis.xrange(service.lbs, ids[0], ids[0]) == fields
    # What has only lost its lock is ours still.
    service.redis.delete(f"s1{SEPARATOR}{ids[1]}")
    await client.done_stream("s1")
    assert service.entries() == service.pending() == [ids[0]]
    assert service.locks() == theirs


async def test_what_another_holds_the_lock_of_is_not_finished(consumer, service, monkeypatch):
    """Whoever it is pending for: the other relies on the lock."""
    client, notes, ids = await _owning(consumer, service, monkeypatch, 1)
    lock = f"s0{SEPARATOR}{ids[0]}"
    service.redis.set(lock, "c2", px=60_000)
    with pytest.raises(StreamNotOwned, match="lost"):
        await client.done_stream("s0")
    assert names(await take(notes, 1, DISOWNED)) == ["s0"]
    assert service.entries() == service.pending() == ids
    assert service.locks() == {lock: "c2"}


@pytest.mark.only("single", reason="needs a URL for another user")
@pytest.mark.parametrize("denied", [["-evalsha"], ["resetkeys", "~svc-input", f"~*{SEPARATOR}*"]])
async def test_where_one_step_is_forbidden_three_do(
    consumer, service, redis_url, monkeypatch, caplog, denied
):
    async def nothing(*args: object) -> None:
        pass

    monkeypatch.setattr(LeaseRenewer, "_renew_all", nothing)
    service.redis.execute_command(
        *("ACL", "SETUSER", "joe", "reset", "on", ">pw", "~*", "&*", "+@all")
    )
    client = consumer(url=redis_url.replace("//", "//joe:pw@"), heartbeat_interval=60)
    notes = await client.init()
    ids = [service.announce(f"s{i}") for i in range(4)]
    await take(notes, 4)
    service.redis.execute_command("ACL", "SETUSER", "joe", *denied)
    await client.done_stream("s0")
    await client.done_stream("s1")
    service.redis.delete(f"s2{SEPARATOR}{ids[2]}")
    service.requeuer(ids[2])
    with pytest.raises(StreamNotOwned):
        await client.done_stream("s2")
    said = [text for text in caplog.messages if " steps" in text or "a script is forbidden" in text]
    assert len(said) == 1
    assert ("~{svc-input}-finished-*" in said[0]) == (denied[0] == "resetkeys")
    await client.done_stream("s3")
    assert [*service.redis.scan_iter(match="{svc-input}-finished-*")] == []


@pytest.mark.only("single", reason="needs a URL for another user")
async def test_a_lock_taken_anew_too_late_finishes_nothing_in_steps(
    consumer, service, redis_url, monkeypatch
):
    """Another saw that it was free, and put the entry back when it was taken already."""

    async def nothing(*args: object) -> None:
        pass

    monkeypatch.setattr(LeaseRenewer, "_renew_all", nothing)
    service.redis.acl_setuser(
        "joe", enabled=True, nopass=True, keys=["*"], channels=["*"],
        commands=["+@all", "-evalsha"],
    )  # fmt: skip
    client = consumer(url=redis_url.replace("//", "//joe:x@"), heartbeat_interval=60, max_streams=1)
    notes = await client.init()
    entry_id = service.announce("s0")
    await take(notes, 1)
    assert service.locks() == {f"s0{SEPARATOR}{entry_id}": "c1"}
    new_id = service.requeuer(entry_id)
    service.redis.xreadgroup(service.group, "c2", {service.lbs: ">"})
    with pytest.raises(StreamNotOwned, match="lost"):
        await client.done_stream("s0")
    assert names(await take(notes, 1, DISOWNED)) == ["s0"]
    assert service.entries() == service.pending("c2") == [new_id]
