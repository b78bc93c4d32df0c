# The incremental reader of RESP2 and RESP3.
#
# Two passes: the first finds where a reply ends, resuming where the last chunk of bytes stopped; the
# second, over bytes known to be whole and well framed, builds what was asked for. So nothing is
# allocated on a length that a server merely claims, and a stream of entries can be decoded into
# arrays without ever becoming Python objects.

cdef enum:
    MAX_DEPTH = 32
    MAX_LINE = 64 * 1024
    MAX_BULK = 512 * 1024 * 1024
    # Of one reply. Objects take many times the bytes they came in (an error of 3 bytes: 300), so that
    # a bound on the bytes alone would bound no memory.
    MAX_ELEMENTS = 1 << 24
    KEEP_BUFFER = 256 * 1024

OBJECT = 0
STREAMS = 1
ENTRIES = 2
PENDING = 3

cdef enum:
    _OBJECT = 0
    _STREAMS = 1
    _ENTRIES = 2
    _PENDING = 3

# What the first pass says of the bytes so far.
cdef enum:
    _WHOLE
    _MORE
    _NO_TYPE
    _NO_NUMBER
    _NO_NULL
    _BAD_LINE
    _BAD_BULK
    _BAD_END
    _BAD_COUNT
    _BAD_DEPTH

cdef dict _complaints = {
    _NO_TYPE: "no type of reply starts like this",
    _NO_NUMBER: "expected a number",
    _NO_NULL: "expected a null",
    _BAD_LINE: f"a line of over {MAX_LINE} bytes",
    _BAD_BULK: f"expected the length of a string, up to {MAX_BULK}",
    _BAD_END: "a string does not end where it should",
    _BAD_COUNT: f"expected a number of elements, up to {MAX_ELEMENTS} in a reply",
    _BAD_DEPTH: f"a reply nested deeper than {MAX_DEPTH} levels",
}

cdef bytes _OK = b"OK"


class Push(list):
    """An out-of-band message (RESP3 push frame), as a list."""

    __slots__ = ()


cdef inline const char* _line_end(const char* at, const char* end) noexcept nogil:
    """Where the first CR LF at or after `at` starts; NULL when it has not arrived yet."""
    cdef const char* cr = at
    while cr < end:
        cr = <const char*>memchr(cr, c'\r', end - cr)
        if cr == NULL or cr + 1 >= end:
            return NULL
        if cr[1] == c'\n':
            return cr
        cr += 1
    return NULL


cdef inline const char* _number(const char* at, const char* end, uint64_t* out) noexcept nogil:
    """Reads the digits at `at`; behind them, or NULL when there are none or too many for 64 bits."""
    cdef const char* start = at
    cdef uint64_t n = 0
    cdef uint8_t digit
    while at < end:
        digit = <uint8_t>(at[0] - c'0')
        if digit > 9:
            break
        n = n * 10 + digit
        at += 1
    out[0] = n
    # Only 20 digits can overflow, and one that did and starts with 1 is now less than 10**19.
    if at - start < 20:
        return at if at > start else NULL
    if at - start == 20 and (start[0] == c'0' or (start[0] == c'1' and n >= <uint64_t>10**19)):
        return at
    return NULL


cdef inline bint _parse_int(const char* at, const char* end, int64_t* value) noexcept nogil:
    """The decimal number that fills [at, end). False when it is none, or does not fit 64 bits."""
    cdef uint64_t n
    cdef bint negative = at < end and at[0] == c'-'
    if at < end and (at[0] == c'-' or at[0] == c'+'):
        at += 1
    if _number(at, end, &n) != end or at == end or n > <uint64_t>INT64_MAX + negative:
        return False
    value[0] = <int64_t>(0 - n) if negative else <int64_t>n
    return True


cdef str _show(const char* at, const char* end):
    """The start of what arrived, for an error message."""
    return repr(at[:max(0, min(end - at, 40))])


cdef object _wrong(str expected, const char* at, const char* end):
    return ProtocolError(f"expected {expected}, got {_show(at, end)}")


# --- second pass: over bytes that are whole, and whose numbers are numbers --------------------------
#
# It checks its bounds all the same: whoever holds a view that `get_buffer` gave can still write to
# bytes that the first pass has seen. Each function starts at a byte before `end`, or checks that.

cdef inline int64_t _header(const char** at) noexcept nogil:
    """The number in a header line; moves behind the line, which may be beyond the end.

    Stops at what is no digit: at the latest at the NUL behind every bytes and bytearray.
    """
    cdef const char* p = at[0] + 1
    cdef bint negative = p[0] == c'-'
    cdef uint64_t n = 0
    cdef uint8_t digit
    if negative or p[0] == c'+':
        p += 1
    while True:
        digit = <uint8_t>(p[0] - c'0')
        if digit > 9:
            break
        n = n * 10 + digit
        p += 1
    at[0] = p + 2
    return <int64_t>(0 - n) if negative else <int64_t>n


cdef inline int64_t _count(const char** at, const char* end, char kind) noexcept nogil:
    """The number of elements in the next header; -1 when it is a null, -2 when it is not of this
    kind, or announces more elements than there are bytes."""
    cdef int64_t n
    if at[0] >= end:
        return -2
    if at[0][0] == kind:
        n = _header(at)
        return n if n <= end - at[0] else -2
    if at[0][0] == c'_':
        at[0] += 3
        return -1
    return -2


cdef inline const char* _bulk(const char** at, const char* end, int64_t* size) noexcept nogil:
    """The bulk string that comes next; moves behind it. NULL when there is none, or not all of it."""
    cdef const char* text
    size[0] = -1
    if at[0] >= end or at[0][0] != c'$':
        return NULL
    size[0] = _header(at)
    text = at[0]
    if size[0] < 0 or size[0] > end - text - 2:
        return NULL
    at[0] = text + size[0] + 2
    return text


cdef inline bint _integer(const char** at, const char* end, int64_t* value) noexcept nogil:
    """Reads an integer, and moves behind it. False when the next element is something else."""
    if at[0] >= end or at[0][0] != c':':
        return False
    value[0] = _header(at)
    return at[0] <= end


cdef object _reply_error(const char* at, Py_ssize_t size):
    return ReplyError(PyUnicode_DecodeUTF8(at, size, "replace"))


cdef object _hashable(object key):
    """RESP3 allows any type as a key of a map; what Python can't hash becomes a tuple."""
    if isinstance(key, list):
        return tuple([_hashable(item) for item in key])
    if isinstance(key, dict):
        return tuple([(_hashable(k), _hashable(v)) for k, v in key.items()])
    return key


cdef int _beyond(const char* at, const char* end) except -1:
    """The first pass saw less than the second would read: nothing of it may be shown."""
    raise ProtocolError(f"malformed reply: {_show(at, end)}")


cdef int _skip(const char** at, const char* end) except -1:
    """Moves behind the next element, whatever it is."""
    cdef const char* p
    cdef int64_t missing = 1
    cdef int64_t n
    cdef char kind
    while missing:
        p = at[0]
        if p >= end:
            _beyond(p, end)
        kind = p[0]
        missing -= 1
        if kind == c'$' or kind == c'=' or kind == c'!':
            n = _header(at)
            if n > end - at[0] - 2:
                _beyond(p, end)
            if n >= 0:
                at[0] += n + 2
        elif kind == c'*' or kind == c'~' or kind == c'>' or kind == c'%' or kind == c'|':
            n = _header(at)
            if n > end - at[0]:
                _beyond(p, end)
            if kind == c'%' or kind == c'|':
                n *= 2
            missing += max(n, 0)
            if kind == c'|':
                missing += 1
        else:
            p = _line_end(p + 1, end)
            if p == NULL:
                _beyond(at[0], end)
            at[0] = p + 2
    return 0


cdef object _build(const char** at, const char* end, int depth):
    """The next reply as Python objects, of up to `depth` levels; moves `at` behind it.

    Checks its own bounds: should the two passes disagree, nothing beyond `end` is read.
    """
    cdef const char* p = at[0]
    cdef const char* cr
    cdef char kind
    cdef int64_t n
    cdef Py_ssize_t i
    cdef list items
    cdef dict mapping
    if p >= end:
        _beyond(p, end)
    kind = p[0]
    while kind == c'|':  # attributes are about the reply that follows; nobody asked for them
        n = _header(at)
        if n > end - at[0]:
            _beyond(p, end)
        for i in range(2 * n):
            _skip(at, end)
        p = at[0]
        if p >= end:
            _beyond(p, end)
        kind = p[0]
    if kind == c'$':
        n = _header(at)
        if n < 0:
            return None
        if n > end - at[0] - 2:
            _beyond(p, end)
        p = at[0]
        at[0] = p + n + 2
        return PyBytes_FromStringAndSize(p, n)
    if kind == c'*' or kind == c'~' or kind == c'>':
        n = _header(at)
        if n < 0:
            return None
        if n > end - at[0] or depth == 1:
            _beyond(p, end)
        items = [_build(at, end, depth - 1) for i in range(n)]
        return Push(items) if kind == c'>' else items
    if kind == c'+':
        if end - p >= 5 and memcmp(p + 1, b"OK\r\n", 4) == 0:
            at[0] = p + 5
            return _OK
        cr = _line_end(p + 1, end)
        if cr == NULL:
            _beyond(p, end)
        at[0] = cr + 2
        return PyBytes_FromStringAndSize(p + 1, cr - p - 1)
    if kind == c':':
        n = _header(at)
        if at[0] > end:
            _beyond(p, end)
        return n
    if kind == c'%':
        n = _header(at)
        if n > end - at[0] or depth == 1:
            _beyond(p, end)
        mapping = {}
        for i in range(n):
            name = _hashable(_build(at, end, depth - 1))
            mapping[name] = _build(at, end, depth - 1)
        return mapping
    if kind == c'=' or kind == c'!':
        n = _header(at)
        if n < 0 or n > end - at[0] - 2:
            _beyond(p, end)
        p = at[0]
        at[0] = p + n + 2
        if kind == c'!':
            return _reply_error(p, n)
        if n < 4 or p[3] != c':':
            raise ProtocolError(f"verbatim text without its format: {_show(p, end)}")
        return PyBytes_FromStringAndSize(p + 4, n - 4)

    # What is left is a line.
    cr = _line_end(p + 1, end)
    if cr == NULL:
        _beyond(p, end)
    at[0] = cr + 2
    if kind == c'_' and cr == p + 1:
        return None
    if kind == c'-':
        return _reply_error(p + 1, cr - p - 1)
    if kind == c'#' and cr == p + 2 and (p[1] == c't' or p[1] == c'f'):
        return p[1] == c't'
    try:
        if kind == c',':
            return float(p[1:cr - p])
        if kind == c'(':
            return int(p[1:cr - p])
    except ValueError:
        pass
    raise ProtocolError(f"malformed reply: {_show(p, end)}")


@cython.no_gc_clear  # or the buffer could be gone while somebody still uses the Reader
cdef class Reader:
    """Cuts what a server sends into replies (RESP2 and RESP3, see the Redis serialization protocol).

    Bytes come in with `feed`, or without a copy through `get_buffer` and `advance`; replies go out
    with `fill`. Error replies are values (`ReplyError`). Bytes that are no Redis protocol, or go beyond
    the limits (512 MB a string, `max_reply` bytes and 16 M elements a reply, 32 levels, 64 KB a line),
    raise `ProtocolError`, now and at every later call: where the next reply starts is unknown.
    """

    # The buffer is a bytearray, and is replaced, never resized: a view handed out stays good to
    # write into whatever happens here, and `_view` keeps others from resizing it.
    cdef object _view
    cdef char* _buf
    cdef Py_ssize_t _cap
    cdef Py_ssize_t _start      # the first byte of the reply being read
    cdef Py_ssize_t _scan       # up to where the first pass has come
    cdef Py_ssize_t _end        # behind the last byte received
    cdef Py_ssize_t _lent       # bytes of the view that get_buffer gave, until advance
    cdef Py_ssize_t _max_reply
    cdef int64_t _elements      # announced by the aggregates of the reply being read
    cdef int _depth             # of aggregates open at _scan; -1 between replies
    cdef int64_t _open[MAX_DEPTH]  # elements still missing in each
    cdef bint _busy
    cdef object _broken
    cdef readonly list pushes

    def __cinit__(self, Py_ssize_t max_reply=1 << 30):
        self._take_buffer(KEEP_BUFFER)
        self._max_reply = max_reply
        self._depth = -1
        self.pushes = []

    @property
    def buffered(self):
        """How many bytes wait for the rest of their reply."""
        return self._end - self._start

    cdef int _begin(self) except -1:
        """Makes the Reader busy: making any object may run the garbage collector, and that any code."""
        if self._busy:
            raise ValueError("the Reader is used in the middle of another call")
        if self._broken is not None:
            raise ProtocolError(self._broken)
        self._busy = True
        return 0

    cdef int _take_buffer(self, Py_ssize_t cap) except -1:
        """Moves what is buffered to the start of a new buffer."""
        cdef bytearray store = PyByteArray_FromStringAndSize(NULL, cap)
        cdef char* buf = PyByteArray_AS_STRING(store)
        cdef object view = PyMemoryView_FromObject(store)
        if self._end > self._start:
            memcpy(buf, self._buf + self._start, self._end - self._start)
        self._view = view
        self._buf = buf
        self._cap = cap
        return 0

    cdef int _reserve(self, Py_ssize_t size) except -1:
        """Makes room for `size` more bytes behind the last one."""
        cdef Py_ssize_t used = self._end - self._start
        cdef bint oversized = self._cap > 4 * KEEP_BUFFER and used + size <= KEEP_BUFFER
        if used and not oversized and self._cap - self._end >= size:
            return 0
        if oversized:  # one huge reply must not hold its memory for ever
            self._take_buffer(KEEP_BUFFER)
        elif used + size > self._cap:
            self._take_buffer(max(2 * self._cap, used + size))
        else:
            memmove(self._buf, self._buf + self._start, used)
        self._scan -= self._start
        self._end = used
        self._start = 0
        return 0

    def get_buffer(self, Py_ssize_t size=-1):
        """A writable view for the next bytes, for `asyncio.BufferedProtocol`. Good until `advance`."""
        self._begin()
        try:
            self._reserve(KEEP_BUFFER // 2)
            self._lent = self._cap - self._end
            return self._view[self._end:]
        finally:
            self._busy = False

    def advance(self, Py_ssize_t size):
        """`size` bytes were written into the view that `get_buffer` gave."""
        self._begin()
        self._busy = False  # there is no middle of this
        if not 0 <= size <= self._lent:
            raise ValueError(f"advance({size}): expected 0 to {self._lent} bytes")
        self._end += size
        self._lent = 0

    def feed(self, data not None):
        """Takes in a copy of `data`. A view that `get_buffer` gave is void from then on."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._begin()
            try:
                self._reserve(view.len)
                memcpy(self._buf + self._end, view.buf, view.len)
                self._end += view.len
                self._lent = 0
            finally:
                self._busy = False
        finally:
            PyBuffer_Release(&view)

    def fill(self, list out not None, Py_ssize_t count, int decode=_OBJECT):
        """Appends up to `count` whole replies to `out`; returns how many there were.

        `decode` says what each becomes: `OBJECT` (plain Python), `STREAMS` (XREADGROUP: a list of
        `Batch`), `ENTRIES` (XRANGE: a `Batch`), `PENDING` (XPENDING with a range: a `PendingPage`).
        Push frames met on the way are appended to `pushes`, also when `count` is 0.
        """
        cdef Py_ssize_t got = 0
        cdef const char* at
        cdef char kind
        if not _OBJECT <= decode <= _PENDING:
            raise ValueError(f"decode={decode}: expected OBJECT, STREAMS, ENTRIES or PENDING")
        self._begin()
        try:
            while self._end > self._start:
                at = self._buf + self._start
                kind = at[0]
                if got >= count and kind != c'>' and kind != c'|':
                    break
                if decode == _OBJECT and self._depth < 0:
                    # Most replies to pipelined commands are one of these two.
                    if kind == c'+' and self._end - self._start >= 5 and memcmp(at, b"+OK\r\n", 5) == 0:
                        out.append(_OK)
                        self._start += 5
                        got += 1
                        continue
                    if (
                        kind == c':' and self._end - self._start >= 4
                        and at[2] == c'\r' and at[3] == c'\n' and c'0' <= at[1] <= c'9'
                    ):
                        out.append(at[1] - c'0')
                        self._start += 4
                        got += 1
                        continue
                if not self._whole():
                    break
                if kind == c'>':
                    frame = _build(&at, self._buf + self._scan, MAX_DEPTH)
                    self.pushes.append(frame)
                elif kind != c'|':  # attributes are about the reply that follows; nobody asked for them
                    out.append(_decode(&at, self._buf + self._scan, decode))
                    got += 1
                self._start = self._scan
                self._depth = -1
        except ProtocolError as error:
            self._broken = str(error)
            raise
        finally:
            self._busy = False
            if self._depth < 0:
                self._scan = self._start
        return got

    def take_pushes(self):
        """The push frames met so far; they are the caller's from now on."""
        taken = self.pushes
        self.pushes = []
        return taken

    cdef bint _whole(self) except -1:
        """Is the reply at `_start` all there?"""
        cdef int verdict = self._walk()
        cdef const char* at = self._buf + self._scan
        if verdict > _MORE:
            raise ProtocolError(f"{_complaints[verdict]}: {_show(at, self._buf + self._end)}")
        if (self._end if verdict == _MORE else self._scan) - self._start > self._max_reply:
            raise ProtocolError(f"a reply of over {self._max_reply} bytes")
        return verdict == _WHOLE

    @cython.nonecheck(False)
    cdef int _walk(self) noexcept nogil:
        """First pass: moves `_scan` from element to element, going on where it stopped the last time."""
        cdef const char* end = self._buf + self._end
        cdef const char* p
        cdef const char* cr
        cdef uint64_t digits
        cdef int64_t n, missing
        cdef int depth, verdict
        cdef char kind
        if self._depth < 0:
            self._depth = 0
            self._open[0] = 1
            self._scan = self._start
            self._elements = 0
        p = self._buf + self._scan
        depth = self._depth
        missing = self._open[depth]
        while True:
            while missing == 0 and depth > 0:
                depth -= 1
                missing = self._open[depth]
            if missing == 0:
                verdict = _WHOLE
                break
            verdict = _MORE
            if p == end:
                break
            kind = p[0]
            n = 0
            cr = _number(p + 1, end, &digits)
            if cr != NULL and cr + 1 < end and cr[0] == c'\r' and cr[1] == c'\n' and digits >> 63 == 0:
                n = <int64_t>digits
            else:
                cr = _line_end(p + 1, end)
                if kind not in b"$*:+-%~>|=!_#,(":
                    verdict = _NO_TYPE
                    break
                # A CR may be there already, and its LF not.
                if (cr if cr != NULL else end - 1) - p > MAX_LINE:
                    verdict = _BAD_LINE
                    break
                if cr == NULL:
                    break
                if kind in b"$*:%~>|=!" and not _parse_int(p + 1, cr, &n):
                    verdict = _NO_NUMBER
                    break
            if kind == c'$' or kind == c'=' or kind == c'!':
                if n != -1 or kind != c'$':
                    if n < 0 or n > MAX_BULK:
                        verdict = _BAD_BULK
                        break
                    if end - cr < n + 4:
                        break
                    cr += n + 2
                    if cr[0] != c'\r' or cr[1] != c'\n':
                        verdict = _BAD_END
                        break
                missing -= 1
            elif kind == c'*' or kind == c'~' or kind == c'>' or kind == c'%' or kind == c'|':
                if n == -1 and kind == c'*':
                    n = 0
                elif n < 0 or n > MAX_ELEMENTS:
                    verdict = _BAD_COUNT
                    break
                if kind == c'%' or kind == c'|':
                    n *= 2
                self._elements += n
                if self._elements > MAX_ELEMENTS:
                    verdict = _BAD_COUNT
                    break
                if depth + 1 == MAX_DEPTH:
                    verdict = _BAD_DEPTH
                    break
                # Inside a reply, attributes come on top of the element they are about.
                if kind != c'|' or depth == 0:
                    missing -= 1
                self._open[depth] = missing
                depth += 1
                missing = n
            elif kind in b"+-:#,(":
                missing -= 1
            elif kind == c'_':
                if cr != p + 1:
                    verdict = _NO_NULL
                    break
                missing -= 1
            else:
                verdict = _NO_TYPE
                break
            p = cr + 2
        self._scan = p - self._buf
        self._depth = depth
        self._open[depth] = missing
        return verdict
