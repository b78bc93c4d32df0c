from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from relstream import _core

# Machines that run tests are often busy: a slow example is no failure.
settings.register_profile("core", deadline=None)
settings.load_profile("core")

# In debug builds only.
live_objects = getattr(_core, "live_objects", None)

passed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    report = yield
    if call.when == "call":
        item.stash[passed] = report.passed
    return report


@pytest.fixture(autouse=True)
def no_object_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """No more objects of the core live after a test than before it."""
    before = live_objects() if live_objects else {}
    yield
    if not before or not request.node.stash.get(passed, False):
        return  # the traceback of a failure keeps what it shows
    request.node.funcargs.clear()  # or what other fixtures made would still be known
    if live_objects() != before:
        gc.collect()
        after = live_objects()
        assert {kind: n - before[kind] for kind, n in after.items() if n > before[kind]} == {}
