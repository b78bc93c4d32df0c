"""The rights that docs/reference/server.md has for a consumer, no more: it works in peace."""

from __future__ import annotations

import asyncio
import pathlib
import re
from collections import Counter

import pytest
from helpers import eventually, names, take

from relstream import RecoveryConfig
from relstream.lbs import permissions

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "reference" / "server.md"
IN_A_CLUSTER = ["+cluster|slots", "+asking"]
# What is asked for once a connection, or by each part of a client; it has six connections.
OFTEN = 8


def documented():
    """The rules of the user `calls`, for service `svc`."""
    (block,) = re.findall(r"```\n(ACL SETUSER.*?)```", DOCS.read_text(), re.DOTALL)
    return block.replace("calls", "svc").split()[3:]


@pytest.fixture
def servers(redis_sync, deployment, request):
    """All that a client may ask."""
    if deployment == "single":
        return [redis_sync]
    fixture = request.getfixturevalue("cluster" if deployment == "cluster" else "sentinels")
    return [node.client for node in fixture.nodes]


@pytest.fixture
def url(servers, redis_url, deployment):
    """Of a user who has them."""
    rules = ["reset", *documented(), *(IN_A_CLUSTER if deployment == "cluster" else [])]
    for server in servers:
        server.execute_command("ACL", "SETUSER", "calls", *rules)
        server.config_set("notify-keyspace-events", "KEx")
        server.execute_command("ACL", "LOG", "RESET")
    return redis_url.replace("//", "//calls:secret@", 1)


def denials(servers):
    """How often each command was denied, by the server that denied it most often."""
    worst = Counter()
    for server in servers:
        counts = Counter()
        for line in server.acl_log():
            counts[line["object"].lower()] += int(line["count"])
        worst |= counts
    return worst


async def test_what_is_denied_is_not_asked_again_and_again(
    consumer, service, servers, url, caplog, monkeypatch
):
    monkeypatch.setattr("relstream.lbs.consumers.REMOVE_EVERY", 0.2)
    caplog.set_level("INFO")
    scans = RecoveryConfig(reconciliation_interval=0.5, min_idle_time=1.0)
    clients = [
        consumer(f"c{i}", url=url, heartbeat_interval=1.0, recovery=scans, max_streams=3)
        for i in range(2)
    ]
    notes = [await client.init() for client in clients]
    for i in range(3):
        service.announce(f"own{i}")
    own = [n.payload for n in await take(notes[0], 1)]
    service.orphan(4)  # of a dead owner
    await eventually(lambda: len(service.locks()) == 6)
    await clients[0].fail(own[0], delay=0.2)
    await eventually(lambda: service.redis.zcard("{svc-input}-delayed") == 0)
    await asyncio.sleep(2)
    early = denials(servers)
    assert early["ping"] == 0
    assert early["xinfo"] + early["xinfo|consumers"] <= len(clients)
    assert max(early.values(), default=0) <= OFTEN * len(clients), early
    assert caplog.text.count("grant +xinfo|consumers") <= len(clients)
    # From now on nothing is denied any more, as nothing is asked.
    for server in servers:
        server.execute_command("ACL", "LOG", "RESET")
    await asyncio.sleep(6)
    assert denials(servers) == {}
    assert len(service.locks()) == 6


async def test_a_right_that_is_granted_later_is_made_use_of(
    consumer, service, servers, url, monkeypatch
):
    monkeypatch.setattr(permissions, "DENIED_FOR", 0.5)
    client = consumer(url=url, heartbeat_interval=1.0, recovery=RecoveryConfig(min_idle_time=3600))
    notes = await client.init()
    await eventually(lambda: denials(servers))
    for server in servers:
        server.execute_command("ACL", "SETUSER", "calls", "+xinfo|consumers")
    service.orphan(1)  # found by looking alone: no lock can expire
    assert names(await take(notes, 1)) == ["s0"]
