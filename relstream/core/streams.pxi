# Entries of streams, and pages of a pending entries list, as arrays over the bytes they came in.

ctypedef struct Id:
    uint64_t ms
    uint64_t seq


ctypedef struct Located:
    Id id
    int64_t pairs   # -1: the entry is gone (nil fields)
    size_t offset   # of the first field name


ctypedef struct Pending:
    Id id
    int64_t idle_ms
    int64_t deliveries
    uint32_t consumer


cdef inline int _compare(Id a, Id b) noexcept nogil:
    if a.ms != b.ms:
        return -1 if a.ms < b.ms else 1
    if a.seq != b.seq:
        return -1 if a.seq < b.seq else 1
    return 0


cdef inline bint _parse_id(const char* at, Py_ssize_t size, Id* out) noexcept nogil:
    """`<ms>-<seq>`, both decimal and within 64 bits. False when it is anything else."""
    cdef const char* end = at + size
    at = _number(at, end, &out.ms)
    if at == NULL or at == end or at[0] != c'-':
        return False
    return _number(at + 1, end, &out.seq) == end


cdef inline char* _write_before(char* end, uint64_t n) noexcept nogil:
    """Writes `n` in decimal so that it ends before `end`; where it starts."""
    while True:
        end -= 1
        end[0] = <char>(c'0' + n % 10)
        n //= 10
        if n == 0:
            return end


cdef inline char* _write_id_before(char* end, Id id) noexcept nogil:
    """Writes `<ms>-<seq>`, at most 41 characters, so that it ends before `end`; where it starts."""
    end = _write_before(end, id.seq) - 1
    end[0] = c'-'
    return _write_before(end, id.ms)


cdef bytes _id_bytes(Id id):
    cdef char text[41]
    cdef char* start = _write_id_before(text + 41, id)
    return PyBytes_FromStringAndSize(start, text + 41 - start)


cdef inline bint _same(const char* at, Py_ssize_t size, bytes text) noexcept:
    return size == PyBytes_GET_SIZE(text) and memcmp(at, PyBytes_AS_STRING(text), size) == 0


cdef inline bint _id_element(const char** at, const char* end, Id* out) noexcept nogil:
    """Reads an id, and moves behind it. False when the next element is something else."""
    cdef int64_t size
    cdef const char* text = _bulk(at, end, &size)
    return text != NULL and _parse_id(text, size, out)


cdef object _decode(const char** at, const char* end, int decode):
    if decode == _OBJECT or at[0][0] == c'-' or at[0][0] == c'!':
        return _build(at, end, MAX_DEPTH)
    if decode == _STREAMS:
        return _streams(at[0], end)
    if decode == _ENTRIES:
        return _entries(at, end, None)
    return _pending(at[0], end)


cdef list _streams(const char* at, const char* end):
    """XREADGROUP: RESP3 a map, RESP2 an array of pairs, and nil when there is nothing."""
    cdef bint paired = at[0] == c'*'
    cdef int64_t i, size, n = _count(&at, end, c'*' if paired else c'%')
    cdef list batches = []
    cdef const char* text
    if n < -1:
        raise _wrong("streams", at, end)
    for i in range(n):
        if paired and _count(&at, end, c'*') != 2:
            raise _wrong("a stream's key with its entries", at, end)
        text = _bulk(&at, end, &size)
        if text == NULL:
            raise _wrong("the key of a stream", at, end)
        batches.append(_entries(&at, end, text[:size]))
    return batches


cdef Batch _entries(const char** after, const char* end, bytes key):
    """An array of entries, [id, [field, value, …]] each; moves `after` behind it."""
    cdef const char* at = after[0]
    cdef int64_t i, j, pairs, size, n = _count(&at, end, c'*')
    cdef Batch batch = Batch.__new__(Batch)
    cdef const char* first = at
    cdef Located* entry
    if n < -1:
        raise _wrong("entries", at, end)
    n = max(n, 0)
    batch.key = key
    batch._at = <Located*>PyMem_Malloc(max(n, 1) * sizeof(Located))
    if batch._at == NULL:
        raise MemoryError()
    for i in range(n):
        entry = &batch._at[i]
        if _count(&at, end, c'*') != 2 or not _id_element(&at, end, &entry.id):
            raise _wrong("an entry: an id and its fields", at, end)
        pairs = _count(&at, end, c'*')
        if pairs < -1 or (pairs > 0 and pairs & 1):
            raise _wrong("the fields of an entry, as many names as values", at, end)
        entry.pairs = pairs // 2 if pairs >= 0 else -1
        entry.offset = at - first
        for j in range(pairs):
            if _bulk(&at, end, &size) == NULL:
                raise _wrong("a field or its value", at, end)
    if at > end:
        _beyond(after[0], end)
    batch._raw = PyBytes_FromStringAndSize(first, at - first)
    batch._n = n
    after[0] = at
    return batch


cdef class Batch:
    """Entries of one stream, in the order the server gave them; a sequence of `(id, fields)`.

    Ids are kept as integers and fields as places in the reply: an entry costs a Python object when
    it is looked at, not before. `fields` of an entry deleted while it was pending is None.
    """

    cdef readonly bytes key  # the stream's key; None where the reply does not say (XRANGE)
    cdef Located* _at
    cdef int64_t _n
    cdef bytes _raw
    cdef list _names         # field names met so far, to make each only once

    def __cinit__(self):
        self._raw = b""
        self._names = []

    def __dealloc__(self):
        PyMem_Free(self._at)

    def __len__(self):
        return self._n

    @property
    def nbytes(self):
        """The size of the entries in the reply, in bytes."""
        return PyBytes_GET_SIZE(self._raw)

    cdef Located* _entry(self, Py_ssize_t index) except NULL:
        if index < 0:
            index += self._n
        if not 0 <= index < self._n:
            raise IndexError(f"entry {index} of {self._n}")
        return &self._at[index]

    def id(self, Py_ssize_t index):
        """The id of an entry, b"<ms>-<seq>"."""
        return _id_bytes(self._entry(index).id)

    def ids(self):
        """The ids of all entries."""
        cdef int64_t i
        return [_id_bytes(self._at[i].id) for i in range(self._n)]

    def fields(self, Py_ssize_t index):
        """The fields of an entry as a new dict; None when it was deleted while pending."""
        return self._fields(self._entry(index))

    def values(self, bytes name not None):
        """The value of one field of each entry, in their order, without building the others.

        None where an entry has no such field, or was deleted while pending.
        """
        cdef int64_t i
        return [self._value(&self._at[i], name) for i in range(self._n)]

    def pairs(self, Py_ssize_t index):
        """The fields of an entry as a flat list, name, value, …, as XADD takes them; or None."""
        cdef Located* entry = self._entry(index)
        cdef const char* at = PyBytes_AS_STRING(self._raw) + entry.offset
        cdef const char* end = PyBytes_AS_STRING(self._raw) + PyBytes_GET_SIZE(self._raw)
        cdef int64_t i
        if entry.pairs < 0:
            return None
        return [_build(&at, end, MAX_DEPTH) for i in range(2 * entry.pairs)]

    cdef dict _fields(self, Located* entry):
        cdef const char* at = PyBytes_AS_STRING(self._raw) + entry.offset
        cdef const char* end = PyBytes_AS_STRING(self._raw) + PyBytes_GET_SIZE(self._raw)
        cdef const char* text
        cdef int64_t i, size
        cdef dict out
        cdef bytes name
        if entry.pairs < 0:
            return None
        out = {}
        for i in range(entry.pairs):
            text = _bulk(&at, end, &size)
            if text == NULL:
                _beyond(at, end)
            name = self._name(i, text, size)
            text = _bulk(&at, end, &size)
            if text == NULL:
                _beyond(at, end)
            out[name] = PyBytes_FromStringAndSize(text, size)
        return out

    cdef bytes _name(self, int64_t column, const char* at, Py_ssize_t size):
        """A field's name: entries of a stream mostly have the same ones in the same order."""
        cdef bytes name
        if column < len(self._names):
            name = <bytes>self._names[column]
            if PyBytes_GET_SIZE(name) == size and memcmp(PyBytes_AS_STRING(name), at, size) == 0:
                return name
        name = PyBytes_FromStringAndSize(at, size)
        if column == len(self._names) and column < 64:
            self._names.append(name)
        return name

    cdef bytes _value(self, Located* entry, bytes wanted):
        """The value of one field, without building the others; or None."""
        cdef Py_ssize_t size
        cdef const char* found = self._find(entry, wanted, &size)
        return None if found == NULL else PyBytes_FromStringAndSize(found, size)

    cdef const char* _find(self, Located* entry, bytes wanted, Py_ssize_t* found_size) noexcept:
        """Where the value of a field (the last of that name) is; NULL if there is none."""
        cdef const char* at = PyBytes_AS_STRING(self._raw) + entry.offset
        cdef const char* end = PyBytes_AS_STRING(self._raw) + PyBytes_GET_SIZE(self._raw)
        cdef const char* found = NULL
        cdef const char* name
        cdef const char* value
        cdef int64_t i, named, size
        for i in range(entry.pairs):
            name = _bulk(&at, end, &named)
            value = _bulk(&at, end, &size)
            if name == NULL or value == NULL:
                break
            if _same(name, named, wanted):
                found = value
                found_size[0] = size
        return found

    def __getitem__(self, Py_ssize_t index):
        cdef Located* entry = self._entry(index)
        return _id_bytes(entry.id), self._fields(entry)

    def __iter__(self):
        cdef int64_t i
        for i in range(self._n):
            yield _id_bytes(self._at[i].id), self._fields(&self._at[i])


cdef class EntryIds:
    """Ids of entries, as integers; a sequence of b"<ms>-<seq>"."""

    cdef Id* _at
    cdef Py_ssize_t _n

    def __cinit__(self, list ids=None):
        cdef bytes text
        if ids is None:
            return
        self._reserve(len(ids))
        for text in ids:
            if text is None or not _parse_id(
                PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), &self._at[self._n]
            ):
                raise ValueError(f"{text!r}: expected the id of an entry")
            self._n += 1

    def __dealloc__(self):
        PyMem_Free(self._at)

    cdef int _reserve(self, Py_ssize_t n) except -1:
        self._at = <Id*>PyMem_Malloc(max(n, 1) * sizeof(Id))
        if self._at == NULL:
            raise MemoryError()
        return 0

    def __len__(self):
        return self._n

    def __getitem__(self, Py_ssize_t index):
        if index < 0:
            index += self._n
        if not 0 <= index < self._n:
            raise IndexError(f"id {index} of {self._n}")
        return _id_bytes(self._at[index])


cdef PendingPage _pending(const char* at, const char* end):
    """An array of [id, consumer, idle time, deliveries]."""
    cdef int64_t i, size, n = _count(&at, end, c'*')
    cdef PendingPage page = PendingPage.__new__(PendingPage)
    cdef Pending* entry
    cdef dict numbers = {}
    cdef bytes name = None
    cdef const char* text
    cdef uint32_t number = 0
    if n < -1:
        raise _wrong("pending entries", at, end)
    n = max(n, 0)
    page._at = <Pending*>PyMem_Malloc(max(n, 1) * sizeof(Pending))
    if page._at == NULL:
        raise MemoryError()
    for i in range(n):
        entry = &page._at[i]
        if _count(&at, end, c'*') != 4 or not _id_element(&at, end, &entry.id):
            raise _wrong("a pending entry: id, consumer, idle time, deliveries", at, end)
        text = _bulk(&at, end, &size)
        if text == NULL:
            raise _wrong("the consumer of a pending entry", at, end)
        # Neighbours mostly belong to the same consumer.
        if name is None or not _same(text, size, name):
            name = text[:size]
            number = numbers.setdefault(name, len(numbers))
        entry.consumer = number
        if not _integer(&at, end, &entry.idle_ms):
            raise _wrong("an idle time", at, end)
        if not _integer(&at, end, &entry.deliveries):
            raise _wrong("a number of deliveries", at, end)
    page._n = n
    page.consumers = list(numbers)
    return page


cdef class PendingPage:
    """A page of a group's pending entries list (XPENDING with a range), in the order of ids."""

    cdef readonly list consumers  # the names that occur, each once
    cdef Pending* _at
    cdef int64_t _n

    def __cinit__(self):
        self.consumers = []

    def __dealloc__(self):
        PyMem_Free(self._at)

    def __len__(self):
        return self._n

    def idle(self, int64_t min_idle_ms):
        """The ids of entries that were delivered at least `min_idle_ms` ago."""
        cdef EntryIds ids = EntryIds()
        cdef int64_t i
        ids._reserve(self._n)
        for i in range(self._n):
            if self._at[i].idle_ms >= min_idle_ms:
                ids._at[ids._n] = self._at[i].id
                ids._n += 1
        return ids

    @cython.boundscheck(True)  # `consumers` is the application's to change
    def __getitem__(self, Py_ssize_t index):
        """`(id, consumer, idle time in ms, deliveries)` of one pending entry."""
        cdef Pending* entry
        if index < 0:
            index += self._n
        if not 0 <= index < self._n:
            raise IndexError(f"pending entry {index} of {self._n}")
        entry = &self._at[index]
        return (
            _id_bytes(entry.id), self.consumers[entry.consumer], entry.idle_ms, entry.deliveries
        )
