"""Connections to one server: where it is, the handshake, and staying connected.

Addresses, credentials and TLS settings are understood by redis-py, from a URL or from a ready
client, so that they mean here what they mean everywhere else.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import socket
import ssl
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.asyncio.connection import Connection as TCPConnection

from relstream._core import OBJECT, backoff, commands, first_error, pack, scatter
from relstream.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    InvalidOption,
    PermissionDenied,
    ProtocolError,
    RelstreamError,
    ReplyError,
    ServerTooOld,
    UsageError,
)
from relstream.net.dialing import dial
from relstream.net.protocol import RedisProtocol
from relstream.net.secrets import may_be_quoted, scrubbed, shown_client, without_secrets
from relstream.net.tls import TLS

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

OLDEST_SERVER = (6, 2)
DEFAULT_TIMEOUT = 5.0
# Seconds that an orderly close may take: TLS waits for the other side's goodbye.
CLOSE_TIMEOUT = 1.0
# Seconds for which a refusal of the user, or of a right, is waited out: rights may be on their way.
FORBIDDEN_FOR = 60.0
# What keeps idle connections known to the firewalls on their way, and finds out that a server is
# gone, in seconds; as redis-py has it. Not every system knows all of them.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server is and how to get in. Times in seconds."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    """The unix socket; takes the place of `host` and `port`."""
    db: int = 0
    tls: TLS | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    credential_provider: CredentialProvider | None = field(default=None, repr=False)
    client_name: str = "relstream"
    resp3: bool = True
    connect_timeout: float = DEFAULT_TIMEOUT
    """For all of it: name look-up, TCP, TLS, the credential provider, and the handshake."""
    timeout: float = DEFAULT_TIMEOUT
    """For the reply to a command, where the caller does not say another."""

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'redis' if self.tls is None else 'rediss'}://{host}:{self.port}/{self.db}"

    @property
    def user(self) -> str:
        """What ACL calls us; a credential provider keeps that to itself."""
        return self.username or ("default" if self.credential_provider is None else "<user>")

    def named(self, role: str) -> Endpoint:
        """The same, for a connection that CLIENT LIST shows under this role."""
        return replace(self, client_name=f"{self.client_name}:{role}")

    async def credentials(self) -> tuple[str, str] | None:
        """User name and password; None when the server asks for none."""
        if self.credential_provider is not None:
            given = await self.credential_provider.get_credentials_async()
            user, password = given if len(given) == 2 else ("", given[0])
            user = user or "default"
            if not isinstance(user, str) or not isinstance(password, str):
                raise TypeError("user name and password must be str")
            return user, password
        if self.username is None and self.password is None:
            return None
        return self.username or "default", self.password or ""


def endpoint_of(source: str | redis.asyncio.Redis, given: str | None = None) -> Endpoint:
    """Reads an address off a URL (redis://, rediss://, unix://) or a `redis.asyncio.Redis`.

    Raises `InvalidOption` for what is neither, or has settings that can't be; its message shows no
    password. `given`: the URL that it is a part of.
    """
    if isinstance(source, str):
        given = given or source
        shown = without_secrets(given)
        pool = _pool_of_url(source, given)
    elif isinstance(source, redis.asyncio.Redis):
        shown = shown_client(source)
        pool = source.connection_pool
    else:
        raise InvalidOption(
            "redis",
            type(source),
            "a URL (redis://, rediss://, unix://, redis+cluster:// or redis+sentinel://), "
            "or a redis.asyncio client",
        )
    try:
        parsed: AbstractConnection = cast("Any", pool).make_connection()
        tls = TLS(parsed.ssl_context) if isinstance(parsed, SSLConnection) else None
        if tls is not None:
            tls.context()
        db = int(parsed.db or 0)
    # A TypeError is an argument that redis-py does not know; an OSError a file that TLS needs.
    except (TypeError, ValueError, OSError, redis.RedisError) as error:
        why = _quoted(error, given)
        raise InvalidOption("redis", shown, f"settings that redis-py accepts ({why})") from None
    if db < 0:
        raise InvalidOption("redis", shown, "the number of a database, 0 or more")
    settings = pool.connection_kwargs
    for setting in ("socket_timeout", "socket_connect_timeout"):
        seconds = settings.get(setting)
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 < seconds < math.inf):
            raise InvalidOption("redis", shown, f"{setting} above 0 seconds, not {seconds!r}")
    provider = parsed.credential_provider
    return Endpoint(
        host=parsed.host if isinstance(parsed, TCPConnection) else "",
        port=int(parsed.port) if isinstance(parsed, TCPConnection) else 0,
        path=getattr(parsed, "path", None),
        db=db,
        tls=tls,
        username=None if provider else (parsed.username or None),
        password=None if provider else (parsed.password or None),
        credential_provider=provider,
        client_name=settings.get("client_name") or "relstream",
        resp3=int(settings.get("protocol") or 3) != 2,
        connect_timeout=settings.get("socket_connect_timeout") or DEFAULT_TIMEOUT,
        timeout=settings.get("socket_timeout") or DEFAULT_TIMEOUT,
    )


def _quoted(error: Exception, url: str | None) -> str:
    """What redis-py says of a setting, unless that may be the rest of a password."""
    if url is None or may_be_quoted(url):
        return str(error)
    return "not what follows the password: in it, percent-encode all that is special in a URL"


def _pool_of_url(url: str, given: str) -> redis.asyncio.ConnectionPool:
    def wrong(why: str) -> InvalidOption:
        expected = (
            "redis://[[user]:password@]host[:port][/db], rediss://…, unix:///path[?db=n], "
            "redis+cluster://host:port,… or redis+sentinel://host:port,…/name"
        )
        return InvalidOption("redis", without_secrets(given), f"{expected} ({why})")

    try:
        parts = urlsplit(url)
    except ValueError:  # which says what it can't read: part of a password, perhaps
        raise wrong("in user and password, percent-encode all that is special in a URL") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise wrong("its scheme is none of these")
    # What follows would quote parts of a password.
    alone = parts.scheme == "unix" and not parts.netloc  # the path of a socket may contain an @
    if "@" in parts.path + parts.query + parts.fragment and not alone:
        raise wrong("in a user name or password, /, ?, #, @ and % must be percent-encoded")
    if parts.fragment:
        raise wrong("nothing may follow a #")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise wrong("the port must be a number from 1 to 65535")
    # redis-py would take the database of a path that is no number for 0.
    if parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path):
        raise wrong(f"{parts.path[1:]!r} is no number of a database")
    if parts.scheme == "unix" and ":" in parts.netloc and "@" not in parts.netloc:
        raise wrong("in a user name or password, /, ?, #, @ and % must be percent-encoded")
    if parts.scheme == "unix" and not parts.path:
        raise wrong("there is no path of a socket")
    try:
        return redis.asyncio.ConnectionPool.from_url(url)
    except ValueError as error:
        raise wrong(_quoted(error, given)) from None


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


def consume_exception(future: asyncio.Future[Any]) -> None:
    """Leaves no error unseen of what nobody waits for any more; a callback for it."""
    if not future.cancelled():
        future.exception()


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


def raise_first(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, if there is no error among them; else raises the first one."""
    error = first_error(replies)
    if error is not None:
        raise error
    return replies


def is_retriable(error: RelstreamError) -> bool:
    """Whether a master that is being replaced would explain this error."""
    if isinstance(error, ReplyError):
        return error.transient or error.code in ("MOVED", "ASK")
    return isinstance(error, ConnectionFailed)


def is_forbidden(error: RelstreamError) -> bool:
    """Whether the server refuses a right that the user lacks.

    That may heal, where rights are being changed or a server has not loaded them yet. A user who is
    refused, and was not before, waits for a new password, as for the end of an outage.
    """
    if isinstance(error, ReplyError):
        return error.code == "NOPERM"
    return isinstance(error, PermissionDenied)


def useless(reply: object) -> bool:
    """Whether another connection is needed for what was asked, and was not done.

    It leads to a server that is no master any more, or is signed in no more.
    """
    return leads_elsewhere(reply) or (isinstance(reply, ReplyError) and reply.code == "NOAUTH")


def leads_elsewhere(reply: object) -> bool:
    """Whether a server says that it is no master, or no more.

    Redis ends blocked commands by UNBLOCKED when it becomes a replica, as CLIENT UNBLOCK does, too:
    in other words.
    """
    return isinstance(reply, ReplyError) and (
        reply.code == "READONLY"
        or (reply.code == "UNBLOCKED" and "instance state changed" in reply.message)
    )


def _run_id(info: object) -> bytes | None:
    found = re.search(rb"run_id:(\w+)", info) if isinstance(info, bytes) else None
    return found[1] if found else None


class _Attempt:
    """An opening of a connection, and how many callers wait for it."""

    __slots__ = ("callers", "task")

    def __init__(self, task: asyncio.Task[RedisProtocol]) -> None:
        self.task = task
        self.callers = 0


class MovingMaster(Protocol):
    """Knows where a master is that may be replaced."""

    def join(self, link: Connection) -> None: ...
    async def refresh_if_stale(self) -> None: ...
    async def locate(self) -> tuple[str, int]: ...
    def found(self, address: tuple[str, int], run_id: bytes | None) -> None: ...


class SharedAddress:
    """The links of one event loop to one address, behind which another server may come to be.

    What one of them learns of that holds for all: who only reads would never be told.
    """

    def __init__(self) -> None:
        self._links: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.replaced = asyncio.Event()
        """Set when the server was no master any more; whoever waits for that clears it."""

    def join(self, link: Connection) -> None:
        """This one is to leave a server that is no master any more."""
        self._links.add(link)

    def leave(self) -> None:
        """The server is no master any more."""
        self.replaced.set()
        for link in list(self._links):
            link.reopen(ConnectionLost(f"{link.endpoint} is no master any more"))


class Connection:
    """A connection to one server that is opened anew when it was lost.

    It is opened by whoever needs it; nothing runs in between. Callers who come while it is being
    opened share the attempt, and its error.

    A server that says READONLY is no master any more: the connection is closed, the name resolved
    anew, and what the server has refused is sent once more. With `master` each opening asks where
    the master is; links that share an `address` leave it together.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        on_push: Callable[[Any], None] | None = None,
        master: MovingMaster | None = None,
        address: SharedAddress | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._on_push = on_push
        self._master = master
        if master is not None:
            master.join(self)
        self._address = address
        if address is not None:
            address.join(self)
        self._protocol: RedisProtocol | None = None
        self._attempt: _Attempt | None = None
        self._process: int | None = None
        self._closed = False
        self.attempted = False
        """Whether it was opened before, or could not be."""
        self._generation = 0

    @property
    def alive(self) -> bool:
        """Whether the connection is open as far as anybody knows."""
        return self._protocol is not None and self._protocol.alive

    @property
    def generation(self) -> int:
        """How often it was opened: what was learnt before the last time may be true no more."""
        return self._generation

    @property
    def waiting(self) -> list[tuple[Endpoint, RedisProtocol]]:
        """The connection and its server, if replies are outstanding."""
        protocol = self._protocol
        if protocol is None or not protocol.alive or protocol.last is None:
            return []
        return [(self.endpoint, protocol)]

    async def get(self, patience: float | None = None) -> RedisProtocol:
        """The living connection; opens one if need be, and raises as `connect` does.

        Waits for that `patience` seconds at most, if given; the attempt goes on. Raises
        `ConnectionLost` after `close`.
        """
        while True:
            protocol = self._protocol
            if protocol is not None and protocol.alive:
                return protocol
            if self._closed:
                raise ConnectionLost("the connection was closed")
            attempt = self._attempt
            if attempt is None:
                attempt = self._attempt = _Attempt(asyncio.ensure_future(self._open()))
                attempt.task.add_done_callback(consume_exception)
            attempt.callers += 1
            try:
                if not (await asyncio.wait({attempt.task}, timeout=patience))[0]:
                    raise ConnectionFailed(f"{self.endpoint} does not answer")
            except asyncio.CancelledError:
                if attempt.callers == 1:  # nobody else waits
                    if attempt is self._attempt:
                        self._attempt = None
                    await _cancel(attempt.task)
                raise
            finally:
                attempt.callers -= 1
            if not attempt.task.cancelled():  # else by `close`, or by `disconnect_unless`
                return attempt.task.result()

    async def _open(self) -> RedisProtocol:
        try:
            if self._process not in (None, os.getpid()):
                raise UsageError(f"{self.endpoint} was opened by process {self._process}")
            self._process = os.getpid()
            master = self._master
            if master is not None:
                host, port = await master.locate()
                self.endpoint = replace(self.endpoint, host=host, port=port)
            protocol = await connect(self.endpoint, self._on_push)
            if master is not None:
                try:
                    run_id = await self._check_master(protocol)
                except BaseException:  # cancelled, say
                    protocol.abort()
                    raise
                master.found((host, port), run_id)
            self._protocol = protocol
            self._generation += 1
            return protocol
        finally:
            self.attempted = True
            if self._attempt is not None and self._attempt.task is asyncio.current_task():
                self._attempt = None

    def disconnect_unless(self, address: tuple[str, int]) -> None:
        """The master is there now: a connection to another server is of no use any more."""
        if (self.endpoint.host, self.endpoint.port) == address:
            return
        self.reopen(ConnectionLost(f"{self.endpoint} is no master any more"))

    def reopen(self, error: ConnectionLost) -> None:
        """Gives the connection up: callers that wait for replies get `error`, others a new one."""
        if self._protocol is not None:
            self._protocol.abort(error)
        if self._attempt is not None:
            self._attempt.task.cancel()
            self._attempt = None

    async def _check_master(self, protocol: RedisProtocol) -> bytes | None:
        """A Sentinel may name a master of yesterday: it has to say itself that it is one (ROLE).

        Returns its `run_id`.
        """
        role, info = await protocol.send(
            pack(b"ROLE") + pack(b"INFO", b"server"), 2, timeout=self.endpoint.timeout
        )
        if isinstance(role, list) and role[0] != b"master":
            raise ConnectionFailed(f"{self.endpoint} is no master yet, or no more")
        return _run_id(info)

    async def run_id(self) -> bytes | None:
        """What tells the server from any other, and from itself before a restart (INFO).

        None where it does not say.
        """
        return _run_id((await self.pipeline(pack(b"INFO", b"server"), 1))[0])

    async def pipeline(
        self,
        packed: bytes,
        replies: int,
        *,
        decode: int = OBJECT,
        timeout: float | None = None,
        patience: float | None = None,
    ) -> list[Any]:
        """Sends packed commands and returns their replies, errors among them as values.

        `timeout` (seconds) is for the last reply, from when the commands are sent: before that, a
        connection may have to be opened, for which `patience` is as in `get`, or what was sent
        earlier to be read by the server. Raises what `get` and `RedisProtocol.send` raise. Nothing
        is ever sent twice but what a server refused that is no master any more.
        """
        if not replies:
            return []
        if self._master is not None and self.alive:
            await self._master.refresh_if_stale()
        protocol = self._protocol
        if protocol is None or not protocol.alive:
            protocol = await self.get(patience)
        await protocol.drain()
        received = await protocol.send(
            packed, replies, decode=decode, timeout=timeout or self.endpoint.timeout
        )
        if first_error(received) is not None:
            await self._send_elsewhere(protocol, packed, received, decode, timeout, patience)
        return received

    async def _send_elsewhere(
        self,
        protocol: RedisProtocol,
        packed: bytes,
        received: list[Any],
        decode: int,
        timeout: float | None,
        patience: float | None,
    ) -> None:
        """Sends what this connection can't be used for over another one, once."""
        places = [place for place, reply in enumerate(received) if useless(reply)]
        if not places:
            return
        self._leave(protocol, received[places[0]])
        try:
            another = await self.get(patience)
        except RelstreamError:  # the replies say that nothing was done
            return
        parts = commands(packed)
        again = await another.send(
            b"".join([parts[place] for place in places]),
            len(places),
            decode=decode,
            timeout=timeout or self.endpoint.timeout,
        )
        scatter(received, places, again)
        if any(map(useless, again)):  # the name leads there still: others need not leave once more
            another.abort(ConnectionLost(f"{self.endpoint} is no master"))

    def _leave(self, protocol: RedisProtocol, why: ReplyError) -> None:
        """Nobody uses this connection any more; unless that is so already."""
        if protocol is not self._protocol or not protocol.alive:
            return
        if not leads_elsewhere(why):
            protocol.abort(ConnectionLost(f"{self.endpoint}: {why}"))
            return
        if self._address is not None:
            self._address.leave()
        protocol.abort(ConnectionLost(f"{self.endpoint} is no master any more"))

    def send(
        self, packed: bytes, replies: int, *, decode: int = OBJECT, timeout: float | None = None
    ) -> asyncio.Future[list[Any]] | None:
        """Sends at once, and returns the future of what `pipeline` would, which costs no task.

        None where something has to be waited for: a connection, or the server to read on.
        """
        protocol = self._protocol
        if protocol is None or not protocol.alive or not protocol.has_room or self._master:
            return None
        return protocol.send(
            packed, replies, decode=decode, timeout=timeout or self.endpoint.timeout
        )

    async def execute(
        self, *args: bytes | str | int, decode: int = OBJECT, timeout: float | None = None
    ) -> Any:
        """Sends one command and returns its reply; raises an error reply, else as `pipeline`."""
        replies = await self.pipeline(pack(*args), 1, decode=decode, timeout=timeout)
        return raise_first(replies)[0]

    async def close(self) -> None:
        """Closes the connection, waits until it is closed, and opens none any more.

        Whoever waits for it gets `ConnectionLost`.
        """
        self._closed = True
        if self._attempt is not None:
            await _cancel(self._attempt.task)
        protocol = self._protocol
        if protocol is None or protocol.closed.done():
            return
        protocol.close()
        try:
            await asyncio.wait({protocol.closed}, timeout=CLOSE_TIMEOUT)
        finally:
            if not protocol.closed.done():
                protocol.abort()
                await asyncio.wait({protocol.closed})


class Backoff:
    """How long to wait before the next try: doubling, capped, jittered. Times in seconds."""

    def __init__(self, initial: float, maximum: float) -> None:
        self._initial = initial
        self._maximum = maximum
        self._since = 0.0
        self.failures = 0

    def reset(self) -> None:
        """Something worked."""
        self.failures = 0

    def failed(self) -> float:
        """Counts one more failure; returns the pause to make before the next try."""
        if not self.failures:
            self._since = time.monotonic()
        pause = backoff(self.failures, self._initial, self._maximum, random.random())
        self.failures += 1
        return pause

    def exhausted(self, max_retries: int, patience: float = 0.0) -> bool:
        """Whether one more failure is one too many: -1 retries are for ever, 0 none.

        For `patience` seconds from the first failure no number of retries is too many.
        """
        if self.failures < max_retries or max_retries < 0:
            return False
        return not max_retries or time.monotonic() - self._since >= patience


class Forbidden:
    """Bounds the time for which refusals of the user, or of a right, are waited out.

    Counts the pauses after them: what an outage in between takes is no refusal.
    """

    def __init__(self) -> None:
        self._waited = 0.0

    def reset(self) -> None:
        """Something was allowed."""
        self._waited = 0.0

    def exhausted(self, error: RelstreamError) -> bool:
        """Whether this is a refusal, and they have lasted for too long."""
        return is_forbidden(error) and self._waited >= FORBIDDEN_FOR

    def pause(self, error: RelstreamError, seconds: float) -> float:
        """How much of a pause after this error to make, so that it ends in time."""
        if is_forbidden(error):
            seconds = min(seconds, FORBIDDEN_FOR - self._waited)
            self._waited += seconds
        return seconds
