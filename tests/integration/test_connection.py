from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import trustme
from helpers import eventually, names, take
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider
from wire import GREETING, Proxy, command, listening, until_eof

from relstream import Producer, StreamClient
from relstream._core import pack
from relstream.backoff import Backoff
from relstream.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    InvalidOption,
    PermissionDenied,
    ProtocolError,
    ReplyError,
    ServerTooOld,
)
from relstream.net.connection import Connection
from relstream.net.endpoint import Endpoint, endpoint_of
from relstream.net.handshake import connect
from relstream.net.replies import raise_first
from relstream.testing.server import Server, ServerStartFailed, TLSFiles

pytestmark = pytest.mark.only("single", reason="about connections to one server")

MakeServer = Callable[..., Server]
NO_HELLO = {"rename-command": 'HELLO ""'}


@contextlib.asynccontextmanager
async def linked(source: Any, **options: Any) -> AsyncIterator[Connection]:
    endpoint = source if isinstance(source, Endpoint) else endpoint_of(source)
    link = Connection(replace(endpoint, **options))
    try:
        yield link
    finally:
        await link.close()


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    async with Proxy(endpoint_of(redis_url).port) as proxy:
        yield proxy


async def whoami(link: Connection) -> dict[str, str]:
    """The connection, as the server lists it."""
    line = (await link.execute("CLIENT", "LIST", "ID", (await link.get()).client_id)).decode()
    return dict(pair.split("=", 1) for pair in line.split())


async def speaks_resp3(link: Connection) -> bool:
    return isinstance(await link.execute("CONFIG", "GET", "port"), dict)


async def fails_to_connect(source: Any, error: type[Exception], **options: Any) -> str:
    """Returns the message; what is raised must be exactly of this class."""
    async with linked(source, **options) as link:
        with pytest.raises(error) as raised:
            await link.get()
        assert type(raised.value) is error, raised.value
        assert not link.alive
        return str(raised.value)


# --- where to, and by what name -------------------------------------------------------------------


async def test_tcp(redis_url):
    async with linked(redis_url) as link:
        assert not link.alive  # opened by who needs it
        assert await link.execute("PING") == b"PONG"
        assert link.alive
        assert await speaks_resp3(link)
        sock = (await link.get())._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_unix_socket(make_server):
    server = make_server(unix_socket=True)
    async with linked(f"{server.url}?db=3") as link:
        me = await whoami(link)
        assert (me["db"], me["addr"].split(":")[0].strip("[")) == (
            "3",
            server.url.removeprefix("unix://"),
        )


async def test_name_and_database(redis_url, redis_sync):
    endpoint = endpoint_of(redis_url.replace("/0", "/5"))
    async with linked(endpoint.named("some consumer\n:é:command")) as link:
        await link.execute("SET", "here", 1)
        assert (await whoami(link))["name"] == "relstream:some_consumer_:_:command"
        assert (await whoami(link))["db"] == "5"
    assert not redis_sync.exists("here")


async def test_a_name_the_server_would_refuse_costs_no_resp3(redis_url):
    async with linked(redis_url, client_name="relstream of mine") as link:
        assert await speaks_resp3(link)
        assert (await whoami(link))["name"] == "relstream_of_mine"


async def test_resp2_when_asked_for(redis_url):
    async with linked(f"{redis_url}?protocol=2") as link:
        assert not await speaks_resp3(link)
        assert (await whoami(link))["name"] == "relstream"


async def test_resp2_when_there_is_no_hello(make_server):
    server = make_server(config={**NO_HELLO, "requirepass": "s3cret"})
    url = server.url.replace("//", "//:s3cret@").replace("/0", "/2")
    async with linked(url) as link:
        assert not await speaks_resp3(link)
        me = await whoami(link)
        assert (me["name"], me["db"]) == ("relstream", "2")
    bad = server.url.replace("//", "//:wrong@")
    assert "did not accept" in await fails_to_connect(bad, AuthenticationFailed)
    assert "none was given" in await fails_to_connect(server.url, AuthenticationFailed)


@pytest.mark.parametrize(
    "refusal", [b"NOPROTO no such version", b"NOPERM no permission", b"ERR unknown command 'HELLO'"]
)
async def test_resp2_when_hello_is_refused(refusal):
    said = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            said.append(await command(reader))
            replies = {b"HELLO": b"-%b\r\n" % refusal, b"CLIENT": b":7\r\n", b"PING": b"+PONG\r\n"}
            writer.write(replies.get(said[-1][0], b"-NOPERM not that either\r\n"))

    async with listening(serve) as port, linked(f"redis://127.0.0.1:{port}") as link:
        assert await link.execute("PING") == b"PONG"
        assert (await link.get()).client_id == 7
    assert said[0] == [b"HELLO", b"3", b"SETNAME", b"relstream"]
    assert [b"CLIENT", b"SETNAME", b"relstream"] in said


# --- who we are -----------------------------------------------------------------------------------


def with_user(redis_sync: redis.Redis, url: str, rights: str = "+@all") -> str:
    """The URL of a user of these rights, where nobody else gets in."""
    redis_sync.execute_command(
        *("ACL", "SETUSER", "ann", "on", ">p@ss/wo:rd", "~*", "&*", *rights.split())
    )
    return url.replace("//", "//ann:p%40ss%2Fwo%3Ard@")


@pytest.mark.parametrize("query", ["", "?protocol=2"])
async def test_acl_user(redis_url, redis_sync, query):
    async with linked(with_user(redis_sync, redis_url) + query) as link:
        assert await link.execute("ACL", "WHOAMI") == b"ann"


@pytest.mark.parametrize("query", ["", "?protocol=2"])
async def test_acl_user_who_may_do_little(redis_url, redis_sync, query):
    async with linked(with_user(redis_sync, redis_url, "-@all +ping") + query) as link:
        assert await link.execute("PING") == b"PONG"
        with pytest.raises(ReplyError, match="NOPERM"):
            await link.execute("GET", "x")


async def test_no_right_to_select(redis_url, redis_sync):
    url = with_user(redis_sync, redis_url, "+@all -select").replace("/0", "/1")
    assert "select" in await fails_to_connect(url, PermissionDenied)


@pytest.mark.parametrize("query", ["", "?protocol=2"])
async def test_wrong_password(redis_url, redis_sync, query):
    with_user(redis_sync, redis_url)
    message = await fails_to_connect(
        redis_url.replace("//", "//ann:gu3ss@") + query, AuthenticationFailed
    )
    assert "did not accept user name and password" in message
    assert "gu3ss" not in message


@pytest.mark.parametrize("query", ["", "?protocol=2"])
async def test_password_missing(make_server, query):
    server = make_server(config={"requirepass": "s3cret"})
    message = await fails_to_connect(server.url + query, AuthenticationFailed)
    assert "none was given" in message
    async with linked(server.url.replace("//", "//:s3cret@") + query) as link:
        assert await link.execute("PING") == b"PONG"


class Rotating(CredentialProvider):
    """Gives another password each time, as an identity service does."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.broken = False

    def get_credentials(self) -> tuple[str, str]:
        raise AssertionError("this would block the event loop")

    async def get_credentials_async(self) -> tuple[str, str]:
        await asyncio.sleep(0)
        if self.broken:
            raise RuntimeError("the identity service is down")
        self.given.append(f"token{len(self.given)}")
        return "bob", self.given[-1]


async def test_credential_provider_is_asked_at_each_connect(redis_url, redis_sync):
    provider = Rotating()
    client = redis.asyncio.Redis.from_url(redis_url, credential_provider=provider)
    redis_sync.execute_command("ACL", "SETUSER", "bob", "on", ">token0", "+@all", "~*")
    async with linked(client) as link:
        assert await link.execute("ACL", "WHOAMI") == b"bob"
        assert await link.execute("PING") == b"PONG"
        assert provider.given == ["token0"]
        redis_sync.execute_command("ACL", "SETUSER", "bob", "resetpass", ">token1")
        redis_sync.client_kill_filter(_id=(await link.get()).client_id)
        await eventually(lambda: not link.alive)
        assert await link.execute("ACL", "WHOAMI") == b"bob"
        assert provider.given == ["token0", "token1"]
        provider.broken = True
        (await link.get()).abort()
        with pytest.raises(ConnectionFailed, match="the identity service is down"):
            await link.get()


@pytest.mark.parametrize(("given", "user"), [(("ann", "pw"), b"ann"), (("", "pw2"), b"default")])
async def test_credential_provider_of_redis_py(redis_url, redis_sync, given, user):
    redis_sync.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "+@all")
    client = redis.asyncio.Redis.from_url(
        redis_url, credential_provider=UsernamePasswordCredentialProvider(*given)
    )
    async with linked(client) as link:
        assert await link.execute("ACL", "WHOAMI") == user


async def test_a_ready_client_is_taken_over(redis_url, redis_sync):
    with_user(redis_sync, redis_url)
    port = int(redis_url.split(":")[-1].split("/")[0])
    client = redis.asyncio.Redis(
        host="127.0.0.1", port=port, db=4, username="ann", password="p@ss/wo:rd", protocol=2,
        client_name="relstream-theirs", socket_timeout=3, socket_connect_timeout=2,
    )  # fmt: skip
    endpoint = endpoint_of(client)
    assert (endpoint.timeout, endpoint.connect_timeout) == (3, 2)
    assert "p@ss" not in repr(endpoint) + str(endpoint)
    async with linked(client) as link:
        me = await whoami(link)
        assert (me["db"], me["user"], me["name"]) == ("4", "ann", "relstream-theirs")
        assert not await speaks_resp3(link)


@pytest.mark.parametrize("setting", ["socket_timeout", "socket_connect_timeout"])
@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1, 0, 0.0, True, False, "5"])
def test_a_ready_client_with_a_timeout_that_can_not_be(setting, seconds):
    client = redis.asyncio.Redis(**{setting: seconds})
    with pytest.raises(InvalidOption, match=rf"^redis=.*: expected {setting} above 0 seconds"):
        endpoint_of(client)


async def test_a_ready_client_on_a_unix_socket(make_server):
    path = make_server(unix_socket=True).url.removeprefix("unix://")
    async with linked(redis.asyncio.Redis(unix_socket_path=path, db=1)) as link:
        assert (await whoami(link))["db"] == "1"


# --- TLS ------------------------------------------------------------------------------------------


class Certified:
    """A server with a certificate, and what is needed to trust it."""

    def __init__(self, make_server: MakeServer, folder: Path, **config: str) -> None:
        self.folder = folder
        self.issue(trustme.CA())
        files = TLSFiles(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
        try:
            self.server = make_server(tls=files, config=config)
        except ServerStartFailed as error:
            # Redis 6.2 does not know the directives; later ones miss what carries them out.
            if not any(sign in str(error) for sign in (">>> 'tls-", "Failed finding TLS support")):
                raise
            pytest.skip("this server was built without TLS")
        self.trusting = f"{self.server.url}?ssl_ca_certs={folder / 'ca.pem'}"

    def issue(self, ca: trustme.CA) -> None:
        self.ca = ca
        ca.cert_pem.write_to_path(self.folder / "ca.pem")
        certificate = ca.issue_cert("127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(self.folder / "cert.pem")
        certificate.private_key_pem.write_to_path(self.folder / "key.pem")

    def client_certificate(self) -> str:
        issued = self.ca.issue_cert("client@example.org")
        issued.private_key_and_cert_chain_pem.write_to_path(self.folder / "client.pem")
        path = self.folder / "client.pem"
        return f"&ssl_certfile={path}&ssl_keyfile={path}"


@pytest.fixture
def certified(make_server: MakeServer, tmp_path: Path) -> Certified:
    return Certified(make_server, tmp_path)


async def test_tls(certified):
    async with linked(certified.trusting.replace("/0?", "/2?")) as link:
        assert await speaks_resp3(link)
        assert (await whoami(link))["db"] == "2"
        large = os.urandom(3 << 20)
        await link.execute("SET", "large", large)
        assert await link.execute("GET", "large") == large
        numbers = await asyncio.gather(*(link.execute("ECHO", n) for n in range(500)))
        assert numbers == [b"%d" % n for n in range(500)]
    assert not link.alive
    client = redis.asyncio.Redis.from_url(certified.trusting)
    async with linked(client) as link:
        assert await link.execute("PING") == b"PONG"


async def test_tls_with_a_certificate_that_is_not_trusted(certified, tmp_path):
    message = await fails_to_connect(certified.server.url, ConnectionFailed)
    assert "certificate was not accepted" in message
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    url = f"{certified.server.url}?ssl_ca_certs={tmp_path / 'other.pem'}"
    assert "ssl_ca_certs" in await fails_to_connect(url, ConnectionFailed)
    async with linked(f"{certified.server.url}?ssl_cert_reqs=none") as link:
        assert await link.execute("PING") == b"PONG"


async def test_tls_with_a_name_the_certificate_does_not_have(certified):
    url = certified.trusting.replace("127.0.0.1", "localhost")
    message = await fails_to_connect(url, ConnectionFailed)
    assert "localhost" in message
    async with linked(f"{url}&ssl_check_hostname=false") as link:
        assert await link.execute("PING") == b"PONG"


async def test_tls_client_certificates(make_server, tmp_path):
    certified = Certified(make_server, tmp_path, **{"tls-auth-clients": "yes"})
    await fails_to_connect(certified.trusting, ConnectionFailed)
    async with linked(certified.trusting + certified.client_certificate()) as link:
        assert await link.execute("PING") == b"PONG"


async def test_tls_files_that_were_renewed_are_read_again(make_server, tmp_path):
    certified = Certified(make_server, tmp_path, **{"tls-auth-clients": "yes"})
    async with linked(certified.trusting + certified.client_certificate()) as link:
        assert await link.execute("PING") == b"PONG"
        tls = link.endpoint.tls
        assert tls.context() is tls.context()
        ca = (tmp_path / "ca.pem").read_bytes()
        (tmp_path / "ca.pem").write_bytes(ca[: len(ca) // 2])  # half of it is written
        (await link.get()).abort()
        with pytest.raises(ConnectionFailed, match="TLS files"):
            await link.get()
        (tmp_path / "ca.pem").write_bytes(ca)
        first = await link.get()
        certified.issue(trustme.CA())
        certified.client_certificate()
        await link.execute("CONFIG", "SET", "tls-cert-file", str(tmp_path / "cert.pem"))
        for _ in range(2):
            (await link.get()).abort()
            assert await link.execute("PING") == b"PONG"
        assert await link.get() is not first


async def test_a_client_goes_on_after_certificates_were_renewed(make_server, tmp_path):
    certified = Certified(make_server, tmp_path)
    client = StreamClient(certified.trusting, "svc", consumer_id="c1")
    producer = Producer(certified.trusting, "svc")
    async with client as notifications, linked(certified.trusting) as admin:
        await producer.announce("before")
        await take(notifications, 1)
        await admin.get()
        certified.issue(trustme.CA())
        await admin.execute("CONFIG", "SET", "tls-cert-file", str(tmp_path / "cert.pem"))
        await admin.execute("CLIENT", "KILL", "TYPE", "normal")
        await eventually(lambda: not client._engine._connections.commands.link(b"").alive)
        with contextlib.suppress(ConnectionFailed):  # it may not know yet
            await producer.announce("after")
        await producer.announce("after all")
        while "after all" not in names(await take(notifications, 1)):
            pass
        assert client.is_owned("before")
    await producer.aclose()


async def test_tls_where_there_is_none(redis_url):
    url = redis_url.replace("redis://", "rediss://")
    # Redis waits for the end of what it takes for a line.
    message = await fails_to_connect(url, ConnectionFailed, connect_timeout=0.5)
    assert "redis:// connects without" in message


async def test_no_tls_where_it_is_needed(certified):
    plain = certified.server.url.replace("rediss://", "redis://")
    async with linked(plain) as link:
        with pytest.raises((ConnectionFailed, ProtocolError), match=r"closed|rediss://|reset"):
            await link.get()


async def test_tls_connection_cut(certified):
    async with Proxy(certified.server.port) as proxy:
        url = certified.trusting.replace(str(certified.server.port), str(proxy.port))
        async with linked(url) as link:
            await link.execute("PING")
            proxy.stall()
            waiting = [asyncio.ensure_future(link.execute("PING")) for _ in range(3)]
            await asyncio.sleep(0.05)
            proxy.cut()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(result) for result in results] == [ConnectionLost] * 3
            proxy.resume()
            assert await link.execute("PING") == b"PONG"
            proxy.stall()  # so that no goodbye comes
            await asyncio.wait_for(link.close(), 5)


async def test_tls_handshake_without_an_answer():
    async with listening(lambda reader, writer: until_eof(reader)) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none"
        message = await fails_to_connect(url, ConnectionFailed, connect_timeout=0.2)
        assert "no answer within 0.2 s" in message


# --- what can't be --------------------------------------------------------------------------------


async def test_no_server():
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        message = await fails_to_connect(f"redis://127.0.0.1:{port}", ConnectionFailed)
        assert f"redis://127.0.0.1:{port}/0" in message


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 80, "\0"])
async def test_wrong_host_name(host):
    assert host in await fails_to_connect(f"redis://{host}:6379", ConnectionFailed)


@pytest.mark.parametrize("given", [("default", "hunter2\udcff"), ("\udcff", "hunter2")])
async def test_credentials_that_can_not_be_sent(redis_url, given):
    user, password = given
    endpoint = replace(endpoint_of(redis_url), username=user, password=password)
    message = await fails_to_connect(endpoint, AuthenticationFailed)
    assert "surrogates" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("name", ["none.sock", "x" * 120])
async def test_wrong_path(tmp_path, name):
    message = await fails_to_connect(f"unix://{tmp_path / name}", ConnectionFailed)
    assert name in message


@pytest.mark.parametrize("setting", ["socket_timeout", "socket_connect_timeout"])
@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "-1", "0", "1e999", "True", "soon"])
def test_a_url_with_a_timeout_that_can_not_be(setting, seconds):
    with pytest.raises(InvalidOption, match=rf"^redis=.*: expected .*{setting}"):
        endpoint_of(f"redis://localhost?{setting}={seconds}")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost:6379", "scheme"),
        ("http://localhost", "scheme"),
        ("", "scheme"),
        ("redis://localhost:sixthousand", "65535"),
        ("redis://localhost:70000", "65535"),
        ("redis://localhost:0", "65535"),
        ("redis://localhost/first", "no number of a database"),
        ("redis://localhost/0/1", "no number of a database"),
        ("redis://localhost?db=first", "db"),
        ("redis://localhost?db=-1", "0 or more"),
        ("redis://localhost?colour=red", "colour"),
        ("redis://localhost?protocol=4", "protocol"),
        ("redis://[::1", "percent-encode"),
        ("unix://", "path"),
        ("rediss://localhost?ssl_ca_certs=/no/such/file", "No such file"),
        ("rediss://localhost?ssl_cert_reqs=maybe", "maybe"),
        ("redis://:hunter2@localhost:x", "65535"),
        ("redis://:hunter2@localhost/first", "no number of a database"),
        ("redis://:hunter2@localhost?colour=red", "colour"),
        ("redis://:hunter2/hunter2@localhost", "percent-encoded"),
        ("redis://:hunter2#hunter2@localhost", "percent-encoded"),
        ("redis://:hunter2?hunter2@localhost", "percent-encoded"),
        ("redis://localhost/x?password=hunter2", "no number of a database"),
        ("unix://:hunter2@", "path"),
        ("redis://:hunter2[hunter2]@localhost", "percent-encode"),
        ("redis://:hunter2\u2100@localhost", "percent-encode"),
    ],
)
def test_bad_url(url, why):
    with pytest.raises(InvalidOption) as raised:
        endpoint_of(url)
    assert why in str(raised.value)
    assert "hunter2" not in f"{raised.value} {raised.value!r} {raised.value.value}"
    assert raised.value.option == "redis"


def test_what_is_no_server():
    with pytest.raises(InvalidOption, match="int"):
        endpoint_of(6379)


def test_ipv6_addresses_are_shown_as_urls_have_them():
    assert str(endpoint_of("redis://[::1]:6380/1")) == "redis://[::1]:6380/1"


async def test_no_such_database(redis_url):
    message = await fails_to_connect(redis_url.replace("/0", "/999"), ReplyError)
    assert message.startswith("ERR ")
    assert "SELECT" in message


# --- servers that are none, or strange ------------------------------------------------------------


def saying(*replies: bytes) -> Callable[..., Any]:
    """A server that gives these replies to the first commands, and is silent then."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in replies:
            await command(reader)
            writer.write(reply)
        await until_eof(reader)

    return serve


@pytest.mark.parametrize("version", [b"1.2.3", b"0.9.0"])
async def test_the_version_of_another_product_is_not_redis_s(version):
    greeting = GREETING.replace(b"%2", b"%3").replace(b"7.2.0", version)
    greeting += b"$6\r\nserver\r\n$9\r\ndragonfly\r\n"
    async with (
        listening(saying(greeting, b"+PONG\r\n")) as port,
        linked(f"redis://127.0.0.1:{port}") as link,
    ):
        assert await link.execute("PING") == b"PONG"


async def test_resp2_where_unknown_commands_want_a_password_first():
    """Valkey 9 says so of HELLO where that was taken away, though a password came with it."""
    said = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            said.append((await command(reader))[0])
            replies = {b"AUTH": b"+OK\r\n", b"CLIENT": b":7\r\n", b"INFO": b"$-1\r\n"}
            refused = b"-NOAUTH Authentication required.\r\n"
            answer = replies.get(said[-1], b"+PONG\r\n") if b"AUTH" in said else refused
            writer.write(answer)

    async with listening(serve) as port:
        async with linked(f"redis://:s3cret@127.0.0.1:{port}") as link:
            assert await link.execute("PING") == b"PONG"
        assert said[:2] == [b"HELLO", b"AUTH"]
        said.clear()
        message = await fails_to_connect(f"redis://127.0.0.1:{port}", AuthenticationFailed)
    assert "none was given" in message


async def test_server_too_old():
    old = GREETING.replace(b"$5\r\n7.2.0", b"$6\r\n6.0.16")
    async with listening(saying(old)) as port:
        message = await fails_to_connect(f"redis://127.0.0.1:{port}/1", ServerTooOld)
    assert "6.0.16" in message
    assert "6.2" in message


async def test_server_too_old_for_hello():
    info = b"# Server\r\nredis_version:5.0.7\r\nredis_mode:standalone\r\n"
    no_hello = b"-ERR unknown command `HELLO`\r\n"
    replies = (no_hello, b"+OK\r\n", b":7\r\n", b"$%d\r\n%b\r\n" % (len(info), info))
    async with listening(saying(*replies)) as port:
        message = await fails_to_connect(f"redis://127.0.0.1:{port}", ServerTooOld)
    assert "5.0.7" in message


async def test_server_that_loads_its_data():
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    async with listening(saying(loading)) as port, linked(f"redis://127.0.0.1:{port}") as link:
        with pytest.raises(ReplyError) as raised:
            await link.get()
    assert raised.value.code == "LOADING"
    assert raised.value.transient


async def test_no_more_clients(make_server):
    server = make_server()
    with redis.Redis.from_url(server.url, single_connection_client=True) as client:
        client.config_set("maxclients", 1)
        for _ in range(5):  # the refusal may come before or after our first command
            async with linked(server.url) as link:
                with pytest.raises(ConnectionFailed):
                    await link.get()


@pytest.mark.parametrize("at_once", [True, False])
async def test_the_reason_for_no_more_clients_is_told(at_once):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not at_once:
            await command(reader)
        writer.write(b"-ERR max number of clients reached\r\n")
        if at_once:
            await command(reader)
        writer.write_eof()
        await until_eof(reader)

    async with listening(serve) as port:
        message = await fails_to_connect(f"redis://127.0.0.1:{port}", ConnectionFailed)
    assert "max number of clients reached" in message


async def test_server_that_speaks_something_else():
    async with listening(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        message = await fails_to_connect(f"redis://127.0.0.1:{port}", ProtocolError)
    assert f"127.0.0.1:{port}" in message
    assert "HTTP/1.1 400" in message


async def test_plain_text_where_tls_is_spoken():
    async with listening(saying(b"\x15\x03\x03\x00\x02\x02\x28")) as port:
        with pytest.raises((ProtocolError, ConnectionFailed)):
            async with linked(f"redis://127.0.0.1:{port}", connect_timeout=0.5) as link:
                await link.get()


async def test_server_that_hangs_up():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await command(reader)

    async with listening(serve) as port:
        message = await fails_to_connect(f"redis://127.0.0.1:{port}", ConnectionFailed)
    assert f"127.0.0.1:{port}" in message


async def test_server_that_never_answers():
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await until_eof(reader)
        gone.set()

    async with listening(serve) as port:
        url = f"redis://127.0.0.1:{port}?socket_connect_timeout=0.2"
        assert "no answer within 0.2 s" in await fails_to_connect(url, ConnectionFailed)
        await asyncio.wait_for(gone.wait(), 5)


async def test_credential_provider_that_never_answers(redis_url):
    class Silent(Rotating):
        async def get_credentials_async(self) -> tuple[str, str]:
            await asyncio.Event().wait()
            raise AssertionError

    client = redis.asyncio.Redis.from_url(redis_url, credential_provider=Silent())
    message = await fails_to_connect(client, ConnectionFailed, connect_timeout=0.1)
    assert "no answer within 0.1 s" in message


async def test_credential_provider_that_gives_no_password(redis_url):
    class Empty(Rotating):
        async def get_credentials_async(self) -> Any:
            return "user", None

    client = redis.asyncio.Redis.from_url(redis_url, credential_provider=Empty())
    assert "must be str" in await fails_to_connect(client, ConnectionFailed)


# --- many callers on one connection ---------------------------------------------------------------


async def test_each_caller_gets_its_own_reply(redis_url):
    async def caller(link: Connection, name: int) -> None:
        for turn in range(20):
            if (name + turn) % 3:
                assert await link.execute("ECHO", f"{name}-{turn}") == f"{name}-{turn}".encode()
            else:
                packed = b"".join(pack("ECHO", f"{name}-{turn}-{n}") for n in range(5))
                replies = await link.pipeline(packed, 5)
                assert replies == [f"{name}-{turn}-{n}".encode() for n in range(5)]

    async with linked(redis_url) as link:
        await asyncio.gather(*(caller(link, name) for name in range(100)))
        assert await link.pipeline(b"", 0) == []


async def test_pieces_of_one_byte(proxy):
    proxy.piece = 1
    async with linked(proxy.url) as link:
        values = [os.urandom(size) for size in (0, 1, 2, 300)]
        for value in values:
            await link.execute("RPUSH", "list", value)
        assert await link.execute("LRANGE", "list", 0, -1) == values


async def test_errors_are_values_in_a_pipeline(redis_url):
    async with linked(redis_url) as link:
        replies = await link.pipeline(pack("SET", "k", "v") + pack("LPOP", "k") + pack("PING"), 3)
        assert replies[0] == b"OK"
        assert isinstance(replies[1], ReplyError)
        assert replies[1].code == "WRONGTYPE"
        assert replies[2] == b"PONG"
        with pytest.raises(ReplyError, match="WRONGTYPE"):
            raise_first(replies)
        with pytest.raises(ReplyError, match="WRONGTYPE"):
            await link.execute("LPOP", "k")


async def test_push_frames_come_in_between(redis_url, redis_sync):
    heard: list[Any] = []
    link = Connection(endpoint_of(redis_url), on_push=heard.append)
    try:
        await link.execute("CLIENT", "TRACKING", "ON", "BCAST")
        for n in range(50):
            redis_sync.set(f"k{n}", n)
            assert await link.execute("GET", f"k{n}") == b"%d" % n
        await eventually(lambda: len(heard) >= 50)
        assert heard[0] == [b"invalidate", [b"k0"]]
    finally:
        await link.close()


async def test_a_server_that_does_not_read_stops_the_callers():
    """Memory stays bounded: callers wait before they add to what the server does not take."""
    enough = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await command(reader)
        writer.write(GREETING)
        await enough.wait()
        while True:
            await command(reader)
            writer.write(b"+OK\r\n")

    value = bytes(256 * 1024)
    async with listening(serve) as port, linked(f"redis://127.0.0.1:{port}") as link:
        protocol = await link.get()
        protocol._transport.set_write_buffer_limits(high=256 * 1024)
        callers = [asyncio.ensure_future(link.execute("SET", "k", value)) for _ in range(200)]
        await asyncio.sleep(0.3)
        # What the kernel's buffers took does not count.
        assert protocol._transport.get_write_buffer_size() < 4 * len(value)
        assert protocol._out_bytes < 4 * len(value)
        enough.set()
        assert await asyncio.gather(*callers) == [b"OK"] * 200


async def test_a_flood_of_replies_leaves_room_for_others(redis_url):
    """While much is read, other tasks get to run."""
    async with linked(redis_url) as link:
        await link.execute("SET", "large", bytes(1 << 20))
        flood = asyncio.ensure_future(link.pipeline(pack("GET", "large") * 64, 64))
        turns = 0
        while not flood.done():
            turns += 1
            await asyncio.sleep(0)
        assert [len(reply) for reply in await flood] == [1 << 20] * 64
        assert turns >= 16


# --- deadlines and cancellation -------------------------------------------------------------------


async def test_a_stalled_server_misses_the_deadline(proxy):
    async with linked(proxy.url) as link:
        first = await link.get()
        proxy.stall()
        behind = asyncio.ensure_future(link.execute("ECHO", "b"))
        with pytest.raises(DeadlineExceeded):
            await link.execute("ECHO", "a", timeout=0.1)
        with pytest.raises(DeadlineExceeded):
            await behind
        assert not link.alive
        proxy.resume()
        assert await link.execute("ECHO", "c") == b"c"
        assert await link.get() is not first


async def test_the_endpoint_s_timeout_is_the_default(proxy):
    async with linked(f"{proxy.url}?socket_timeout=0.1") as link:
        await link.get()
        proxy.stall()
        with pytest.raises(DeadlineExceeded):
            await link.execute("PING")


async def test_an_application_that_blocks_its_loop_keeps_the_connection(redis_url):
    async with linked(redis_url) as link:
        first = await link.get()
        for size in (1, 4 << 20):
            await link.execute("SET", "k", bytes(size))
            reply = asyncio.ensure_future(link.execute("GET", "k", timeout=0.3))
            await asyncio.sleep(0)  # sent
            time.sleep(1.0)  # noqa: ASYNC251
            assert len(await reply) == size
        # Blocked again and again, all the time that there is.
        reply = asyncio.ensure_future(link.execute("GET", "k", timeout=0.3))
        while not reply.done():
            await asyncio.sleep(0)
            time.sleep(0.4)  # noqa: ASYNC251
        assert len(await reply) == 4 << 20
        assert await link.get() is first


async def test_a_cancelled_caller_disturbs_nobody(proxy):
    async with linked(proxy.url) as link:
        first = await link.get()
        proxy.stall()
        callers = [asyncio.ensure_future(link.execute("ECHO", n)) for n in range(30)]
        await asyncio.sleep(0.02)
        for caller in callers[::3]:
            caller.cancel()
        proxy.resume()
        results = await asyncio.gather(*callers, return_exceptions=True)
        for n, result in enumerate(results):
            if n % 3:
                assert result == b"%d" % n
            else:
                assert isinstance(result, asyncio.CancelledError)
        assert await link.execute("ECHO", "after") == b"after"
        assert await link.get() is first


# --- loss and reconnect ---------------------------------------------------------------------------


@pytest.fixture
async def complaints() -> list[dict[str, Any]]:
    """What the event loop would have logged as nobody else cared for it."""
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    return said


async def test_lost_in_the_middle_of_a_pipeline(complaints):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await command(reader)
        writer.write(GREETING)
        for _ in range(3):
            await command(reader)
        writer.write(b"+1\r\n+2\r\n$10\r\nhal")
        await writer.drain()
        writer.write_eof()
        await until_eof(reader)

    async with listening(serve) as port, linked(f"redis://127.0.0.1:{port}") as link:
        protocol = await link.get()
        # Only the second one is waited for.
        futures = [protocol.send(pack("PING") * n, n, timeout=5) for n in (1, 3, 2)]
        assert await futures[0] == [b"1"]
        with pytest.raises(ConnectionLost):
            await futures[1]
        del futures
        await asyncio.wait_for(asyncio.shield(protocol.closed), 5)
    gc.collect()
    await asyncio.sleep(0)
    assert not complaints


async def test_a_lost_connection_is_opened_anew(redis_url, redis_sync):
    async with linked(redis_url) as link:
        ids = set()
        for _ in range(3):
            ids.add((await link.get()).client_id)
            redis_sync.client_kill_filter(_id=(await link.get()).client_id)
            await eventually(lambda: not link.alive)
            assert await link.execute("PING") == b"PONG"
        assert len(ids) == 3


async def test_nothing_is_sent_twice(proxy, redis_sync):
    async with linked(proxy.url) as link:
        await link.get()
        proxy.mute()
        lost = asyncio.ensure_future(link.execute("INCR", "counter"))
        await eventually(lambda: redis_sync.get("counter") == b"1")
        proxy.cut()
        with pytest.raises(ConnectionLost):
            await lost
        proxy.resume()
        assert await link.execute("INCR", "counter") == 2


async def test_callers_share_one_attempt(proxy):
    async with linked(proxy.url) as link:
        replies = await asyncio.gather(*(link.execute("ECHO", n) for n in range(50)))
        assert replies == [b"%d" % n for n in range(50)]
        assert proxy.connections == 1
        proxy.refusing = True
        proxy.cut()
        await eventually(lambda: not link.alive)
        failed = await asyncio.gather(
            *(link.execute("PING") for _ in range(50)), return_exceptions=True
        )
        assert {type(error) for error in failed} == {ConnectionFailed}
        assert proxy.connections == 2
        proxy.refusing = False
        assert await link.execute("PING") == b"PONG"


async def test_a_cancelled_opener_does_not_take_the_others_along(proxy, complaints):
    async with linked(proxy.url) as link:
        proxy.stall()
        callers = [asyncio.ensure_future(link.execute("ECHO", n)) for n in range(3)]
        await eventually(lambda: proxy.connections)
        callers[0].cancel()
        await asyncio.sleep(0.02)
        proxy.resume()
        assert await asyncio.gather(*callers[1:]) == [b"1", b"2"]
        assert proxy.connections == 1
        # When all have gone there is nobody to open it for.
        proxy.cut()
        await eventually(lambda: not link.alive)
        proxy.stall()
        callers = [asyncio.ensure_future(link.execute("PING")) for _ in range(3)]
        await eventually(lambda: proxy.connections == 2)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        assert all(caller.cancelled() for caller in callers)
        tasks = [t for t in asyncio.all_tasks() if "connection.py" in str(t.get_coro())]
        assert not [t for t in tasks if "_open" in str(t.get_coro())]
        proxy.resume()
        assert await link.execute("PING") == b"PONG"
    assert not complaints


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_moment(redis_url, complaints, turns):
    """Whatever step the opening has come to, it ends, and leaves no connection (see redis_url)."""
    opening = asyncio.ensure_future(connect(endpoint_of(redis_url)))
    for _ in range(turns):
        await asyncio.sleep(0)
    if opening.done():
        (await opening).abort()
        return
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not complaints


# --- closing --------------------------------------------------------------------------------------


async def test_closing_with_commands_in_flight(redis_url, redis_sync, complaints):
    link = Connection(endpoint_of(redis_url))
    protocol = await link.get()
    blocked = asyncio.ensure_future(link.execute("BLPOP", "nothing", 0, timeout=60))
    behind = asyncio.ensure_future(link.execute("PING"))
    await asyncio.sleep(0.02)
    assert protocol.client_id in {int(c["id"]) for c in redis_sync.client_list()}
    await asyncio.gather(link.close(), link.close())
    assert protocol.closed.done()
    for task in (blocked, behind):
        with pytest.raises(ConnectionLost, match="the connection was closed"):
            await task
    await link.close()
    with pytest.raises(ConnectionLost, match="the connection was closed"):
        await link.get()
    await eventually(
        lambda: protocol.client_id not in {int(c["id"]) for c in redis_sync.client_list()}
    )
    assert not complaints


async def test_closing_sends_what_was_given_to_it(redis_url, redis_sync):
    link = Connection(endpoint_of(redis_url))
    protocol = await link.get()
    for _ in range(100):
        protocol.post(pack("INCR", "counter"))
    await link.close()
    await eventually(lambda: redis_sync.get("counter") == b"100")


async def test_closing_while_opening(complaints):
    came, gone = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await command(reader)
        came.set()
        await until_eof(reader)
        gone.set()

    async with listening(serve) as port:
        link = Connection(endpoint_of(f"redis://127.0.0.1:{port}"))
        callers = [asyncio.ensure_future(link.execute("PING")) for _ in range(3)]
        await asyncio.wait_for(came.wait(), 5)
        await asyncio.wait_for(link.close(), 5)
        for caller in callers:
            with pytest.raises(ConnectionLost, match="the connection was closed"):
                await caller
        await asyncio.wait_for(gone.wait(), 5)
    assert not complaints


async def test_closing_before_anything_was_opened(redis_url):
    link = Connection(endpoint_of(redis_url))
    await link.close()
    with pytest.raises(ConnectionLost):
        await link.execute("PING")


async def test_closing_does_not_wait_for_a_server_that_does_not_read():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await command(reader)
        writer.write(GREETING)
        await asyncio.Event().wait()

    async with listening(serve) as port:
        link = Connection(endpoint_of(f"redis://127.0.0.1:{port}"))
        protocol = await link.get()
        stuck = asyncio.ensure_future(link.execute("SET", "k", bytes(32 << 20)))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(link.close(), 10)
        assert protocol.closed.done()
        with pytest.raises(ConnectionLost):
            await stuck


# --- pauses between tries -------------------------------------------------------------------------


def test_backoff_doubles_up_to_its_cap_with_jitter(monkeypatch):
    def pauses(chance: float) -> list[float]:
        monkeypatch.setattr("random.random", lambda: chance)
        backoff = Backoff(0.1, 1.0)
        return [backoff.failed() for _ in range(8)]

    longest, shortest = pauses(1 - 2**-53), pauses(0.0)
    for n, (most, least) in enumerate(zip(longest, shortest, strict=True)):
        assert 0 <= least < most <= min(0.1 * 2**n, 1.0) * (1 + 1e-9)
    assert longest[1] == pytest.approx(2 * longest[0])
    assert longest[-1] == pytest.approx(longest[-2])


def test_backoff_starts_anew_after_a_success(monkeypatch):
    monkeypatch.setattr("random.random", lambda: 0.5)
    backoff = Backoff(0.1, 1.0)
    first = backoff.failed()
    for _ in range(2000):  # no overflow, however long a server is gone
        backoff.failed()
    assert backoff.failures == 2001
    backoff.reset()
    assert (backoff.failures, backoff.failed()) == (0, first)
