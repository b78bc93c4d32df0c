"""Where one server is, read from a URL or a client: address, credentials, TLS, timeouts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.asyncio.connection import Connection as TCPConnection

from relstream.errors import InvalidOption
from relstream.net.secrets import may_be_quoted, shown_client, without_secrets
from relstream.net.tls import TLS

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

DEFAULT_TIMEOUT = 5.0
# Maps an address that a node or a Sentinel gave to one that can be reached (NAT).
Remap = Callable[[tuple[str, int]], tuple[str, int]]


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
