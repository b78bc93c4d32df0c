# Commands as the bytes a server reads: an array of bulk strings each.

cdef bytes _argument(object value):
    if type(value) is bytes:
        return <bytes>value
    if isinstance(value, str):
        return (<str>value).encode()
    if isinstance(value, int) and not isinstance(value, bool):
        return b"%d" % value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"argument {value!r} of a command: expected bytes, str or int")


cdef inline Py_ssize_t _digits(Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t size = 1
    while n >= 10:
        n //= 10
        size += 1
    return size


cdef inline char* _write_header(char* out, char kind, Py_ssize_t n) noexcept nogil:
    out[0] = kind
    out += 1 + _digits(n)
    _write_before(out, n)
    out[0] = c'\r'
    out[1] = c'\n'
    return out + 2


cdef inline char* _write_bulk(char* out, const char* data, Py_ssize_t size) noexcept nogil:
    out = _write_header(out, c'$', size)
    memcpy(out, data, size)
    out[size] = c'\r'
    out[size + 1] = c'\n'
    return out + size + 2


cdef inline Py_ssize_t _bulk_size(Py_ssize_t size) noexcept nogil:
    return 1 + _digits(size) + 2 + size + 2


def pack(*args):
    """One command. Arguments are bytes, str (sent as UTF-8) or int."""
    cdef Py_ssize_t total = 1 + _digits(len(args)) + 2
    cdef list parts = [_argument(value) for value in args]
    cdef bytes out
    cdef char* at
    for part in parts:
        total += _bulk_size(PyBytes_GET_SIZE(<bytes>part))
        _check_size(total)
    out = PyBytes_FromStringAndSize(NULL, total)
    at = _write_header(PyBytes_AS_STRING(out), c'*', len(parts))
    for part in parts:
        at = _write_bulk(at, PyBytes_AS_STRING(<bytes>part), PyBytes_GET_SIZE(<bytes>part))
    _check_filled(out, at)
    return out


def first_error(list replies not None):
    """The first `ReplyError` among the replies of a pipeline, or None."""
    for reply in replies:
        if type(reply) is ReplyError:
            return reply
    return None


class _Item:
    """Marks where a `Template` puts the item."""

    def __repr__(self):
        return "ITEM"


ITEM = _Item()


cdef class Template:
    """A command that is sent for each of many items: all of them packed into one piece of bytes.

    `Template(b"SET", ITEM, b"value", b"NX").pack(keys)` is one SET a key. ITEM may stand in several
    places.
    """

    cdef list _between  # packed bytes before, between and behind the places of the item

    def __init__(self, *args):
        cdef bytes literal = b"*%d\r\n" % len(args)
        cdef list between = []
        for value in args:
            if value is ITEM:
                between.append(literal)
                literal = b""
            else:
                part = _argument(value)
                literal += b"$%d\r\n%b\r\n" % (len(part), part)
        between.append(literal)
        self._between = between

    def pack(self, list items not None):
        """The command once for each of `items` (bytes)."""
        cdef list between = self._between
        cdef Py_ssize_t places = len(between) - 1  # a TypeError before `__init__`
        cdef Py_ssize_t literals = 0
        cdef Py_ssize_t varying = 0
        cdef Py_ssize_t total, place
        cdef bytes item, literal, out
        cdef char* at
        for literal in between:
            literals += PyBytes_GET_SIZE(literal)
        for item in items:
            if item is None:
                raise TypeError("an item of a Template: expected bytes, got None")
            varying += _bulk_size(PyBytes_GET_SIZE(item))
            _check_size(varying)
        # As floats, as these products are what may overflow.
        if <double>literals * len(items) + <double>varying * places > MOST_BYTES:
            _check_size(MOST_BYTES + 1)
        total = literals * len(items) + varying * places
        out = PyBytes_FromStringAndSize(NULL, total)
        at = PyBytes_AS_STRING(out)
        for item in items:
            for place in range(places + 1):
                literal = <bytes>between[place]
                memcpy(at, PyBytes_AS_STRING(literal), PyBytes_GET_SIZE(literal))
                at += PyBytes_GET_SIZE(literal)
                if place < places:
                    at = _write_bulk(at, PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item))
        _check_filled(out, at)
        return out


def commands(bytes packed not None):
    """The single commands in packed ones, each still packed.

    Raises ValueError for what is no array of bulk strings, or an empty one.
    """
    cdef list found = []
    cdef const char* start = PyBytes_AS_STRING(packed)
    cdef const char* at = start
    cdef const char* end = at + PyBytes_GET_SIZE(packed)
    cdef int64_t arguments, size
    while at < end:
        arguments = _count(&at, end, c'*')
        if arguments <= 0:
            raise ValueError(f"expected a packed command, got {_show(start, end)}")
        while arguments:
            if _bulk(&at, end, &size) == NULL:
                raise ValueError(f"expected a packed argument, got {_show(at, end)}")
            arguments -= 1
        found.append(start[:at - start])
        start = at
    return found
