"""What replies say of the connection that brought them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relstream._core import first_error
from relstream.errors import ReplyError

if TYPE_CHECKING:
    pass


def raise_first(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, if there is no error among them; else raises the first one."""
    error = first_error(replies)
    if error is not None:
        raise error
    return replies


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
