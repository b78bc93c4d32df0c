# Leases of owned streams: since when they are held, until when, and listed without Python code.
#
# All times are seconds on the clock of `time.monotonic()`.

def extend(list entries not None, list outcomes not None, double deadline):
    """The locks of these entries whose outcome is 1 were renewed: their leases end at `deadline`.

    `outcomes` are those of `Locks.renew_each`, one an entry.
    """
    cdef Entry entry
    cdef Py_ssize_t i
    if len(entries) != len(outcomes):
        raise ValueError(f"{len(outcomes)} outcomes of renewing {len(entries)} locks")
    for i in range(len(entries)):
        entry = <Entry?>_at(entries, i)
        if _at(outcomes, i) == 1:
            entry.lease_deadline = deadline


def holds(Entry head, str token, double now):
    """Whether the application may work on the stream of this first entry, at `now`.

    `token`: only under this LBS id; None: under whichever.
    """
    cdef Entry entry
    if head is None or not head.delivered or head.finishing or head.ended:
        return False
    if token is None or head._id_text() == token:
        return now < head.lease_deadline
    if head.again is not None:
        for other in head.again:
            entry = <Entry?>other
            if entry._id_text() == token:
                return now < entry.lease_deadline
    return False


cdef inline bint _ends_before(Entry head, double deadline) except -1:
    cdef Entry entry
    if head.lease_deadline < deadline:
        return True
    if head.again is not None:
        for other in head.again:
            entry = <Entry?>other
            if entry.lease_deadline < deadline:
                return True
    return False


def ending_before(list heads not None, double deadline):
    """Those of these owned streams, by their first entries, of which a lease ends before this.

    Streams that are being finished or handed over are left out.
    """
    cdef Entry head
    cdef list found = []
    for item in heads:
        head = <Entry?>item
        if not head.finishing and _ends_before(head, deadline):
            found.append(head)
    return found


@cython.final
cdef class OwnedStreams:
    """Iterates over what is in these tables of owned streams now, `{name: first entry}` each.

    Yields `kind(name, id_in_lbs, since, lease_deadline)`, a `typing.NamedTuple`; a deadline is that
    of the moment. Streams that are being finished or handed over by now are left out.
    """

    cdef list _heads
    cdef type _kind
    cdef Py_ssize_t _next

    def __init__(self, type kind not None, list tables not None):
        cdef Entry head
        cdef dict owned
        cdef list heads = []
        _check_named_tuple(kind, 4)
        for table in tables:
            owned = <dict?>table
            for item in owned.values():
                head = <Entry?>item
                if not head.finishing:
                    heads.append(head)
        self._kind = kind
        self._heads = heads

    def __length_hint__(self):
        return 0 if self._heads is None else max(0, len(self._heads) - self._next)

    def __iter__(self):
        return self

    def __next__(self):
        cdef Entry head
        # Objects, as `SET_ITEM` takes over a reference to the very same one.
        cdef object made, name, token, since, deadline
        if self._heads is None:
            raise TypeError("OwnedStreams.__init__ was not called")
        if self._next >= len(self._heads):
            raise StopIteration
        head = self._heads[self._next]
        self._next += 1
        name, token = head.data_stream_name, head._id_text()
        since, deadline = head.since, head.lease_deadline
        if PY_VERSION_HEX >= 0x030E0000:  # as in `_named_tuple`
            return tuple.__new__(self._kind, (name, token, since, deadline))
        made = PyType_GenericAlloc(self._kind, 4)
        Py_INCREF(name)
        PyTuple_SET_ITEM(made, 0, name)
        Py_INCREF(token)
        PyTuple_SET_ITEM(made, 1, token)
        Py_INCREF(since)
        PyTuple_SET_ITEM(made, 2, since)
        Py_INCREF(deadline)
        PyTuple_SET_ITEM(made, 3, deadline)
        # Text and numbers are part of no cycle: looking for one among 100,000 would take longer.
        PyObject_GC_UnTrack(<PyObject*>made)
        return made
