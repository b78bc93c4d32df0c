"""What no Redis answers, but perhaps something before it: said in one error, not by a crash."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from wire import GREETING, command, listening

from relstream import ProtocolError
from relstream.lbs.expiry_events import ExpiryEvents
from relstream.lbs.locks import Locks
from relstream.net.connection import Connection
from relstream.net.endpoint import Endpoint

LOGGER = logging.getLogger("relstream")


@pytest.mark.parametrize(
    "answer",
    [
        b":5\r\n",
        b"+OK\r\n",
        b"#t\r\n",
        b"*1\r\n+a\r\n",
        b"*2\r\n+a\r\n:1\r\n",
        b"%1\r\n+a\r\n_\r\n",
    ],
)
async def test_config_get(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers = {b"HELLO": GREETING, b"CONFIG": answer}
        while True:
            writer.write(answers[(await command(reader))[0]])

    async with listening(serve) as port:
        events = ExpiryEvents(
            lambda on_push: Connection(Endpoint(host="127.0.0.1", port=port), on_push=on_push),
            force_config_override=True,
            on_expired=lambda info: None,
            on_forbidden=lambda reply: None,
            recorder=None,
            logger=LOGGER,
        )
        with pytest.raises(ProtocolError, match="CONFIG GET notify-keyspace-events"):
            await events.set_up()
        await events.close()


@pytest.mark.parametrize("answer", [None, 5, [3], [None], [[1]], {b"a": 1}])
async def test_scripts_about_locks(answer: Any) -> None:
    async def pipeline(packed: bytes, replies: int) -> list[Any]:
        return [answer] * replies

    link = SimpleNamespace(pipeline=pipeline, generation=1)
    topology: Any = SimpleNamespace(single=True, together=True, link=lambda key: link)
    locks = Locks(topology, "c1", 1000, LOGGER)
    for ask in locks.renew, locks.release:
        with pytest.raises(ProtocolError, match="a script about locks"):
            await ask([b"a", b"b"])
