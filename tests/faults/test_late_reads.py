"""A blocked read that is not answered in time, by a server that answers all else."""

from __future__ import annotations

import logging

import pytest
from faults.processes import Tap
from helpers import TERMINATED, eventually, names, take

from relstream import ClientTerminated, RetryConfig

NEVER = RetryConfig(max_retries=0)


class Withholding:
    """Keeps reads from the server: as if it restarted their timers."""

    def __init__(self, reads: int) -> None:
        self.left = reads

    async def __call__(self, role: str, args: list[bytes]) -> bool:
        if b"BLOCK" in args and self.left:
            self.left -= 1
            return False
        return True


@pytest.mark.only("single", "cluster", reason="clients behind Sentinel find ways past a Tap")
async def test_a_late_read_is_no_failure(consumer, service, caplog):
    caplog.set_level(logging.INFO, "relstream")
    gate = Withholding(3)
    async with Tap(service.redis, gate) as tap:
        client = consumer(url=f"{tap.url}?socket_timeout=0.5", retry=NEVER)
        notes = await client.init()
        await eventually(lambda: not gate.left)
        service.announce("s1")
        assert names(await take(notes, 1)) == ["s1"]
        assert client.health().reasons == ()
        await client.aclose()
    assert not [line for line in caplog.messages if "reading failed" in line]


@pytest.mark.only("single", reason="others look for another master first")
@pytest.mark.parametrize("answering", ["nothing", "the handshake"])
async def test_a_server_that_hangs_is_a_failure_of_reading(consumer, service, answering):
    gate = Withholding(1)

    async def silent(role: str, args: list[bytes]) -> bool:
        if not gate.left and (answering == "nothing" or args[0] != b"HELLO"):
            return False
        return await gate(role, args)

    async with Tap(service.redis, silent) as tap:
        url = f"{tap.url}?socket_timeout=0.5&socket_connect_timeout=0.5"
        client = consumer(url=url, retry=NEVER)
        notes = await client.init()
        await take(notes, 1, TERMINATED)
        with pytest.raises(ClientTerminated):
            await client.__aexit__(None, None, None)
