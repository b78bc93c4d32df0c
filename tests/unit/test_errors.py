"""What errors say, and what they mean."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import relstream
from relstream import (
    ClientTerminated,
    ConnectionFailed,
    InvalidOption,
    ProtocolError,
    RelstreamError,
    ReplyError,
    ServerError,
    StreamNotOwned,
    UsageError,
    errors,
)

ARGUMENTS = {
    InvalidOption: ("queue_size", 0, "a whole number"),
    StreamNotOwned: ("call-1", "is not owned"),
    ReplyError: ("OOM command not allowed",),
}
CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_is_public_in_one_family_and_can_be_copied(kind):
    assert kind.__name__ in errors.__all__
    assert getattr(relstream, kind.__name__) is kind
    families = [UsageError, ServerError, ConnectionFailed, ProtocolError, ClientTerminated]
    assert sum(issubclass(kind, family) for family in families) == (kind is not RelstreamError)
    error = kind(*ARGUMENTS.get(kind, ("what happened",)))
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error)), kind(*error.args)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert twin.__dict__ == error.__dict__


def test_texts():
    assert str(InvalidOption("size", -1, "a number")) == "size=-1: expected a number"
    assert str(StreamNotOwned("a'b", "is lost")) == 'data stream "a\'b" is lost'
    assert len(str(InvalidOption("info", {"k": "x" * 10_000_000}, "something small"))) < 500


# What servers said when they were made to: 6.2, 7.0, and 8.2 or Valkey 8.1 where that differs.
OLD = "ERR Error running script (call to f_e3fdde15d7e0): @user_script:7: @user_script: 7: "
NEW = " script: e3fdde15d7e0, on @user_script:7."
DENIED = "The user executing the script can't run this command or subcommand"
REFUSALS = [
    ("OOM command not allowed when used memory > 'maxmemory'.", "OOM", True),
    ("READONLY You can't write against a read only replica.", "READONLY", True),
    ("NOREPLICAS Not enough good replicas to write.", "NOREPLICAS", True),
    ("MISCONF Redis is configured to save RDB snapshots, but …", "MISCONF", True),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", "WRONGTYPE", False),
]


@pytest.mark.parametrize(
    ("text", "code", "transient"),
    [
        *REFUSALS,
        *((text + NEW, code, transient) for text, code, transient in REFUSALS),
        *((f"{OLD}-{text}", code, transient) for text, code, transient in REFUSALS),
        ("LOADING Redis is loading the dataset in memory", "LOADING", True),
        ("BUSY Redis is busy running a script.", "BUSY", True),
        ("CLUSTERDOWN The cluster is down", "CLUSTERDOWN", True),
        ("MASTERDOWN Connection with MASTER is down", "MASTERDOWN", True),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "TRYAGAIN", True),
        ("NOGROUP No such key 'x' or consumer group 'g'", "NOGROUP", False),
        ("NOPERM this user has no permissions to run the 'get' command", "NOPERM", False),
        (f"{OLD}{DENIED}", "NOPERM", False),
        (f"@user_script: 39: {DENIED}", "NOPERM", False),
        (f"ERR {DENIED}{NEW}", "NOPERM", False),
        (f"ERR ACL failure in script: User u has no permissions to …{NEW}", "NOPERM", False),
        (f"{OLD}Wrong number of args calling Redis command From Lua script", "ERR", False),
        # No data of an application's can make an error look like another one.
        ("ERR unknown subcommand 'x -OOM y'. Try XINFO HELP.", "ERR", False),
        # Taken away by `rename-command`: as good as forbidden.
        ("ERR unknown command 'EVALSHA', with args beginning with: ", "NOPERM", False),
        ("ERR no such key 'ACL failure in script'", "ERR", False),
        ("ERR", "ERR", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_code_and_transience_of_replies(text, code, transient):
    error = ReplyError(text)
    assert (str(error), error.message, error.code, error.transient) == (text, text, code, transient)
