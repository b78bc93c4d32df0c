"""Announcements that the reference, which is written in Go, can read and we can't.

Go's encoding/json takes bytes that are not UTF-8, and lone surrogates, for U+FFFD, and nests
deeper. Only the stream's name is of interest: a consumer of the reference may hold its lock.
"""

from __future__ import annotations

import codecs
import json
import re

from relstream.lbs.names import INPUT_FIELD

_NAME = "datastreamname"
# A string, or one character of what JSON has between strings.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^"\s]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("relstream.go", _each_byte)


def name_for_go(pairs: list[bytes]) -> str | None:
    """The name of the stream that an entry announces to the reference; None where it has none.

    `pairs` are field names and values in turn.
    """
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
    value = fields.get(INPUT_FIELD)
    if value is None:
        return None
    name = None
    depth = 0
    key = before = ""
    for token in _TOKEN.findall(value.decode(errors="relstream.go")):
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
        elif depth == 1 and token == ":":
            key = _unquoted(before).casefold()
        elif depth == 1 and before == ":" and key == _NAME and token[0] == '"':
            name = _unquoted(token)
        before = token
    return name or None


def _unquoted(token: str) -> str:
    try:
        text = json.loads(token, strict=False)
    except ValueError:
        return ""
    return _SURROGATE.sub("\ufffd", text) if isinstance(text, str) else ""
