"""Nodes that come, that have left, and that disagree; and a cluster in which nothing happens."""

from __future__ import annotations

import asyncio
import logging

import pytest
import redis
from cluster.observing import ClusterService, subscriptions
from helpers import EXPIRED, SEPARATOR, Renewals, eventually, names, nothing_comes, take

from relstream import AlreadyClaimed, ClusterNotSettled, Producer
from relstream.testing import Cluster, Node

# --- nothing happens ------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_cluster_in_which_nothing_happens(cluster, service, consumer, caplog):
    # Long enough that a machine which stands still is no reason for a warning.
    leader = consumer("leader", heartbeat_interval=30.0)
    with caplog.at_level(logging.WARNING):
        notes = await leader.init()
        await eventually(
            lambda: (service.redis.get("svc-input-reconciler") or b"").startswith(b"leader#")
        )
        await asyncio.sleep(7)
        service.announce("s1")
        (added,) = await take(notes, 1)
        other = consumer("other", heartbeat_interval=30.0)
        await other.init()
        for client in (other, leader):
            with pytest.raises(AlreadyClaimed, match="its lock is held"):
                await client.claim(added.payload)
        await leader.done_stream("s1")
        with pytest.raises(AlreadyClaimed, match="finished"):
            await other.claim(added.payload)
        assert (service.redis.get("svc-input-reconciler") or b"").startswith(b"leader#")
    assert [record.getMessage() for record in caplog.records] == []


# --- a master without slots -----------------------------------------------------------------------


class Ahead(ClusterService):
    """Looks at keys on a node to which they have moved already, ahead of their slot."""

    def __init__(self, service: ClusterService, cluster: Cluster, node: Node) -> None:
        super().__init__(service.redis, cluster)
        self._node = node

    def ttls(self, keys: list[str]) -> list[int]:
        pipe = self._node.client.pipeline(transaction=False)
        for key in keys:
            pipe.execute_command("ASKING")
            pipe.pttl(key)
        return pipe.execute()[1::2]


@pytest.mark.slow
async def test_a_slot_on_its_way_to_a_master_without_slots(cluster, service, consumer):
    client = consumer(heartbeat_interval=2.0)
    notes = await client.init()
    wanted = [f"{{m}}{i}" for i in range(20)]
    locks = [f"{name}{SEPARATOR}{service.announce(name)}" for name in wanted]
    await take(notes, 20)
    new = await asyncio.to_thread(cluster.add_master)
    source = cluster.master_of("{m}")
    slot = cluster.slot_of("{m}")

    def move_keys() -> None:
        cluster.start_move(slot, source, new)
        keys = source.call("CLUSTER", "GETKEYSINSLOT", slot, 100)
        source.call("MIGRATE", *new.address, "", 0, 5000, "KEYS", *keys)

    await asyncio.to_thread(move_keys)
    # The locks are kept where the slot is not yet ...
    renewals = Renewals(Ahead(service, cluster, new), locks)
    await eventually(lambda: renewals.seen() >= 6)
    # ... where streams are finished, and expired locks heard of.
    await asyncio.gather(*map(client.done_stream, wanted[:10]))
    assert new.call("DBSIZE") == 10
    await eventually(lambda: list(subscriptions(new).values()) == [1])
    pipe = new.client.pipeline(transaction=False)
    for i in range(100):
        pipe.execute_command("ASKING")
        pipe.set(f"{{m}}x{i}{SEPARATOR}9-{i}", "ghost", px=100 + i)
    pipe.execute()
    heard = names(await take(notes, 100, EXPIRED))
    assert sorted(heard) == sorted(f"{{m}}x{i}" for i in range(100))
    await asyncio.to_thread(cluster.finish_move, slot, source, new)
    await asyncio.gather(*map(client.done_stream, wanted[10:]))
    assert (service.entries(), service.pending(), service.locks()) == ([], [], {})
    await nothing_comes(notes, 0.1)


# --- a node that has left -------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_seed_that_has_left_the_cluster(cluster, service, consumer):
    gone = await asyncio.to_thread(cluster.add_master)
    members = [node for node in cluster.nodes if node is not gone]
    its_id = cluster.id_of(gone)
    for node in members:
        node.call("CLUSTER", "FORGET", its_id)
    gone.call("CLUSTER", "RESET", "SOFT")
    # Whoever is asked first: of two, each is, now and then.
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in (gone, members[0]))
    notes = [
        await consumer(f"c{i}", redis=f"redis+cluster://{hosts}", max_streams=1).init()
        for i in range(4)
    ]
    for i in range(4):
        async with Producer(f"redis+cluster://{hosts}", "svc") as producer:
            await producer.announce(f"s{i}")
    owned = [names(await take(its_notes, 1)) for its_notes in notes]
    assert sorted(owned) == [[f"s{i}"] for i in range(4)]
    assert subscriptions(gone) == {}


# --- nodes that disagree, or can't tell ----------------------------------------------------------


async def test_a_reset_wants_nodes_that_agree_on_the_slots(cluster, service, consumer):
    client = consumer()
    await client.init()
    slot = 7
    owner = cluster.master_of(slot)
    another = next(node for node in cluster.masters() if node is not owner)
    # This node alone takes the slot for the other's: nobody sees a slot without a master.
    owner.call("CLUSTER", "SETSLOT", slot, "NODE", cluster.id_of(another))
    for node in cluster.nodes:
        assert "cluster_state:ok" in str(node.call("CLUSTER", "INFO"))
    with pytest.raises(ClusterNotSettled, match="do not agree on who serves the slots"):
        await client.reset_topology()
    for node in cluster.masters():
        assert list(subscriptions(node).values()) == [1]
    owner.call("CLUSTER", "SETSLOT", slot, "NODE", cluster.id_of(owner))
    await asyncio.to_thread(cluster.wait_ok)
    await client.reset_topology()


async def test_a_reset_wants_nodes_that_can_tell(cluster, service, consumer):
    client = consumer()
    await client.init()
    replica = cluster.replicas()[0]
    ((_, limit),) = replica.client.config_get("lua-time-limit").items()
    replica.client.config_set("lua-time-limit", 1)

    def keep_busy() -> None:
        with redis.Redis.from_url(replica.url) as other, pytest.raises(redis.ResponseError):
            other.eval("while true do end", 0)

    def is_busy() -> bool:
        try:
            return not replica.call("PING")
        except redis.ResponseError as error:
            return "BUSY" in str(error)

    busy = asyncio.ensure_future(asyncio.to_thread(keep_busy))
    try:
        await eventually(is_busy)
        with pytest.raises(ClusterNotSettled, match="BUSY"):
            await client.reset_topology()
    finally:
        replica.call("SCRIPT", "KILL")
        await busy
        replica.client.config_set("lua-time-limit", limit)
    for node in cluster.masters():
        assert list(subscriptions(node).values()) == [1]
    await client.reset_topology()
