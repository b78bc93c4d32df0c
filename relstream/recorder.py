"""Metrics: the methods of a recorder, and the guard between a user's recorder and the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, Literal, ParamSpec

__all__ = ["Outcome", "Recorder"]

Outcome = Literal["done", "released", "failed", "lost"]
"""How the ownership of a stream ended."""


class Recorder:
    """Receives events for metrics. Override what you need; the other methods do nothing.

    ::

        class Metrics(Recorder):
            def stream_processing_end(self, *, streams, outcome, **_):
                STREAMS_ENDED.labels(outcome).inc(len(streams))

    All arguments are passed by keyword. Later versions may add arguments: end each signature with
    `**_`, which also takes those that you don't need. Later versions may add methods, too. Any
    object with at least one of these methods will do; the class need not be inherited from.

    The methods are called on the event loop of `StreamClient.init()` and must not block. An
    exception that a method raises changes nothing for the client; of each method the first one is
    logged. Where the engine works in batches, a method is called once a batch: `duration` is that
    of the batch, in seconds, and counts that are 0 together are not reported. Locks without a
    reply, as the connection was lost, are not counted; the engine repeats the request.
    """

    def startup_recovery(self, *, success: bool, count: int, duration: float) -> None:
        """This consumer's first scan ended; it requeued `count` entries."""

    def lock_acquisition(self, *, succeeded: int, failed: int, duration: float) -> None:
        """Locks were requested; `failed`: another consumer holds them, or the server refused."""

    def lock_extension(self, *, succeeded: int, failed: int, duration: float) -> None:
        """Locks were renewed; `failed`: they were lost, or the server refused."""

    def lock_release(self, *, succeeded: int, failed: int, duration: float) -> None:
        """Locks were released; `failed`: they had expired, or their master did not answer."""

    def stream_processing_start(self, *, stream: str) -> None:
        """The application took the notification that it owns the stream."""

    def stream_processing_end(self, *, streams: Sequence[str], outcome: Outcome) -> None:
        """The ownership of streams ended of which the application had been notified.

        `"done"`: finished; `"released"`: handed over; `"failed"`: the application reported a
        failure; `"lost"`: another consumer owns them, or will after recovery.
        """

    def keyspace_notification_received(self, *, stream: str) -> None:
        """The server reported an expired lock of the stream."""

    def keyspace_notification_dropped(self) -> None:
        """The queue was full, so the application was not notified of an expired lock."""

    def dlq_routing(self, *, streams: Sequence[str | None], reason: str) -> None:
        """Entries became dead letters; the stream is None where the entry names none."""

    def dead_letters_trimmed(self, *, count: int) -> None:
        """About so many of the oldest dead letters were deleted for others (`dlq_max_len`)."""

    def reconciliation_scan(
        self, *, requeued: int, alive: int, dead_letters: int, vanished: int, duration: float
    ) -> None:
        """A scan ended.

        Of the entries that were idle for `min_idle_time` or longer, so many were requeued, have a
        lock that is held, became dead letters, or had been deleted from the load balancer stream.
        """

    def requeue(self, *, streams: Sequence[str], success: bool) -> None:
        """Dead owners' streams were requeued; not `success`: another consumer was first."""

    def entries_vanished(self, *, count: int) -> None:
        """So many entries of consumers that are gone were acknowledged without being delivered.

        They had been trimmed, or deleted, from the load balancer stream.
        """

    def alive_skip(self, *, count: int) -> None:
        """Recovery examined so many entries and left them alone, as their locks are held."""

    def ack_add_gap(self, *, count: int, duration: float) -> None:
        """Entries were requeued in two steps, as the atomic script could not be used.

        A crash within `duration` would have lost them.
        """

    def topology_reset(self, *, success: bool) -> None:
        """`StreamClient.reset_topology()` ended."""

    def keyspace_setup(self, *, success: bool) -> None:
        """Keyspace notifications were set up on one master, or could not be."""

    def terminated(self, *, reason: str) -> None:
        """The client ended by a failure, and notified the application (`STREAM_TERMINATED`)."""


def is_recorder(value: object) -> bool:
    """Whether it is an object, not a class, with at least one method of `Recorder`."""
    methods = (name for name in vars(Recorder) if not name.startswith("_"))
    return not isinstance(value, type) and any(
        callable(getattr(value, name, None)) for name in methods
    )


_P = ParamSpec("_P")


def _guarded(
    method: Callable[Concatenate[Recorder, _P], None],
) -> Callable[Concatenate[SafeRecorder, _P], None]:
    """Calls the user's method of the same name, with this signature."""
    name = method.__name__

    def call(self: SafeRecorder, /, *args: _P.args, **arguments: _P.kwargs) -> None:
        try:
            users = getattr(self._recorder, name, None)
            if users is not None:
                users(*args, **arguments)
        except Exception:  # noqa: BLE001 - metrics must never stop the engine
            if name not in self._failed:
                self._failed.add(name)
                self._log_failure(
                    "the recorder failed in %s; further failures there are not logged",
                    name,
                    exc_info=True,
                )

    functools.update_wrapper(call, method)
    return call


class SafeRecorder:
    """Calls a user's recorder, which may lack methods, and contains its exceptions."""

    def __init__(self, recorder: object, log_failure: Callable[..., None]) -> None:
        self._recorder = recorder
        self._log_failure = log_failure
        self._failed: set[str] = set()

    startup_recovery = _guarded(Recorder.startup_recovery)
    lock_acquisition = _guarded(Recorder.lock_acquisition)
    lock_extension = _guarded(Recorder.lock_extension)
    lock_release = _guarded(Recorder.lock_release)
    stream_processing_start = _guarded(Recorder.stream_processing_start)
    stream_processing_end = _guarded(Recorder.stream_processing_end)
    keyspace_notification_received = _guarded(Recorder.keyspace_notification_received)
    keyspace_notification_dropped = _guarded(Recorder.keyspace_notification_dropped)
    dlq_routing = _guarded(Recorder.dlq_routing)
    dead_letters_trimmed = _guarded(Recorder.dead_letters_trimmed)
    reconciliation_scan = _guarded(Recorder.reconciliation_scan)
    entries_vanished = _guarded(Recorder.entries_vanished)
    requeue = _guarded(Recorder.requeue)
    alive_skip = _guarded(Recorder.alive_skip)
    ack_add_gap = _guarded(Recorder.ack_add_gap)
    topology_reset = _guarded(Recorder.topology_reset)
    keyspace_setup = _guarded(Recorder.keyspace_setup)
    terminated = _guarded(Recorder.terminated)
