# Backoff and jitter: when to try again, so that many consumers do not do it at the same moment.

def backoff(int attempt, double initial, double maximum, double chance):
    """The pause before try number `attempt` (0: the first repetition), in the unit of `initial`.

    Doubles with each attempt up to `maximum`; `chance`, uniform in [0, 1), spreads it over the upper
    half of that.
    """
    # A shift further than the integer is wide would be undefined.
    cdef double pause = min(maximum, initial * <double>(<uint64_t>1 << min(max(attempt, 0), 60)))
    return pause * (0.5 + 0.5 * chance)


def jittered(double interval, double fraction, double chance):
    """`interval` made longer by up to `fraction` of itself; `chance` is uniform in [0, 1)."""
    return interval * (1.0 + fraction * chance)
