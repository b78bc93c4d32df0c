"""An application that forks while its clients are open: `forking.py URL LOOP HOW`.

Prints "ok" if the parent goes on over the same connections, with what it owned.
"""

import asyncio
import contextlib
import os
import sys
import traceback
import warnings
from typing import Any

import uvloop

from relstream import DeadLetters, Delayed, Producer, StreamClient, UsageError
from relstream._core import key_slot
from relstream.net.cluster.router import ClusterTopology

HEARTBEAT = 2.0


class Boom(Exception):
    pass


def refused(call: Any, *args: Any) -> None:
    """Calls it in a child, in an event loop of its own."""
    parent = os.getppid()

    async def main() -> None:
        try:
            await call(*args)
        except UsageError as error:
            assert f" {parent}," in str(error), error  # noqa: PT017
            assert f" {os.getpid()}," in str(error), error  # noqa: PT017
            return
        raise AssertionError(f"{call} went on")

    asyncio.run(main())


async def main(url: str, how: str) -> None:
    parent = os.getpid()
    try:
        await work(url, how)
    except BaseException as error:
        if os.getpid() != parent:  # asyncio's loops can't be left in a child
            if not isinstance(error, Boom):
                traceback.print_exc()
            os._exit(not isinstance(error, Boom))
        raise
    print("ok", flush=True)  # noqa: T201


async def work(url: str, how: str) -> None:
    producer, letters, delayed = Producer(url, "svc"), DeadLetters(url, "svc"), Delayed(url, "svc")
    client = StreamClient(url, "svc", consumer_id="c1", heartbeat_interval=HEARTBEAT)
    async with producer, letters, delayed, client as notifications:

        async def own(name: str) -> None:
            await producer.announce(name)
            while (await anext(notifications)).payload.data_stream_name != name:
                pass

        await own("before")
        await letters.purge()
        await delayed.drop()
        opened = generation(client)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there are threads
            child = os.fork()
        if not child:
            if how == "uses":
                refused(client.done_stream, "before")
                refused(client.release, "before")
                refused(client.pause)
                refused(client.aclose)
                refused(client.init)
                refused(producer.announce, "from the child")
                refused(letters.purge)
                refused(delayed.drop)
                refused(producer.aclose)
                assert [stream.data_stream_name for stream in client.owned()] == ["before"]
                assert client.health()
            if how == "closes":  # whatever calls it
                for topology in (
                    client._engine._connections.commands,
                    *client._engine._connections.reads,
                    producer._topology,
                ):
                    with contextlib.suppress(RuntimeError):  # in another event loop
                        asyncio.run(topology.close())
            raise Boom
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert status == 0, f"the child ended with {status}"
        await own("after")
        await asyncio.sleep(2 * HEARTBEAT)
        assert client.is_owned("before")
        assert client.is_owned("after")
        assert generation(client) == opened
        await client.done_stream("before")
        await client.done_stream("after")


def generation(client: StreamClient) -> list[int]:
    """How often its connections to the service's entries were opened."""
    key = b"svc-input"
    topologies = (
        client._engine._connections.commands,
        client._engine._connections.recovering,
        client._engine.renewer._topology,
    )
    return [
        topology.to(topology.slots.owners[key_slot(key)]).generation
        if isinstance(topology, ClusterTopology)
        else topology.link(key).generation
        for topology in topologies
    ]


if __name__ == "__main__":
    loop = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}[sys.argv[2]]
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main(sys.argv[1], sys.argv[3]))
