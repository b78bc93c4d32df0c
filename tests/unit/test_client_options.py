"""`StreamClient(...)` checks all it is given, before it connects to anything."""

from __future__ import annotations

import logging
import math

import pytest
import redis.asyncio

from relstream import (
    ClientClosed,
    ClusterClientRequired,
    ClusterMode,
    ConsumerIdMissing,
    InvalidOption,
    NotificationType,
    RecoveryConfig,
    StreamClient,
)


@pytest.fixture(autouse=True)
def no_pod(monkeypatch):
    monkeypatch.delenv("POD_NAME", raising=False)
    monkeypatch.delenv("POD_IP", raising=False)


def make(url="redis://localhost", service="svc", **options):
    return StreamClient(url, service, **({"consumer_id": "c"} | options))


NUMBERS = ["1", None, True, False, math.nan, math.inf, -math.inf, -1, 0, 10**400]


class Telling:
    """A recorder that wants to know one thing."""

    def terminated(self, reason: str) -> None: ...


@pytest.mark.parametrize(
    ("option", "good", "bad", "bound"),
    [
        ("heartbeat_interval", [0.1, 2, 3600], [*NUMBERS, 0.09, 3600.1], "from 0.1 to 3600"),
        ("queue_size", [1, 1_000_000], [*NUMBERS, 1.0, 1_000_001], "from 1 to 1000000"),
        ("max_streams", [None, 1, 10**6], ["1", True, 1.0, 0, -1], "a whole number from 1"),
        ("auto_claim", [True, False], [0, 1, None, "no"], "True or False"),
        ("force_config_override", [True, False], [0, 1, None, "no"], "True or False"),
        ("renew_in_thread", [True, False], [0, 1, None, "no"], "True or False"),
        ("retry", [], [None, 5, RecoveryConfig()], "a RetryConfig"),
        ("recovery", [], [None, {}], "a RecoveryConfig"),
        ("cluster_mode", [ClusterMode.SINGLE_SHARD], [None, "oss"], "a ClusterMode"),
        ("logger", [None, logging.getLogger("x")], ["x", print], "a logging.Logger"),
        ("recorder", [None, Telling()], [object(), 42, Telling], "methods of Recorder"),
        ("consumer_id", ["c", "ä", "a b"], ["", 5, b"c", "\ud800"], "a name"),
    ],
)
def test_options(option, good, bad, bound):
    for value in good:
        make(**{option: value})
    for value in bad:
        with pytest.raises(InvalidOption, match=rf"^{option}=.*: expected .*{bound}"):
            make(**{option: value})


@pytest.mark.parametrize("service", ["", None, "\ud800", "a<MUTEX_KEY_SEP>b"])
def test_service_name(service):
    with pytest.raises(InvalidOption, match=r"^service_name="):
        make(service=service)


def test_dead_letter_stream():
    with pytest.raises(InvalidOption, match=r"^recovery.dlq_stream='svc-input'"):
        make(recovery=RecoveryConfig(dlq_stream="svc-input"))


@pytest.mark.parametrize(
    ("environment", "given", "name"),
    [
        ({"POD_NAME": "pod", "POD_IP": "10.0.0.1"}, None, "redis-consumer-pod"),
        ({"POD_IP": "10.0.0.1"}, None, "redis-consumer-10.0.0.1"),
        ({"POD_NAME": "", "POD_IP": "10.0.0.1"}, None, "redis-consumer-10.0.0.1"),
        ({"POD_NAME": "pod"}, "mine", "mine"),
        ({}, "mine", "mine"),
    ],
)
def test_consumer_name(monkeypatch, environment, given, name):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert make(consumer_id=given).id == name


@pytest.mark.parametrize("environment", [{}, {"POD_NAME": "", "POD_IP": ""}])
def test_no_consumer_name(monkeypatch, environment):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConsumerIdMissing, match="consumer_id, or set POD_NAME or POD_IP"):
        make(consumer_id=None)


def test_consumer_name_of_the_environment_that_is_no_text(monkeypatch):
    monkeypatch.setenv("POD_NAME", "\udcff")  # how os.environ shows a byte that is not UTF-8
    with pytest.raises(InvalidOption, match=r"^POD_NAME"):
        make(consumer_id=None)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:6379", "http://localhost", "redis://localhost:port"),
        *("redis://localhost:99999", "redis://localhost/zero", "redis://localhost?db=zero"),
        *("redis://[::1", "unix://", None, b"redis://localhost", 6379),
    ],
)
def test_urls(url):
    with pytest.raises(
        InvalidOption,
        match=r"^redis=.*: expected .*redis://.*unix://.*redis\+cluster://.*redis\+sentinel://",
    ) as caught:
        make(url)
    if isinstance(url, str):
        assert repr(url) in str(caught.value)


def test_mistyped_arguments_of_urls():
    with pytest.raises(InvalidOption, match=r"^redis=.*'timeuot'"):
        make("redis://localhost?timeuot=5")


@pytest.mark.parametrize("tail", ["localhost:99999", "localhost/zero", "localhost?timeuot=5"])
def test_errors_show_no_password(tail):
    with pytest.raises(InvalidOption) as caught:
        make(f"redis://joe:hunter2@{tail}")
    assert "hunter2" not in f"{caught.value} {caught.value.args}"
    assert tail in str(caught.value)


def test_cluster_mode_wants_a_cluster_client():
    for single in ("redis://localhost", redis.asyncio.Redis()):
        with pytest.raises(ClusterClientRequired, match=r"needs a redis.asyncio.RedisCluster"):
            make(single, cluster_mode=ClusterMode.OSS)
    for several in (
        "redis+cluster://localhost:7000,localhost:7001",
        redis.asyncio.RedisCluster(host="localhost"),
    ):
        make(several, cluster_mode=ClusterMode.OSS)


async def test_a_client_never_opened():
    client = make()
    for call in (
        client.done_stream("s"),
        client.release("s"),
        client.reset_topology(),
        client.reinit_topology(),
    ):
        with pytest.raises(ClientClosed, match=r"call init\(\) first"):
            await call
    await client.aclose()
    await client.aclose()
    await client.done()
    with pytest.raises(ClientClosed, match="make a new StreamClient"):
        await client.init()
    assert [n.type async for n in client._engine.notifications] == [
        NotificationType.STREAM_TERMINATED
    ]


@pytest.mark.parametrize(("seconds", "warned"), [(60, False), (60.5, True), (2000, True)])
def test_a_heartbeat_that_may_be_meant_in_milliseconds(caplog, seconds, warned):
    make(heartbeat_interval=seconds)
    said = [record.getMessage() for record in caplog.records]
    assert [f"heartbeat_interval={seconds:g} is in seconds" in line for line in said] == (
        [True] if warned else []
    )
