"""A user's recorder can do no harm."""

from __future__ import annotations

import inspect

import pytest
from helpers import SIGNATURES

from relstream import Recorder
from relstream.recorder import SafeRecorder


def silent(*args, **kwargs):
    raise AssertionError(f"logged: {args}")


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_base_does_nothing_and_methods_may_lack(name):
    arguments = dict.fromkeys(SIGNATURES[name].parameters, 0)
    for recorder in (Recorder(), object(), 3):
        assert getattr(SafeRecorder(recorder, silent), name)(**arguments) is None


@pytest.mark.parametrize("name", SIGNATURES)
def test_all_arguments_are_keywords_for_the_engine_too(name):
    signature = inspect.signature(getattr(SafeRecorder(Recorder(), silent), name))
    assert signature == SIGNATURES[name]
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}


def test_calls_arrive():
    class Mine(Recorder):
        def __init__(self):
            self.seen = []

        def lock_release(self, *, failed, **_):
            self.seen.append(failed)

        def stream_processing_end(self, **arguments):
            self.seen.append(arguments)

    mine = Mine()
    safe = SafeRecorder(mine, silent)
    for failed in (0, 2):
        safe.lock_release(succeeded=1, failed=failed, duration=0.1)
    safe.stream_processing_end(streams=["s"], outcome="done")
    safe.terminated(reason="")
    assert mine.seen == [0, 2, {"streams": ["s"], "outcome": "done"}]


def test_errors_are_logged_once_a_method():
    logged = []

    class Broken:
        calls = 0
        terminated = "no method"

        def lock_release(self, **arguments):
            self.calls += 1
            raise ZeroDivisionError(arguments)

        def keyspace_setup(self):  # takes too few arguments
            raise NotImplementedError

        @property
        def alive_skip(self):
            raise ZeroDivisionError

    def log(text, *args, exc_info):
        assert exc_info
        logged.append(text % args)

    broken = Broken()
    safe = SafeRecorder(broken, log)
    for _ in range(3):
        safe.lock_release(succeeded=1, failed=0, duration=0.1)
        safe.keyspace_setup(success=True)
        safe.alive_skip(count=1)
        safe.terminated(reason="")
    assert broken.calls == 3
    assert [text.split(";")[0].removeprefix("the recorder failed in ") for text in logged] == [
        "lock_release",
        "keyspace_setup",
        "alive_skip",
        "terminated",
    ]


def test_what_is_meant_to_end_the_program_does():
    class Ending(Recorder):
        def keyspace_notification_dropped(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeRecorder(Ending(), silent).keyspace_notification_dropped()


def test_a_mistyped_name_is_an_error_of_ours():
    with pytest.raises(AttributeError):
        SafeRecorder(Recorder(), silent).lock_relase  # noqa: B018
