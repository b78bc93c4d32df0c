"""No exception, log line or repr contains a password."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any
from urllib.parse import quote

import pytest
import redis.asyncio
import redis.asyncio.sentinel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.credentials import CredentialProvider
from wire import GREETING, command, listening, until_eof

from relstream import InvalidOption, Producer, RelstreamError, StreamClient
from relstream.net.connection import Connection
from relstream.net.deployment import deployment_of
from relstream.net.endpoint import endpoint_of
from relstream.net.secrets import without_secrets

SECRET = "hunter2"
# A part of it is as bad, in either case: host names are shown in lower case.
PART = "unter"

passwords = st.lists(
    st.sampled_from([SECRET, SECRET, *"@&/?#:%=+[]; ,'\"\\", "é", "\u2100", "&db=", "://", "%40"]),
    min_size=2,
    max_size=6,
).map(lambda parts: "".join([*parts, SECRET]))
places = [
    "redis://:{}@localhost/0",
    "redis://joe:{}@localhost:x?db=1",
    "rediss://joe:{}@localhost?socket_timeout=soon",
    "unix://joe:{}@/tmp/s?db=1",
    "redis://localhost?password={}",
    "redis://localhost/1?db=1&password={}&socket_timeout=5",
    "unix:///tmp/s?password={}",
    "rediss://localhost?ssl_password={}&password={}",
    "redis+cluster://joe:{}@a:1,b:2",
    "redis+cluster://a:1,b:2?password={}",
    "redis+sentinel://joe:{}@a:1,b:2/master/3",
    "redis+sentinel://a:1/master?sentinel_password={}&sentinel_socket_timeout=1",
    "redis+sentinel://a:1/master?password={}",
    "http://joe:{}@localhost",
    "joe:{}@localhost",
]


def all_of(error: BaseException | None) -> str:
    """Whatever could be shown of an error, and of those that it came of."""
    said = ""
    while error is not None:
        said += f"{error} {error!r} {error.args}" + "".join(traceback.format_exception_only(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return said.lower()


@settings(max_examples=400)
@given(st.sampled_from(places), passwords, st.booleans())
@example("redis://localhost?password={}", f"x@{SECRET}", False)
@example("redis://localhost?password={}", f"x&{SECRET}=1", False)
@example("redis+cluster://a:1,b:2?password={}", f"@/{SECRET}", False)
@example("redis+sentinel://a:1/master?password={}", f"x&sentinel_{SECRET}=1", False)
@example("unix://joe:{}@/tmp/s", f"x/{SECRET}", False)
@example("unix://joe:{}@/tmp/s?db=1", f"@/{SECRET}", False)
def test_urls_are_shown_without_passwords(place: str, password: str, encoded: bool) -> None:
    url = place.replace("{}", quote(password, safe="") if encoded else password)
    said = without_secrets(url)
    try:
        deployment = deployment_of(url)
    except InvalidOption as error:
        said += all_of(error) + repr(error.value)
    else:
        said += repr(deployment) + str(deployment.endpoint)
    assert PART not in said.lower()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://joe:hunter2@h:1/2?db=3", "redis://***@h:1/2?db=3"),
        ("redis://h?timeuot=5&password=a&b", "redis://h?timeuot=5&password=***"),
        ("redis://h?password=a@b", "redis://***"),
        ("redis+sentinel://:a/b@h:1,i/m/2", "redis+sentinel://***@h:1,i/m/2"),
        ("localhost:6379", "localhost:6379"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


class Provider(CredentialProvider):
    def __init__(self) -> None:
        self.password = SECRET

    def __repr__(self) -> str:
        return f"Provider({self.password})"

    async def get_credentials_async(self) -> Any:
        raise RuntimeError(f"{self.password} has expired")


@pytest.mark.parametrize("settings", [{"password": SECRET}, {"credential_provider": Provider()}])
async def test_clients_are_shown_without_passwords(settings: dict[str, Any]) -> None:
    client = redis.asyncio.Redis(port=1, **settings)
    deployment = deployment_of(client)
    shown = f"{deployment} {deployment!r} {deployment.endpoint!r}"
    shown += repr(StreamClient(client, "svc", consumer_id="c1")) + repr(Producer(client, "svc"))
    sentinel = redis.asyncio.sentinel.Sentinel([("h", 1)], sentinel_kwargs={"password": SECRET})
    for bad in (
        redis.asyncio.Redis(socket_timeout=-1, **settings),
        sentinel.slave_for("m", **settings),
    ):
        with pytest.raises(InvalidOption) as caught:
            deployment_of(bad)
        shown += all_of(caught.value) + repr(caught.value.value)
    link = Connection(deployment.endpoint)
    with pytest.raises(RelstreamError) as failed:
        await link.get()
    shown += all_of(failed.value)
    assert PART not in shown.lower()


ECHO = b"-ERR unknown command '%b', with args beginning with: %b"


@pytest.mark.parametrize("code", [b"", b"NOAUTH ", b"WRONGPASS ", b"LOADING ", b"NOPERM "])
@pytest.mark.parametrize("then", ["hangs up", "refuses", "goes on", "talks on", "garbage"])
@pytest.mark.parametrize("db", [0, 3])
@pytest.mark.parametrize("password", [SECRET, "it's \"" + SECRET, SECRET * 40])
async def test_a_server_that_repeats_refused_arguments(
    code: bytes, then: str, password: str, db: int, caplog: pytest.LogCaptureFixture
) -> None:
    def refusal(args: list[bytes]) -> bytes:
        said = b" ".join(b"'%b'" % arg for arg in args[1:])[:128]
        what = ECHO % (args[0], said)
        return (b"-" + code + what[1:] if code else what) + b"\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await command(reader)
        if then == "talks on":
            writer.write(GREETING + refusal(hello))
        elif then == "garbage":
            writer.write(refusal(hello)[1:])
        else:
            writer.write(refusal(hello))
        if then == "hangs up":
            return
        while then == "refuses":
            writer.write(refusal(await command(reader)))
        while then == "goes on":
            args = await command(reader)
            writer.write(b"+OK\r\n" if args[0] == b"AUTH" else refusal(args))
        await until_eof(reader)

    async with listening(serve) as port:
        link = Connection(endpoint_of(f"redis://joe:{quote(password)}@127.0.0.1:{port}/{db}"))
        (outcome,) = await asyncio.gather(link.execute("PING"), return_exceptions=True)
        assert isinstance(outcome, RelstreamError)
        assert PART not in all_of(outcome)
        await link.close()
    assert PART not in caplog.text
