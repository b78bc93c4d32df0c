"""Every error that relstream raises, in one hierarchy.

Three families, because a caller answers each differently:

* `UsageError`: the program asked for what can't be: change the program or its settings.
* `ServerError`: Redis answered, and said no: change the server, its rights or its settings.
* `ConnectionFailed`: Redis could not be reached, or the connection broke: trying again may help.

Two stand apart. `ProtocolError`: what arrived is not Redis' protocol, so the connection is closed.
`ClientTerminated`: the consumer died; let the program end, and be started again.
"""

from __future__ import annotations

import re
import reprlib

__all__ = [
    "AlreadyClaimed",
    "AuthenticationFailed",
    "ClientClosed",
    "ClientTerminated",
    "ClusterClientRequired",
    "ClusterNotSettled",
    "ConfigConflict",
    "ConnectionFailed",
    "ConnectionLost",
    "ConsumerIdMissing",
    "DeadlineExceeded",
    "InvalidOption",
    "KeyspaceSetupFailed",
    "PermissionDenied",
    "ProtocolError",
    "RelstreamError",
    "ReplyError",
    "ServerError",
    "ServerTooOld",
    "StreamNotOwned",
    "UsageError",
]


_NOT_NOW = frozenset(
    (
        *("BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF"),
        *("NOREPLICAS", "OOM", "READONLY", "TRYAGAIN"),
        "NOAUTH",  # it may take a moment until it knows a new password
        "NOSCRIPT",  # flushed again after it was loaded
        "FENCED",  # a script of ours: whoever sent it leads no more
    )
)

# How a wrong value is shown: it may be megabytes of Info.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200

# Before Redis 7 an error inside a script arrives wrapped, with its code in the middle.
_WRAPPED = re.compile(r"ERR Error running script .*?@user_script: ?\d+: -([A-Z]+) ", re.DOTALL)
# Inside a script a command that the user may not run is a general error; where the script went on,
# of Redis 6.2 without any code.
_SCRIPT_DENIED = re.compile(
    r"(?:ERR|@user_script: ?\d+:) "
    r"(ACL failure in script|.*The user executing the script can't run )",
    re.DOTALL,
)
# A command that was taken away by `rename-command` is as good as forbidden; so is one that a proxy,
# or a service, does not know or pass on, in words of its own.
_UNSUPPORTED = re.compile(
    r"ERR .*\b(unknown|unsupported|disabled|forbidden|invalid) (command|cmd)\b"
    r"|ERR .*\b(command|cmd)\b.*\b(not|isn't|is not) (supported|allowed|permitted|available)\b"
    r"|ERR '\w+' is not (supported|allowed|permitted)\b",
    re.IGNORECASE | re.DOTALL,
)


class RelstreamError(Exception):
    """The base of all errors of relstream."""


class UsageError(RelstreamError):
    """The program asked for something that can't be."""


class InvalidOption(UsageError, ValueError):
    """A setting has a value outside its bounds. Names the setting, the value and the bound."""

    def __init__(self, option: str, value: object, expected: str) -> None:
        super().__init__(option, value, expected)
        self.option = option
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.option}={_SHORT.repr(self.value)}: expected {self.expected}"


class ConsumerIdMissing(UsageError):
    """Neither `consumer_id` nor POD_NAME nor POD_IP says what this consumer is called."""


class ClusterClientRequired(UsageError):
    """`cluster_mode=OSS` was asked for with a client that is not a `RedisCluster`."""


class StreamNotOwned(UsageError):
    """The data stream is not, or no longer, owned by this consumer; nothing was changed."""

    def __init__(self, data_stream_name: str, detail: str) -> None:
        super().__init__(data_stream_name, detail)
        self.data_stream_name = data_stream_name
        self.detail = detail

    def __str__(self) -> str:
        return f"data stream {self.data_stream_name!r} {self.detail}"


class ClientClosed(UsageError):
    """The client is closed, or was never opened with `init()`."""


class ClientTerminated(RelstreamError):
    """The client ended by a failure. `reason` is that of its last notification.

    Raised when `async with client` is left, so that a program does not end with exit code 0 because
    its consumer died. `__cause__` is the error that ended the client, if there is one.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the client ended by a failure: {self.reason}"


class ServerError(RelstreamError):
    """Redis answered, and said no."""


class ReplyError(ServerError):
    """An error reply, as the server sent it. `code` is its first word: ERR, OOM, NOGROUP, …

    Of an error inside a script `code` is what the command itself would have answered.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = message.split(" ", 1)[0]
        if self.code in ("ERR", "@user_script:"):
            if wrapped := _WRAPPED.match(message):
                self.code = wrapped[1]
            elif _SCRIPT_DENIED.match(message) or _UNSUPPORTED.match(message):
                self.code = "NOPERM"

    @property
    def transient(self) -> bool:
        """Whether it means "not now": the same command may well succeed a little later."""
        return self.code in _NOT_NOW

    @property
    def exhausted(self) -> bool:
        """Whether nothing can be added to a stream any more, as one had the last possible id."""
        return self.code == "ERR" and "exhausted the last possible ID" in self.message

    @property
    def about_keys(self) -> bool:
        """Whether it refuses (NOPERM) a key and not a command: another key may be allowed."""
        return re.search(r"access (at least )?(one of the keys|a key)", self.message) is not None


class AuthenticationFailed(ServerError):
    """The server did not accept the user name and password."""


class PermissionDenied(ServerError):
    """The user lacks a right (ACL) that relstream needs. Names the command and the remedy."""


class ServerTooOld(ServerError):
    """The server is older than Redis 6.2, the first one with what relstream uses."""


class ConfigConflict(ServerError):
    """`notify-keyspace-events` is set to something insufficient, and overriding was not allowed."""


class KeyspaceSetupFailed(ServerError):
    """Expiry events could be set up on no master at all."""


class AlreadyClaimed(ServerError):
    """The stream's lock still lives, or another consumer was first to claim it."""


class ClusterNotSettled(ServerError):
    """The nodes of the cluster do not agree on its slots yet; nothing was changed."""


class ConnectionFailed(RelstreamError):
    """The server could not be reached."""


class ConnectionLost(ConnectionFailed):
    """The connection broke: commands without a reply may or may not have been carried out."""


class DeadlineExceeded(ConnectionLost):
    """No reply came in time; the connection was closed, as its later replies could mislead."""


class ProtocolError(RelstreamError):
    """The server sent bytes that are not Redis' protocol (RESP2 or RESP3), or beyond its limits."""


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
