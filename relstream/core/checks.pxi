# What keeps a wrong argument from becoming a wrong place in memory.
#
# Callers hand in lists, and keep them: any code that runs meanwhile (a comparison, a finalizer, a
# callback of the garbage collector) can change them. So places are checked at each access.

# Far more than there can be, and a sum of two of these does not overflow.
cdef Py_ssize_t MOST_BYTES = PY_SSIZE_T_MAX // 4


cdef object _no_place(Py_ssize_t place, list items):
    return ValueError(f"place {place} of a list of {len(items)}")


cdef inline object _at(list items, Py_ssize_t place):
    """What is at this place of a list. Raises ValueError when there is no such place."""
    if not 0 <= place < len(items):
        raise _no_place(place, items)
    return items[place]


cdef int _check_size(Py_ssize_t size) except -1:
    if size > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes in all")
    return 0


cdef inline int _check_filled(bytes out, const char* at) except -1:
    """What was sized first and written then must end where it should."""
    if at != PyBytes_AS_STRING(out) + PyBytes_GET_SIZE(out):
        raise AssertionError(f"{at - PyBytes_AS_STRING(out)} of {len(out)} bytes were written")
    return 0


cdef int _check_named_tuple(type kind, Py_ssize_t size) except -1:
    """Values are set without calling it: it must have room for them."""
    fields = getattr(kind, "_fields", None)
    if not issubclass(kind, tuple) or type(fields) is not tuple or len(fields) != size:
        raise TypeError(f"{kind!r}: expected a typing.NamedTuple of {size} values")
    return 0
