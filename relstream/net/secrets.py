"""Keeps passwords out of what is shown: URLs, clients, and what a server says of our commands."""

from __future__ import annotations

import re
from collections.abc import Iterable

import redis.asyncio

HIDDEN = "***"
# Settings of a URL that hold a secret, however misspelt. What follows one may be the rest of it,
# after a raw "&".
_SECRET = re.compile(r"pas|pw|secret|token|credential|auth", re.IGNORECASE)
# So long a part of a password is hidden: a server may show a password cut, or with escapes in it.
_PART = 6
# So much of what a server says is shown.
_LONGEST = 500


def without_secrets(url: str) -> str:
    """A URL as it may be shown."""
    scheme, found, rest = url.partition("://")
    if not found:
        scheme, rest = "", url
    elif not re.fullmatch(r"[A-Za-z+]*", scheme):
        return HIDDEN
    # Up to the last @: a password that should have been percent-encoded may contain "/" and "@".
    login, at, place = rest.rpartition("@")
    if "?" in login:  # then what follows may be the rest of a password in the query
        return f"{scheme}{found}{HIDDEN}"
    place, mark, query = place.partition("?")
    settings = query.split("&")
    shown = []
    for setting in settings:
        name = setting.partition("=")[0]
        if _SECRET.search(name):
            shown.append(f"{name}={HIDDEN}")
            break
        shown.append(setting)
    return "".join([scheme, found, HIDDEN if at else "", at, place, mark, "&".join(shown)])


def may_be_quoted(url: str) -> bool:
    """Whether an error may quote settings of the query: none of them follows a secret."""
    names = [setting.partition("=")[0] for setting in url.partition("?")[2].split("&")]
    return not any(map(_SECRET.search, names[:-1]))


def shown_client(client: redis.asyncio.Redis) -> str:
    """A ready client as it may be shown."""
    settings = client.connection_pool.connection_kwargs
    where = settings.get("path") or f"{settings.get('host')}:{settings.get('port')}"
    return f"<{type(client).__name__} of {where}>"


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """What somebody says who may know these, without them and without long parts of them."""
    text = text[:_LONGEST]
    for secret in secrets:
        shortest = min(len(secret), _PART)
        parts: list[str] = []
        start = 0
        while secret and start < len(text):
            end = start + shortest
            if end <= len(text) and text[start:end] in secret:
                while end < len(text) and text[start : end + 1] in secret:
                    end += 1
                parts.append(HIDDEN)
                start = end
            else:
                parts.append(text[start])
                start += 1
        text = "".join(parts) if secret else text
    return text
