"""A user's recorder can do no harm."""

from __future__ import annotations

import pytest

from relstream import Recorder
from relstream.recorder import SafeRecorder


def silent(*args, **kwargs):
    raise AssertionError(f"logged: {args}")


METHODS = [name for name in vars(Recorder) if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_the_base_does_nothing_and_methods_may_lack(name):
    arguments = getattr(Recorder, name).__code__.co_argcount - 1
    for recorder in (Recorder(), object(), 3):
        assert getattr(SafeRecorder(recorder, silent), name)(*range(arguments)) is None


def test_calls_arrive():
    class Mine(Recorder):
        def __init__(self):
            self.seen = []

        def lock_release(self, stream, success):
            self.seen.append((stream, success))

    mine = Mine()
    safe = SafeRecorder(mine, silent)
    for success in (True, False):
        safe.lock_release("s", success)
        safe.stream_processing_end("s")
    assert mine.seen == [("s", True), ("s", False)]


def test_errors_are_logged_once_a_method():
    logged = []

    class Broken:
        calls = 0

        def lock_release(self, stream, success):
            self.calls += 1
            raise ZeroDivisionError(stream)

        def keyspace_setup(self):  # takes too few arguments
            raise NotImplementedError

    def log(text, *args, exc_info):
        assert exc_info
        logged.append(text % args)

    broken = Broken()
    safe = SafeRecorder(broken, log)
    for _ in range(3):
        safe.lock_release("s", True)
        safe.keyspace_setup(True)
    assert broken.calls == 3
    assert [text.split(";")[0] for text in logged] == [
        "the recorder failed in lock_release",
        "the recorder failed in keyspace_setup",
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
