# Pending entries whose owners may be dead: what is to be done about each, and the commands that do it.

cdef uint64_t _retries(const char* at, Py_ssize_t size) noexcept nogil:
    """What a retry count says: 0 when it is malformed, negative, or beyond 63 bits."""
    cdef const char* end = at + size
    cdef uint64_t n
    if size and at[0] == c'+':
        at += 1
    if not 1 <= end - at <= 19 or _number(at, end, &n) != end or n >> 63:
        return 0
    return n


cdef enum:
    _FREE
    _ALIVE
    _LETTER


ctypedef struct Planned:
    Id id
    const char* fields    # as the server packed them
    Py_ssize_t size
    int64_t pairs
    int64_t counts        # so many of the pairs are retry counts,
    Py_ssize_t counted    # and take so many bytes
    uint64_t retries
    Py_ssize_t key        # where the key of its lock is, packed
    Py_ssize_t key_size
    Py_ssize_t name_size
    int verdict


@cython.no_gc_clear  # or the batches could be gone while somebody still uses the Plan
cdef class Plan:
    """What is to be done about pending entries: those that announce a stream, in the order of ids.

    Those that are `gone` from the stream (their ids), and the `unparseable` ones, `(id, pairs,
    reason)`, are set apart. `batches` are searched for the entries; they may hold others, too.
    `loads` decodes JSON and raises ValueError for what is none.
    """

    cdef readonly list gone
    cdef readonly list unparseable
    cdef list _batches       # keeps the bytes that the fields point to
    cdef bytes _separator
    cdef bytes _retry_field
    cdef Planned* _at
    cdef Py_ssize_t _n
    cdef char* _keys
    cdef Py_ssize_t _keys_size
    cdef Py_ssize_t _keys_room
    cdef bint _busy

    def __cinit__(
        self, EntryIds ids not None, list batches not None, bytes field not None,
        bytes separator not None, bytes retry_field not None, loads,
    ):
        cdef Batch batch = None
        cdef Py_ssize_t i, number = 0
        cdef int64_t at = 0
        cdef int order
        self.gone = []
        self.unparseable = []
        self._batches = list(batches)
        self._separator = separator
        self._retry_field = retry_field
        self._at = <Planned*>PyMem_Malloc(max(ids._n, 1) * sizeof(Planned))
        if self._at == NULL:
            raise MemoryError()
        for i in range(ids._n):
            order = 1
            while True:
                if batch is None or at == batch._n:
                    if number == len(self._batches):
                        break
                    batch = <Batch?>self._batches[number]
                    number += 1
                    at = 0
                    continue
                order = _compare(batch._at[at].id, ids._at[i])
                if order >= 0:
                    break
                at += 1
            if batch is None or at == batch._n or order != 0 or batch._at[at].pairs < 0:
                self.gone.append(_id_bytes(ids._at[i]))
            else:
                self._take(batch, at, field, loads)

    def __dealloc__(self):
        PyMem_Free(self._at)
        PyMem_Free(self._keys)

    def __len__(self):
        return self._n

    cdef int _take(self, Batch batch, int64_t index, bytes field, loads) except -1:
        """Adds an entry, or finds it unparseable."""
        cdef Located* located = &batch._at[index]
        cdef Planned* planned = &self._at[self._n]
        cdef const char* at = PyBytes_AS_STRING(batch._raw) + located.offset
        cdef const char* end = PyBytes_AS_STRING(batch._raw) + PyBytes_GET_SIZE(batch._raw)
        cdef const char* start
        cdef const char* name
        cdef const char* text
        cdef const char* value = NULL
        cdef int64_t i, named, size, value_size = 0
        cdef Plain plain
        cdef Entry entry
        planned.id = located.id
        planned.fields = at
        planned.pairs = located.pairs
        planned.counts = planned.counted = planned.retries = 0
        planned.verdict = _FREE
        for i in range(located.pairs):
            start = at
            name = _bulk(&at, end, &named)
            text = _bulk(&at, end, &size)
            if name == NULL or text == NULL:
                _beyond(start, end)
            if _same(name, named, field):  # the last one counts
                value = text
                value_size = size
            if _same(name, named, self._retry_field):
                planned.retries = _retries(text, size)
                planned.counts += 1
                planned.counted += at - start
        planned.size = at - planned.fields
        if value == NULL or not _plain_announcement(value, value + value_size, &plain):
            made = _announcement(
                batch, index, field, self._retry_field, self._separator, loads
            )
            if type(made) is not Entry:
                self.unparseable.append((_id_bytes(located.id), batch.pairs(index), made))
                return 0
            entry = made
            plain.name = PyUnicode_AsUTF8AndSize(entry.data_stream_name, &plain.named)
        planned.name_size = plain.named
        self._add_key(planned, plain.name)
        self._n += 1
        return 0

    cdef int _add_key(self, Planned* planned, const char* name) except -1:
        """Adds the key of a lock to `_keys`, packed."""
        cdef char text[41]
        cdef char* id = _write_id_before(text + 41, planned.id)
        cdef Py_ssize_t between = PyBytes_GET_SIZE(self._separator)
        cdef Py_ssize_t size = planned.name_size + between + (text + 41 - id)
        cdef char* at
        planned.key = self._keys_size
        planned.key_size = _bulk_size(size)
        if planned.key_size > self._keys_room - self._keys_size:
            self._keys_room = 2 * (self._keys_size + planned.key_size)
            at = <char*>PyMem_Realloc(self._keys, self._keys_room)
            if at == NULL:
                raise MemoryError()
            self._keys = at
        self._keys_size += planned.key_size
        at = _write_header(self._keys + planned.key, c'$', size)
        memcpy(at, name, planned.name_size)
        at += planned.name_size
        memcpy(at, PyBytes_AS_STRING(self._separator), between)
        at += between
        memcpy(at, id, text + 41 - id)
        memcpy(at + (text + 41 - id), b"\r\n", 2)
        return 0

    cdef const char* _key(self, Planned* planned, Py_ssize_t* size) noexcept:
        """The key of a lock."""
        cdef const char* at = self._keys + planned.key
        size[0] = _header(&at)
        return at

    cdef bytes _lock_key(self, Planned* planned):
        cdef Py_ssize_t size
        cdef const char* at = self._key(planned, &size)
        return PyBytes_FromStringAndSize(at, size)

    cdef str _name(self, Planned* planned):
        cdef Py_ssize_t size
        cdef const char* at = self._key(planned, &size)
        return PyUnicode_DecodeUTF8(at, planned.name_size, NULL)

    def ids(self):
        """The ids of the entries that are to be put back: of all, before `judge`."""
        cdef Py_ssize_t i
        return [_id_bytes(self._at[i].id) for i in range(self._n) if self._at[i].verdict == _FREE]

    def lock_keys(self):
        """The keys of their locks."""
        cdef Py_ssize_t i
        return [self._lock_key(&self._at[i]) for i in range(self._n)]

    def mget(self):
        """The command that asks who holds the locks."""
        return b"*%d\r\n$4\r\nMGET\r\n%b" % (self._n + 1, self._keys[:self._keys_size])

    def judge(self, list values not None, max_retries, uint64_t since_ms=0):
        """Decides by who holds the locks, `values` in the same order; for once.

        Retries of entries whose ids are older than `since_ms` do not count any more.

        Returns `(alive, letters)`: how many are held; and of those that are free and were put back
        `max_retries` times already, or more often, the name of the stream, and what `returning`
        tells of the others. These are to be put back.
        """
        cdef Py_ssize_t i
        cdef Py_ssize_t alive = 0
        cdef uint64_t most = min(max_retries, 2**63)
        cdef Planned* planned
        cdef list letters = []
        values = list(values)  # the caller's may change while letters are made
        if len(values) != self._n:
            raise ValueError(f"{len(values)} locks of {self._n} entries")
        self._begin()
        try:
            for i in range(self._n):
                planned = &self._at[i]
                if planned.id.ms < since_ms:
                    planned.retries = 0
                if values[i] is not None:
                    planned.verdict = _ALIVE
                    alive += 1
                elif planned.retries >= most:
                    planned.verdict = _LETTER
                    letters.append((self._name(planned), self._told(planned, True)))
        finally:
            self._busy = False
        return alive, letters

    cdef int _begin(self) except -1:
        """From here on verdicts belong to one call: making any object may run any code."""
        if self._busy:
            raise ValueError("the Plan is used in the middle of another call")
        self._busy = True
        return 0

    def names(self):
        """The names of the streams that are to be put back."""
        cdef Py_ssize_t i
        return [self._name(&self._at[i]) for i in range(self._n) if self._at[i].verdict == _FREE]

    def returning(self, bint counting):
        """What is to be put back, `(id, pairs, key of the lock)`; `counting`: once more than before."""
        cdef Py_ssize_t i
        return [
            self._told(&self._at[i], counting)
            for i in range(self._n)
            if self._at[i].verdict == _FREE
        ]

    cdef tuple _told(self, Planned* planned, bint counting):
        cdef const char* at = planned.fields
        cdef const char* end = at + planned.size
        cdef int64_t i
        cdef list pairs = []
        for i in range(planned.pairs):
            name = _build(&at, end, MAX_DEPTH)
            value = _build(&at, end, MAX_DEPTH)
            if not counting or name != self._retry_field:
                pairs.append(name)
                pairs.append(value)
        if counting:
            pairs.append(self._retry_field)
            pairs.append(b"%d" % (planned.retries + 1))
        return _id_bytes(planned.id), pairs, self._lock_key(planned)

    def calls(
        self, bytes digest not None, bytes stream not None, bytes group not None, *,
        bint counting, bint locks, Py_ssize_t most, Py_ssize_t size, bytes leader=None,
        bytes fence not None=b"",
    ):
        """The calls of the script that puts back what is to be put back, packed.

        Of at most so many entries each, and about so many bytes. All entries of a call have the same
        number of fields, as the script wants it. `locks`: with the keys of their locks. `leader`: if
        that key has the value `fence` only.
        """
        if most < 1 or size < 1:
            raise ValueError(f"calls of {most} entries and {size} bytes: expected 1 or more")
        self._begin()
        try:
            return self._calls(
                digest, stream, group, counting, locks, most, min(size, MOST_BYTES), leader, fence
            )
        finally:
            self._busy = False

    cdef list _calls(
        self, bytes digest, bytes stream, bytes group,
        bint counting, bint locks, Py_ssize_t most, Py_ssize_t size, bytes leader, bytes fence,
    ):
        cdef list calls = []
        cdef bytes head = b"$7\r\nEVALSHA\r\n$%d\r\n%b\r\n" % (len(digest), digest)
        cdef bytes call
        cdef Py_ssize_t i = 0, j, n, keys, held
        cdef int64_t pairs
        cdef Planned* planned
        cdef char* at
        while i < self._n:
            if self._at[i].verdict != _FREE:
                i += 1
                continue
            n = keys = held = 0
            pairs = _pairs_put(&self._at[i], counting)
            j = i
            while j < self._n and n < most and held < size:
                planned = &self._at[j]
                if planned.verdict == _FREE:
                    if _pairs_put(planned, counting) != pairs:
                        break
                    n += 1
                    if locks:
                        keys += planned.key_size
                    held += self._put_size(planned, counting)
                j += 1
            named = 1 + (leader is not None) + (n if locks else 0)
            middle = b"$%d\r\n%d\r\n$%d\r\n%b\r\n" % (len(b"%d" % named), named, len(stream), stream)
            if leader is not None:
                middle += b"$%d\r\n%b\r\n" % (len(leader), leader)
            behind = b"$%d\r\n%b\r\n$%d\r\n%d\r\n$%d\r\n%b\r\n" % (
                len(group), group, len(b"%d" % (2 * pairs)), 2 * pairs, len(fence), fence
            )
            first = b"*%d\r\n%b%b" % (6 + named + n * (1 + 2 * pairs), head, middle)
            call = PyBytes_FromStringAndSize(NULL, len(first) + keys + len(behind) + held)
            at = PyBytes_AS_STRING(call)
            at = _append(at, first)
            if locks:
                self._write_keys(&at, i, n)
            at = _append(at, behind)
            while n:
                if self._at[i].verdict == _FREE:
                    at = self._write_put(at, &self._at[i], counting)
                    n -= 1
                i += 1
            _check_filled(call, at)
            calls.append(call)
        return calls

    cdef void _write_keys(self, char** at, Py_ssize_t i, Py_ssize_t n) noexcept:
        """Writes the keys of the next n locks."""
        while n:
            if self._at[i].verdict == _FREE:
                memcpy(at[0], self._keys + self._at[i].key, self._at[i].key_size)
                at[0] += self._at[i].key_size
                n -= 1
            i += 1

    cdef Py_ssize_t _put_size(self, Planned* planned, bint counting):
        """How many bytes `_write_put` writes."""
        cdef char text[41]
        cdef Py_ssize_t size = _bulk_size(text + 41 - _write_id_before(text + 41, planned.id))
        size += planned.size
        if counting:
            size -= planned.counted
            size += _bulk_size(PyBytes_GET_SIZE(self._retry_field))
            size += _bulk_size(text + 41 - _write_before(text + 41, planned.retries + 1))
        return size

    cdef char* _write_put(self, char* out, Planned* planned, bint counting):
        """Writes the id and the fields of an entry, as they are or with its retry count last."""
        cdef char text[41]
        cdef char* start = _write_id_before(text + 41, planned.id)
        cdef const char* at = planned.fields
        cdef const char* end = at + planned.size
        cdef const char* first
        cdef const char* name
        cdef int64_t i, named, size
        out = _write_bulk(out, start, text + 41 - start)
        if not counting or not planned.counts:
            memcpy(out, at, planned.size)
            out += planned.size
        else:
            for i in range(planned.pairs):
                first = at
                name = _bulk(&at, end, &named)
                _bulk(&at, end, &size)
                if not _same(name, named, self._retry_field):
                    memcpy(out, first, at - first)
                    out += at - first
        if counting:
            out = _write_bulk(
                out, PyBytes_AS_STRING(self._retry_field), PyBytes_GET_SIZE(self._retry_field)
            )
            start = _write_before(text + 41, planned.retries + 1)
            out = _write_bulk(out, start, text + 41 - start)
        return out


cdef inline int64_t _pairs_put(Planned* planned, bint counting) noexcept nogil:
    """How many fields an entry has when it is put back."""
    return planned.pairs - planned.counts + 1 if counting else planned.pairs


cdef inline char* _append(char* at, bytes data) noexcept:
    memcpy(at, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    return at + PyBytes_GET_SIZE(data)
