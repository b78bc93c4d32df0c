"""Opens a connection and makes it ready for commands: HELLO, AUTH, SELECT, version."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relstream._core import pack
from relstream.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    PermissionDenied,
    ProtocolError,
    RelstreamError,
    ReplyError,
    ServerTooOld,
)
from relstream.net.dialing import dial
from relstream.net.endpoint import Endpoint
from relstream.net.protocol import RedisProtocol
from relstream.net.secrets import scrubbed
from relstream.tasks import consume_exception

if TYPE_CHECKING:
    pass

OLDEST_SERVER = (6, 2)

# Seconds that an orderly close may take: TLS waits for the other side's goodbye.
CLOSE_TIMEOUT = 1.0

# What keeps idle connections known to the firewalls on their way, and finds out that a server is
# gone, in seconds; as redis-py has it. Not every system knows all of them.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


async def connect(
    endpoint: Endpoint, on_push: Callable[[Any], None] | None = None
) -> RedisProtocol:
    """Opens a connection and makes it ready for commands.

    Speaks RESP3 where the server does (HELLO 3), else RESP2. Raises `ConnectionFailed`,
    `AuthenticationFailed`, `ServerTooOld`, `PermissionDenied`, `ProtocolError` when it is no Redis,
    or `ReplyError` when the server says something else, such as LOADING.
    """
    protocol = RedisProtocol(on_push)
    # Not `wait_for`: until Python 3.12 it loses a cancellation that comes together with the result.
    opening = asyncio.ensure_future(_open(protocol, endpoint))
    try:
        await asyncio.wait({opening}, timeout=endpoint.connect_timeout)
        if not opening.done():
            problem = f"no answer within {endpoint.connect_timeout:g} s"
            if endpoint.tls is not None:  # plain Redis takes our hello for half a line
                problem += " (does it speak TLS? redis:// connects without)"
            raise ConnectionFailed(f"can't connect to {endpoint}: {problem}")
        opening.result()
    except BaseException:
        protocol.abort()  # first: whoever is cancelled may be cancelled again while it waits
        await _cancel(opening)
        raise
    return protocol


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Ends a task of ours, and leaves none of its errors unseen."""
    task.cancel()
    await asyncio.wait({task})
    consume_exception(task)


async def _open(protocol: RedisProtocol, endpoint: Endpoint) -> None:
    loop = asyncio.get_running_loop()
    try:
        credentials = await endpoint.credentials()
    except Exception as error:  # noqa: BLE001 - whatever it is
        # Who gives credentials may be out of reach for a while, just as the server may.
        known = getattr(endpoint.credential_provider, "password", None)
        said = scrubbed(repr(error), [known] if isinstance(known, str) else ())
        raise ConnectionFailed(
            f"can't connect to {endpoint}: its credential provider failed: {said}"
        ) from (error if said == repr(error) else None)
    protocol.secrets = credentials[1:] if credentials else ()
    try:
        context = endpoint.tls.context() if endpoint.tls is not None else None
    except (OSError, ValueError) as error:  # one that is being renewed just now, perhaps
        raise ConnectionFailed(
            f"can't connect to {endpoint}: its TLS files can't be read: {error}"
        ) from error
    transport: asyncio.BaseTransport
    try:
        if endpoint.path is not None:
            await loop.create_unix_connection(lambda: protocol, endpoint.path)
        else:
            transport, _ = await loop.create_connection(
                lambda: protocol,
                sock=await dial(endpoint.host, endpoint.port),
                ssl=context,
                server_hostname=endpoint.host if context is not None else None,
            )
            _keep_alive(transport.get_extra_info("socket"))
    # What can't be a host name, or a port, is none either.
    except (OSError, OverflowError, ValueError) as error:
        raise ConnectionFailed(f"can't connect to {endpoint}: {_explained(error)}") from error
    try:
        await _handshake(protocol, endpoint, credentials)
    except UnicodeEncodeError:
        raise AuthenticationFailed(
            f"{endpoint}: user name or password can't be sent as UTF-8, it has lone surrogates"
        ) from None
    except RelstreamError as error:
        problem = error
    else:
        return
    # Not in the handler: what a server says may repeat the password, and would be its context.
    raise _of_handshake(problem, endpoint, protocol.secrets)


def _of_handshake(
    error: RelstreamError, endpoint: Endpoint, secrets: tuple[str, ...]
) -> RelstreamError:
    said = scrubbed(str(error), secrets)
    if isinstance(error, ConnectionLost):
        return ConnectionFailed(f"can't connect to {endpoint}: {said}")
    if isinstance(error, ProtocolError):
        # \x15\x03 starts an alert of TLS.
        hint = ": it speaks TLS, use rediss://" if r"b'\x15\x03" in said else ""
        return ProtocolError(f"{endpoint} does not answer as Redis does ({said}){hint}")
    return type(error)(said)


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _explained(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate was not accepted: {error.verify_message} (ssl_ca_certs "
            "names the file of the CA to trust)"
        )
    if isinstance(error, ssl.SSLError):
        return f"no TLS with this server: {error} (redis:// connects without)"
    return str(error) or type(error).__name__


async def _handshake(
    protocol: RedisProtocol, endpoint: Endpoint, credentials: tuple[str, str] | None
) -> None:
    async def ask(*args: bytes | str | int) -> Any:
        return (await protocol.send(pack(*args), timeout=endpoint.connect_timeout))[0]

    async def require(*args: bytes | str | int) -> Any:
        reply = await ask(*args)
        if isinstance(reply, ReplyError):
            raise _refusal(reply, endpoint, str(args[0]))
        return reply

    # A name takes printable characters without spaces only.
    name = re.sub(r"[^!-~]", "_", endpoint.client_name)
    greeting: Any = None
    if endpoint.resp3:
        auth = ("AUTH", *credentials) if credentials else ()
        greeting = await ask("HELLO", 3, *auth, "SETNAME", name)
        # A server before 6, a proxy without HELLO, or a user who may not say it: RESP2 serves. So
        # it does where HELLO is unknown and unknown commands are answered by NOAUTH (Valkey 9).
        old = ("ERR", "NOPROTO", "NOPERM", *(["NOAUTH"] if credentials else []))
        if isinstance(greeting, ReplyError) and greeting.code not in old:
            raise _refusal(greeting, endpoint, "HELLO")
    if isinstance(greeting, dict):
        # That of another product says nothing of what it can do.
        ours = greeting.get(b"server", b"redis") in (b"redis", b"valkey")
        version = greeting.get(b"version", b"") if ours else b""
        protocol.client_id = greeting.get(b"id", 0)
        protocol.clustered = greeting.get(b"mode") == b"cluster"
    else:
        try:
            if credentials:
                user, password = credentials
                await require("AUTH", *((password,) if user == "default" else (user, password)))
            await ask("CLIENT", "SETNAME", name)  # only a name: never mind a refusal
        except ConnectionLost as error:
            if isinstance(greeting, ReplyError):  # it was no lack of HELLO: no more clients
                raise ConnectionLost(f"{error}, after {str(greeting)!r}") from error
            raise
        client_id = await ask("CLIENT", "ID")
        protocol.client_id = client_id if isinstance(client_id, int) else 0
        info = await ask("INFO", "server")
        if isinstance(info, ReplyError) and info.code != "NOPERM":
            raise _refusal(info, endpoint, "INFO")
        found = re.search(rb"redis_version:(\S+)", info) if isinstance(info, bytes) else None
        version = found[1] if found else b""
        protocol.clustered = isinstance(info, bytes) and b"redis_mode:cluster" in info
    numbers = re.match(rb"(\d+)\.(\d+)", version) if isinstance(version, bytes) else None
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_SERVER:
        raise ServerTooOld(
            f"{endpoint} runs Redis {version.decode()}: relstream needs 6.2 or later, or Valkey"
        )
    if endpoint.db:
        selected = await ask("SELECT", endpoint.db)
        if isinstance(selected, ReplyError):
            what = f"SELECT {endpoint.db}"
            if protocol.clustered:
                what += ", databases of a cluster need Valkey 9 and `cluster-databases` there,"
            raise _refusal(selected, endpoint, what)


def _refusal(reply: ReplyError, endpoint: Endpoint, command: str) -> Exception:
    if reply.code == "NOAUTH":
        if endpoint.password is not None or endpoint.credential_provider is not None:
            return AuthenticationFailed(
                f"{endpoint} asks for a password, though one was given and accepted: {reply} "
                f"({command})"
            )
        return AuthenticationFailed(
            f"{endpoint} asks for a password and none was given: put one into the URL"
        )
    if reply.code == "WRONGPASS" or command == "AUTH":
        return AuthenticationFailed(f"{endpoint} did not accept user name and password: {reply}")
    if reply.code == "NOPERM":
        return PermissionDenied(f"{endpoint}: {reply}")
    return ReplyError(f"{reply.message} ({command} on {endpoint})")
