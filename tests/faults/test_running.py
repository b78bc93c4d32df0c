"""`relstream.run`, and README's consumer in it: signals, restarts, an outage, a failure."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from faults.applications import (
    AS_PROCESS_1,
    HOLDING,
    Application,
    Launch,
    readme,
    why_not_process_1,
)
from helpers import Service, connections_left, eventually

SIGTERM, SIGINT = signal.SIGTERM, signal.SIGINT


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts applications that are killed after the test."""
    started: list[Application] = []

    def start(*args: str, before: tuple[str, ...] = ()) -> Application:
        started.append(Application(*args, before=before))
        return started[-1]

    yield start
    for application in started:
        application.close()


def quiet(application: Application) -> None:
    assert application.err == []


def handed_over(service: Service, count: int) -> None:
    """Nothing is left behind, no stream is lost, and no retry is counted."""
    assert (service.locks(), service.pending()) == ({}, [])
    entries = service.redis.xrange(service.lbs)
    assert len(entries) == count
    assert all(fields.get(b"_retry_count", b"0") == b"0" for _, fields in entries)


# --- README's consumer ------------------------------------------------------------------------


@pytest.fixture
def readme_consumer(launch: Launch, tmp_path: Path):
    def start(url: str) -> Application:
        path = tmp_path / "consumer.py"
        path.write_text(readme("## A consumer", url))
        return launch(str(path))

    return start


async def test_readme_consumer_and_producer(readme_consumer, launch, service, redis_url, tmp_path):
    calls = service.other("calls")
    consumer = readme_consumer(redis_url)
    producer = tmp_path / "producer.py"
    producer.write_text(readme("And a producer", redis_url))
    announcing = launch(str(producer))
    await consumer.says("mine: call:4711 {'caller': '+49 30 1234'}")
    assert await announcing.ended() == 0
    await eventually(lambda: not calls.entries())
    consumer.signal()
    assert await consumer.ended() == 0
    quiet(consumer)
    quiet(announcing)
    handed_over(calls, 0)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_readme_consumer_survives_a_minute_without_redis(readme_consumer, make_server):
    server = make_server()
    consumer = readme_consumer(server.url)
    with redis.Redis.from_url(server.url) as admin:
        calls = Service(admin, "calls")
        calls.announce("before")
        await consumer.says("mine: before None")
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(60)
        assert consumer.running
        await asyncio.to_thread(server.start)
        calls.announce("after")
        await consumer.says("mine: after None", 30)
        await eventually(lambda: not calls.entries())
    consumer.signal()
    assert await consumer.ended() == 0


async def test_readme_consumer_that_died_does_not_exit_with_0(readme_consumer, service, redis_url):
    calls = service.other("calls")
    consumer = readme_consumer(redis_url)
    await eventually(lambda: calls.reads("worker-1"))
    service.redis.set(calls.lbs, "no stream any more")
    assert await consumer.ended() == 1
    assert "WRONGTYPE" in consumer.err[-1]
    assert consumer.err[-1].startswith("relstream.errors.ClientTerminated: ")


async def test_sigterm_in_an_outage(launch, make_server):
    server = make_server()
    consumer = launch(HOLDING, server.url, "0")
    with redis.Redis.from_url(server.url) as admin:
        Service(admin).announce("s1")
    await consumer.says("owns s1")
    await asyncio.to_thread(server.kill)
    consumer.signal()
    assert await consumer.ended(30) == 0
    assert not [line for line in consumer.err if "Traceback" in line]


# --- restarts ---------------------------------------------------------------------------------

PROCESSES = ["child", "process-1"]


def world(process: str) -> tuple[str, ...]:
    if process == "child":
        return ()
    if why := why_not_process_1():
        pytest.skip(f"no process 1 of our own: {why}")
    return AS_PROCESS_1


@pytest.mark.parametrize("process", PROCESSES)
async def test_ten_restarts_count_no_retry(launch, service, redis_url, process):
    before = world(process)
    service.announce("long")
    for _ in range(10):
        consumer = launch(HOLDING, redis_url, "0", before=before)
        await consumer.says("owns long")
        consumer.signal()
        assert await consumer.ended() == 0
        quiet(consumer)
        handed_over(service, 1)
    assert not service.redis.exists(service.dlq)


@pytest.mark.parametrize("process", PROCESSES)
async def test_twenty_signals_within_100_ms_are_one_request(launch, service, redis_url, process):
    before = world(process)
    for i in range(200):
        service.announce(f"s{i}")
    consumer = launch(HOLDING, redis_url, "0", before=before)
    await consumer.says("owns s199")
    for _ in range(20):
        consumer.signal()
        await asyncio.sleep(0.005)
    assert await consumer.ended() == 0
    quiet(consumer)
    handed_over(service, 200)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
async def test_sigterm_while_a_client_opens(launch, service, redis_url, delay):
    service.announce("s1")
    consumer = launch(HOLDING, redis_url, "0")
    await consumer.says("opening")
    await asyncio.sleep(delay)
    consumer.signal()
    assert await consumer.ended() == 0
    quiet(consumer)
    handed_over(service, 1)


async def test_sigterm_while_a_client_waits_to_be_opened(launch, make_server):
    server = make_server()
    server.pause()
    consumer = launch(HOLDING, server.url, "0")
    await consumer.says("opening")
    await asyncio.sleep(0.2)
    consumer.signal()
    assert await consumer.ended() == 0
    quiet(consumer)
    server.resume()
    with redis.Redis.from_url(server.url) as admin:
        assert not connections_left([admin])


async def test_sigterm_while_a_client_hands_over(launch, make_server):
    server = make_server()
    with redis.Redis.from_url(server.url) as admin:
        service = Service(admin)
        for i in range(200):
            service.announce(f"s{i}")
        consumer = launch(HOLDING, server.url, "200")
        await eventually(lambda: len(service.locks()) == 200)
        admin.execute_command("CLIENT", "PAUSE", 3000, "WRITE")
        await consumer.says("leaving")
        await asyncio.sleep(0.2)
        consumer.signal()
        assert await consumer.ended() == 0
        quiet(consumer)
        handed_over(service, 200)


# --- signals ----------------------------------------------------------------------------------

SCRIPT = """
import asyncio, os, signal, sys, time
if {loop!r} == "asyncio":
    sys.modules["uvloop"] = None
import relstream

async def main():
    assert type(asyncio.get_running_loop()).__module__.startswith({loop!r})
    print("begun")
{body}

{call}
"""
WAIT = """
    try:
        await asyncio.sleep(60)
    finally:
        print("cleaning up")
        {cleaning}
        print("clean")
"""
PLAIN = "print(relstream.run(main()))"


@pytest.fixture(params=["uvloop", "asyncio"])
def script(request: pytest.FixtureRequest, launch: Launch):
    def start(body: str, call: str = PLAIN, before: tuple[str, ...] = ()) -> Application:
        return launch("-c", SCRIPT.format(loop=request.param, body=body, call=call), before=before)

    return start


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_the_first_signal_cancels_once(script, number, process):
    app = script(WAIT.format(cleaning="await asyncio.sleep(0.1)"), before=world(process))
    await app.says("begun")
    app.signal(number)
    assert await app.ended() == 0
    assert app.out == ["begun", "cleaning up", "clean", "None"]
    quiet(app)


@pytest.mark.parametrize("cleaning", ["await asyncio.sleep(60)", "time.sleep(60)"])
@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_a_later_signal_ends_at_once(script, number, cleaning):
    app = script(WAIT.format(cleaning=cleaning))
    await app.says("begun")
    app.signal()
    await app.says("cleaning up")
    app.signal(number)  # the same request, most likely
    await asyncio.sleep(0.7)
    app.signal(number)
    assert await app.ended(5) == 128 + number
    assert app.out == ["begun", "cleaning up"]
    assert len(app.err) == 1
    assert app.err[0].startswith("relstream: ended at once by a second signal (SIG")


async def test_a_signal_while_the_loop_is_blocked(script):
    app = script("    time.sleep(1)" + WAIT.format(cleaning="pass"))
    await app.says("begun")
    app.signal()
    assert await app.ended() == 0
    assert app.out == ["begun", "cleaning up", "clean", "None"]


async def test_a_signal_before_the_first_step(script):
    early = """
class Early(asyncio.Runner):
    def run(self, *args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().run(*args, **options)

asyncio.Runner = Early
"""
    app = script(WAIT.format(cleaning="pass"), early + PLAIN)
    assert await app.ended() == 0
    assert app.out == ["None"]
    quiet(app)


async def test_an_ignored_sigint_stays_ignored(script):
    ignoring = ("/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh")
    app = script(WAIT.format(cleaning="pass"), before=ignoring)
    await app.says("begun")
    for _ in range(2):
        app.signal(SIGINT)
        await asyncio.sleep(0.7)
    assert app.running
    app.signal()
    assert await app.ended() == 0
    assert app.out == ["begun", "cleaning up", "clean", "None"]


@pytest.mark.parametrize(
    ("answer", "out", "code"),
    [
        ("return 5", ["5"], 0),
        ("raise ValueError('bad')", [], 1),
        ("sys.exit(7)", [], 7),
    ],
)
async def test_what_main_makes_of_the_cancellation(script, answer, out, code):
    body = f"""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        {answer}
"""
    app = script(body)
    await app.says("begun")
    app.signal()
    assert await app.ended() == code
    assert app.out == ["begun", *out]


async def test_a_full_standard_error_does_not_keep_the_process(launch):
    """Nobody reads what it has to say."""
    body = """
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)
    print("full")
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(60)
"""
    code = SCRIPT.format(loop="uvloop", body=body, call=PLAIN)
    app = launch("-c", f"import os\nr, w = os.pipe()\nos.dup2(w, 2)\n{code}")
    await app.says("full")
    app.signal()
    await asyncio.sleep(0.7)
    app.signal()
    assert await app.ended(5) == 128 + SIGTERM
