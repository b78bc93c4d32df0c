"""Names of streams as Go's encoding/json reads them (decode.go, unquoteBytes)."""

from __future__ import annotations

import pytest

from relstream.lbs.go_json import name_for_go


@pytest.mark.parametrize(
    ("announced", "name"),
    [
        (b'{"DataStreamName":"a\xffb"}', "a\ufffdb"),
        (b'{"DataStreamName":"\xe2\x82"}', "\ufffd\ufffd"),  # each byte of a character cut short
        (b'{"DataStreamName":"\xed\xa0\x80"}', "\ufffd" * 3),
        (b'{"DataStreamName":"a\\ud800"}', "a\ufffd"),
        (b'{"DataStreamName":"\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"DataStreamName":"\\ude00\\ud83d"}', "\ufffd\ufffd"),
        (b'{"datastreamNAME":"s","Info":' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "s"),
        (b'{"Info":{"DataStreamName":"not this"},"DataStreamName":"this"}', "this"),
        (b'{"Info":["DataStreamName",":","x"],"DataStreamName":"a\\"\\\\"}', 'a"\\'),
        (b'{"DataStreamName":"first","DataStreamName":"last"}', "last"),
        (b'{"DataStreamName":5}', None),
        (b'{"DataStreamName":""}', None),
        (b'["DataStreamName"]', None),
        (b"no JSON", None),
        (b"", None),
        (b'{"DataStreamName', None),
    ],
)
def test_the_name_as_go_reads_it(announced: bytes, name: str | None) -> None:
    assert name_for_go([b"lbs-input", announced]) == name


def test_an_entry_without_the_field() -> None:
    assert name_for_go([b"other", b"x"]) is None
