"""What is counted: the methods of a recorder (metrics), and the one that does nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["Recorder"]


class Recorder:
    """Receives what happens, for metrics. Override what you need; the rest does nothing.

    All methods are called on the event loop of `StreamClient.init()` and must not block. What they
    raise is ignored; of each method the first failure is logged. Durations are in seconds.
    """

    def lock_acquisition(self, stream: str, success: bool, duration: float) -> None:
        """A lock was asked for; `duration` is that of the whole batch."""

    def lock_extension(self, stream: str, success: bool) -> None:
        """A lock was renewed, or found lost."""

    def lock_release(self, stream: str, success: bool) -> None:
        """A lock was released; no success: it was not ours any more."""

    def stream_processing_start(self, stream: str) -> None:
        """The application was told that it owns the stream."""

    def stream_processing_end(self, stream: str) -> None:
        """The application finished the stream, handed it over, or lost it."""

    def keyspace_notification_received(self, stream: str) -> None:
        """The server told that a lock expired."""

    def keyspace_notification_dropped(self) -> None:
        """The application was not told of an expired lock, because the queue was full."""

    def dlq_routing(self, stream: str | None, reason: str) -> None:
        """An entry went to the dead-letter stream; `stream` is None where no name could be read."""

    def startup_recovery(self, success: bool, count: int, duration: float) -> None:
        """The first scan of this consumer ended; `count` entries were put back."""

    def reconciliation_scan(
        self, requeued: int, alive: int, dead_letters: int, duration: float
    ) -> None:
        """A scan ended: what became of the entries that were idle for long enough."""

    def requeue(self, stream: str, success: bool) -> None:
        """A dead owner's stream was put back; no success: another consumer was first."""

    def alive_skip(self, count: int) -> None:
        """So many streams looked dead, but their locks are held."""

    def ack_add_gap(self, count: int, duration: float) -> None:
        """So many entries were put back in two steps, as scripts are forbidden."""

    def terminated(self, reason: str) -> None:
        """The client ended by itself: `STREAM_TERMINATED` was told."""

    def topology_reset(self, success: bool) -> None:
        """`reset_topology` was called, and did it or not."""

    def keyspace_setup(self, success: bool) -> None:
        """Expiry events were set up on a master, or could not be."""


def is_recorder(value: object) -> bool:
    """Whether it is an object, not a class, with at least one method of `Recorder`."""
    methods = (name for name in vars(Recorder) if not name.startswith("_"))
    return not isinstance(value, type) and any(
        callable(getattr(value, name, None)) for name in methods
    )


class SafeRecorder:
    """Calls a user's recorder: methods it lacks do nothing, and its errors harm nobody.

    Of each method's errors the first is logged: there may be one for every stream.
    """

    def __init__(self, recorder: object, log_failure: Any) -> None:
        self._recorder = recorder
        self._log_failure = log_failure

    def __getattr__(self, name: str) -> Any:
        getattr(Recorder, name)  # a typing mistake of ours must not pass for a method they lack
        method = getattr(self._recorder, name, None)
        failed = False

        def call(*args: object) -> None:
            nonlocal failed
            if method is None:
                return
            try:
                method(*args)
            except Exception:  # noqa: BLE001 - metrics must never stop the engine
                if not failed:
                    failed = True
                    self._log_failure(
                        "the recorder failed in %s; further failures there are not logged",
                        name,
                        exc_info=True,
                    )

        setattr(self, name, call)
        return call
