# Announcements of data streams, read from the load balancer stream, and what is owned of them.

# What stands in front of name and Info in an announcement as producers write it.
cdef bytes _CANONICAL_NAME = b'{"DataStreamName":"'
cdef bytes _CANONICAL_INFO = b'","Info":'


@cython.no_gc  # what it refers to never refers back, and there may be millions of them
cdef class Entry:
    """One announcement of a data stream: an entry of the load balancer stream, and its lock."""

    cdef readonly str data_stream_name
    cdef readonly bytes lock_key
    cdef readonly uint64_t retry_count
    cdef bytes _json              # the JSON of the Info object, or None …
    cdef bint _whole              # … or of the whole announcement, as it is written unusually
    cdef bint _sole               # the entry has no fields but the announcement and its retry count
    cdef object _loads            # decodes that
    cdef public list again        # further entries that announced the same stream, or None
    cdef public bint delivered    # STREAM_ADDED was handed to the application
    cdef public bint finishing    # is being finished or handed over
    cdef public bint acked        # the server has confirmed its XACK
    cdef public bint ended        # no longer owned: finished, handed over or lost
    cdef readonly Py_ssize_t cost # size of the announcement, in bytes
    cdef readonly double since    # when its lock was taken, on the clock of time.monotonic() …
    cdef readonly double lease_deadline  # … and until when it is held unless renewed
    cdef Id _id

    @property
    def id(self):
        """The entry's id, b"<ms>-<seq>"."""
        return _id_bytes(self._id)

    @property
    def id_in_lbs(self):
        """The entry's id as text, as notifications carry it."""
        return self._id_text()

    @property
    def info(self):
        """The Info object, or None; decoded for each who asks, and so theirs to change."""
        return self._info_object()

    @property
    def announcement(self):
        """The JSON that announced the stream; None where its entry has other fields, too."""
        if not self._sole:
            return None
        if self._whole:
            return self._json
        return b'%b%b%b%b}' % (
            _CANONICAL_NAME, self.data_stream_name.encode(), _CANONICAL_INFO,
            b"null" if self._json is None else self._json,
        )

    cdef str _id_text(self):
        cdef char text[41]
        cdef char* start = _write_id_before(text + 41, self._id)
        return PyUnicode_DecodeASCII(start, text + 41 - start, NULL)

    cdef object _info_object(self):
        if self._json is None:
            return None
        decoded = self._loads(self._json)
        return _name_and_info(<dict?>decoded)[1] if self._whole else decoded

    def __repr__(self):
        return f"<Entry {self.data_stream_name!r} {self.id_in_lbs}>"


cdef tuple _loosely(dict message):
    """Name and Info with their keys in any case, the last one winning, as encoding/json reads it."""
    name = info = None
    for key, value in message.items():
        folded = key.casefold()
        if folded == "datastreamname":
            name = name if value is None else value  # null leaves a string as it is
        elif folded == "info":
            info = value
    return name, info


cdef tuple _name_and_info(dict message):
    """Name and Info as they are mostly written, or else as encoding/json reads them."""
    name = message.get("DataStreamName")
    info = message.get("Info")
    if len(message) != 2 or name is None or (info is None and "Info" not in message):
        return _loosely(message)
    return name, info


cdef bytes _lock_key(str name, bytes separator, Id id):
    cdef Py_ssize_t named, between = PyBytes_GET_SIZE(separator)
    cdef const char* utf8 = PyUnicode_AsUTF8AndSize(name, &named)
    cdef char text[41]
    cdef char* start = _write_id_before(text + 41, id)
    cdef bytes key = PyBytes_FromStringAndSize(NULL, named + between + (text + 41 - start))
    cdef char* at = PyBytes_AS_STRING(key)
    memcpy(at, utf8, named)
    memcpy(at + named, PyBytes_AS_STRING(separator), between)
    memcpy(at + named + between, start, text + 41 - start)
    return key


# An announcement as it mostly is, {"DataStreamName":"…","Info":…} without anything unusual, is seen
# to be good without a decoder's help, and its Info is left as it is until somebody asks for it. What
# is not recognised here is not bad for that: a decoder judges it.

cdef inline const char* _behind_space(const char* at, const char* end) noexcept nogil:
    while at < end and (at[0] == c' ' or at[0] == c'\n' or at[0] == c'\t' or at[0] == c'\r'):
        at += 1
    return at


cdef inline const char* _behind_text(const char* at, const char* end) noexcept nogil:
    """Behind the string at `at`, if that is ASCII and has no escapes; else NULL."""
    if at == end or at[0] != c'"':
        return NULL
    at += 1
    while at < end and at[0] != c'"':
        if at[0] < 32 or at[0] > 126 or at[0] == c'\\':
            return NULL
        at += 1
    return at + 1 if at < end else NULL


cdef inline const char* _behind_digits(const char* at, const char* end) noexcept nogil:
    """Behind up to 18 digits, at least one; else NULL."""
    cdef const char* start = at
    while at < end and c'0' <= at[0] <= c'9':
        at += 1
    return at if 0 < at - start <= 18 else NULL


cdef const char* _behind_value(const char* at, const char* end, int depth) noexcept nogil:
    """Behind the JSON value at `at`, if it is nested no deeper than `depth`; else NULL."""
    cdef char closing
    cdef const char* start
    if at == end:
        return NULL
    if at[0] == c'"':
        return _behind_text(at, end)
    if at[0] == c'{' or at[0] == c'[':
        if depth == 0:
            return NULL
        closing = at[0] + 2
        at = _behind_space(at + 1, end)
        if at < end and at[0] == closing:
            return at + 1
        while True:
            if closing == c'}':
                at = _behind_text(at, end)
                if at == NULL:
                    return NULL
                at = _behind_space(at, end)
                if at == end or at[0] != c':':
                    return NULL
                at = _behind_space(at + 1, end)
            at = _behind_value(at, end, depth - 1)
            if at == NULL:
                return NULL
            at = _behind_space(at, end)
            if at == end:
                return NULL
            if at[0] == closing:
                return at + 1
            if at[0] != c',':
                return NULL
            at = _behind_space(at + 1, end)
    if at[0] == c't' or at[0] == c'n':
        if end - at >= 4 and (memcmp(at, b"true", 4) == 0 or memcmp(at, b"null", 4) == 0):
            return at + 4
        return NULL
    if at[0] == c'f':
        return at + 5 if end - at >= 5 and memcmp(at, b"false", 5) == 0 else NULL
    if at[0] == c'-':
        at += 1
    start = at
    at = _behind_digits(at, end)
    if at == NULL or (start[0] == c'0' and at - start > 1):
        return NULL
    if at < end and at[0] == c'.':
        at = _behind_digits(at + 1, end)
    # An exponent ends here, too, and is none of the characters that may follow.
    return at


cdef inline const char* _behind_key(
    const char* at, const char* end, char before, const char* key, Py_ssize_t size
) noexcept nogil:
    """Behind `before`, this key (with its quotes) and a colon; else NULL."""
    if at == end or at[0] != before:
        return NULL
    at = _behind_space(at + 1, end)
    if end - at < size or memcmp(at, key, size):
        return NULL
    at = _behind_space(at + size, end)
    return _behind_space(at + 1, end) if at < end and at[0] == c':' else NULL


ctypedef struct Plain:
    const char* name  # without its quotes
    Py_ssize_t named
    const char* info  # an object, or null
    Py_ssize_t informed


cdef bint _plain_announcement(const char* at, const char* end, Plain* out) noexcept nogil:
    """Where name and Info are; False when this has to be decoded to be understood."""
    cdef const char* name = _behind_key(
        _behind_space(at, end), end, c'{', b'"DataStreamName"', 16
    )
    if name == NULL:
        return False
    at = _behind_text(name, end)
    if at == NULL or at - name == 2:  # no name is empty
        return False
    out.name = name + 1
    out.named = at - name - 2
    out.info = _behind_key(_behind_space(at, end), end, c',', b'"Info"', 6)
    if out.info == NULL or out.info == end or (out.info[0] != c'{' and out.info[0] != c'n'):
        return False
    at = _behind_value(out.info, end, MAX_DEPTH)
    if at == NULL:
        return False
    out.informed = at - out.info
    at = _behind_space(at, end)
    return at < end and at[0] == c'}' and _behind_space(at + 1, end) == end


cdef object _announcement(
    Batch batch, int64_t index, bytes field, bytes retry_field, bytes separator, loads
):
    """What an entry announces, as an `Entry`; or, as text, why it announces nothing."""
    cdef Located* located = &batch._at[index]
    cdef Py_ssize_t size, canonical
    cdef const char* raw = batch._find(located, field, &size)
    cdef Plain plain
    cdef Entry entry
    if raw == NULL:
        return f"no field {field.decode()}"
    if _plain_announcement(raw, raw + size, &plain):
        entry = Entry.__new__(Entry)
        entry.data_stream_name = PyUnicode_DecodeASCII(plain.name, plain.named, NULL)
        canonical = PyBytes_GET_SIZE(_CANONICAL_NAME) + PyBytes_GET_SIZE(_CANONICAL_INFO) + 1
        if size != canonical + plain.named + plain.informed:  # white space
            entry._whole = True
            entry._json = PyBytes_FromStringAndSize(raw, size)
        elif plain.info[0] == c'{':
            entry._json = PyBytes_FromStringAndSize(plain.info, plain.informed)
    else:
        entry = Entry.__new__(Entry)
        entry._whole = True
        entry._json = PyBytes_FromStringAndSize(raw, size)
        try:
            decoded = loads(entry._json)
        except ValueError as error:
            return f"not JSON: {error}"
        if type(decoded) is not dict:
            return f"expected a JSON object, got {type(decoded).__name__}"
        name, info = _name_and_info(<dict>decoded)
        if type(name) is not str or not name:
            # Not its text: what is nested deeply enough can't be printed.
            shown = "empty" if name == "" else f"of type {type(name).__name__}"
            return f"DataStreamName is {shown}, expected a name"
        if info is not None and type(info) is not dict:
            return f"Info is of type {type(info).__name__}, expected an object"
        entry.data_stream_name = name
    entry._loads = loads
    entry.cost = size
    entry._id = located.id
    try:
        entry.lock_key = _lock_key(entry.data_stream_name, separator, located.id)
    except UnicodeEncodeError as error:  # some JSON decoders let lone surrogates pass
        return f"DataStreamName is not text: {error}"
    entry._sole = located.pairs == 1
    if not entry._sole:
        raw = batch._find(located, retry_field, &size)
        if raw != NULL:
            entry.retry_count = _retries(raw, size)
            entry._sole = located.pairs == 2
    return entry


def announcements(
    Batch batch not None, bytes field not None, bytes retry_field not None,
    bytes separator not None, loads,
):
    """Decodes entries of the load balancer stream: `field` announces, `retry_field` counts retries.

    Returns `(entries, unparseable, gone)`: the good ones as `Entry`; `(index, reason)` of those that
    announce nothing; the ids of those deleted while pending. `loads` decodes JSON and raises
    ValueError for what is none.
    """
    cdef list entries = [], unparseable = [], gone = []
    cdef int64_t i
    for i in range(batch._n):
        if batch._at[i].pairs < 0:
            gone.append(_id_bytes(batch._at[i].id))
            continue
        made = _announcement(batch, i, field, retry_field, separator, loads)
        if type(made) is Entry:
            entries.append(made)
        else:
            unparseable.append((i, made))
    return entries, unparseable, gone


def grant(
    list entries not None,
    list replies not None,
    dict owned not None,
    double since=0.0,
    double lease_deadline=0.0,
):
    """Enters locked entries into the table of owned streams, `{name: first entry}`.

    `replies` are those to the SET of each entry's lock, whose lease lasts from `since` until
    `lease_deadline` (seconds, time.monotonic()). Returns `(new, locked, refusal)`: entries
    that brought a new stream, all whose locks were taken, and the last error reply, or None.
    """
    cdef list new = [], locked = []
    cdef Entry entry, first
    cdef Py_ssize_t i
    refusal = None
    if len(entries) != len(replies):
        raise ValueError(f"{len(replies)} replies to {len(entries)} SETs")
    for i in range(len(entries)):
        entry = <Entry?>_at(entries, i)
        reply = _at(replies, i)
        if reply is None:
            continue
        if type(reply) is ReplyError:
            refusal = reply
            continue
        entry.since = since
        entry.lease_deadline = lease_deadline
        locked.append(entry)
        first = <Entry?>owned.setdefault(entry.data_stream_name, entry)
        if first is entry:
            new.append(entry)
        elif first.finishing:  # announced anew just as it is being finished
            owned[entry.data_stream_name] = entry
            new.append(entry)
        elif first.again is None:
            first.again = [entry]
        else:
            first.again.append(entry)
    return new, locked, refusal


def lock_keys(list entries not None):
    """The keys of the locks of these entries."""
    cdef list keys = []
    for item in entries:
        keys.append((<Entry?>item).lock_key)
    return keys


def entry_ids(list entries not None):
    """The ids of these entries, b"<ms>-<seq>" each."""
    cdef list ids = []
    for item in entries:
        ids.append(_id_bytes((<Entry?>item)._id))
    return ids


def id_range(list entries not None):
    """The least and the greatest id of these entries, of which there is at least one."""
    if not entries:
        raise ValueError("no entries, expected at least one")
    cdef Id least = (<Entry?>entries[0])._id
    cdef Id greatest = least
    cdef Entry entry
    for item in entries:
        entry = <Entry?>item
        if _compare(entry._id, least) < 0:
            least = entry._id
        if _compare(greatest, entry._id) < 0:
            greatest = entry._id
    return _id_bytes(least), _id_bytes(greatest)


def enter(dict table not None, list keys not None):
    """Enters these keys into a dict, each with None."""
    for key in keys:
        table[key] = None


def forget(list heads not None, dict owned not None):
    """Takes streams, by their first entries, out of the table of owned streams."""
    cdef Entry head
    for item in heads:
        head = <Entry?>item
        head.ended = True
        if owned.get(head.data_stream_name) is head:
            del owned[head.data_stream_name]


def discard(dict table not None, list keys not None):
    """Takes these keys out of a dict, as far as they are in it."""
    for key in keys:
        table.pop(key, None)


cdef class CompletionQueue:
    """Streams whose ownership shall end, in the order asked, and the futures of those who wait.

    `wake` is called when there is something to `take` again.
    """

    cdef readonly list heads    # the first entry of each stream …
    cdef readonly list futures  # … and who waits for the end of its ownership
    cdef Py_ssize_t _taken      # so many at the start of both are taken already
    cdef object _wake
    cdef object _create_future
    cdef object _refusal

    def __cinit__(self, wake=None):
        self.heads = []
        self.futures = []
        self._wake = wake

    def open(self, create_future):
        """Streams can be asked for from now on."""
        self._create_future = create_future
        self._refusal = None

    def close(self, refusal):
        """Whoever asks from now on gets the exception that `refusal` makes; returns who waits."""
        self._refusal = refusal
        return self.futures[self._taken:]

    def __len__(self):
        return max(0, len(self.heads) - self._taken)

    def ask(self, Entry head not None):
        """The future of the end of a stream's ownership."""
        cdef object future = self._create_future()
        if self._refusal is not None:
            future.set_exception(self._refusal())
            return future
        head.finishing = True
        self.heads.append(head)
        self.futures.append(future)
        if len(self.heads) - self._taken == 1:
            self._wake()
        return future

    def next_batch(self, Py_ssize_t most, Py_ssize_t most_bytes=0):
        """Those asked for first, up to so many, and if given of about so many bytes."""
        cdef CompletionQueue batch = CompletionQueue()
        cdef Py_ssize_t end = self._taken + min(most, len(self))
        cdef Py_ssize_t i, room = most_bytes
        if most < 0 or most_bytes < 0:
            raise ValueError(f"take({most}, {most_bytes}): expected 0 or more")
        if most_bytes:
            for i in range(self._taken, end):
                room -= (<Entry?>_at(self.heads, i)).cost
                if room <= 0:
                    end = i + 1
                    break
        batch.heads = self.heads[self._taken:end]
        batch.futures = self.futures[self._taken:end]
        self._taken = end
        if 2 * end >= len(self.heads):  # moving what is left costs less than what was taken
            del self.heads[:end]
            del self.futures[:end]
            self._taken = 0
        return batch

    def entries(self):
        """All entries by which these streams are owned, the first ones first."""
        cdef Entry head
        cdef list entries = list(self.heads)
        for item in self.heads:
            head = <Entry?>item
            if head.again is not None:
                entries += head.again
        return entries

    def succeed(self):
        """Tells all who still wait that it is done."""
        for future in self.futures:
            if not future.done():
                future.set_result(None)


cdef inline object _named_tuple(type kind, Py_ssize_t size, first, second, third=None, fourth=None):
    """A `typing.NamedTuple` of two or four values, without a call of Python code."""
    cdef object made
    if PY_VERSION_HEX >= 0x030E0000:  # tuples keep their hash, which is not ours to set up
        return tuple.__new__(kind, (first, second, third, fourth)[:size])
    made = PyType_GenericAlloc(kind, size)
    Py_INCREF(first)  # SET_ITEM takes one over
    PyTuple_SET_ITEM(made, 0, first)
    Py_INCREF(second)
    PyTuple_SET_ITEM(made, 1, second)
    if size == 4:
        Py_INCREF(third)
        PyTuple_SET_ITEM(made, 2, third)
        Py_INCREF(fourth)
        PyTuple_SET_ITEM(made, 3, fourth)
    return made


cdef class Deliveries:
    """What waits to be told to the application: losses first, the rest in order.

    An added stream waits as its `Entry`, and becomes `notification(kind, info(name, id), Info, retries)`
    when
    it is told; both types are `typing.NamedTuple`s. All else waits as it will be told. Who derives
    from this writes `_next`, a coroutine for when nothing waits, and `_make_room`, which is called
    when an entry was taken and room is wanted.
    """

    cdef public object _items            # deque
    cdef public object _urgent           # deque
    cdef public Py_ssize_t _waiting      # entries in _items …
    cdef public Py_ssize_t _waiting_bytes  # … and what they cost
    cdef public Py_ssize_t _expired      # all else in _items
    cdef public bint _room_wanted        # somebody found no room
    cdef public Entry _last_added              # the stream of the last notification, if it added one
    cdef object _on_delivery
    cdef type _notification
    cdef object _kind
    cdef type _info
    cdef object _popped

    def __init__(self, type notification not None, kind, type info not None, on_delivery):
        _check_named_tuple(notification, 4)
        _check_named_tuple(info, 2)
        self._items = deque()
        self._urgent = deque()
        self._popped = self._items.popleft
        self._on_delivery = on_delivery
        self._notification = notification
        self._kind = kind
        self._info = info

    def _enqueue(self, list entries not None):
        """These streams wait now, too."""
        cdef Py_ssize_t cost = 0
        for item in entries:
            cost += (<Entry?>item).cost
        self._waiting_bytes += cost
        self._waiting += len(entries)
        self._items.extend(entries)

    cpdef object _take(self):
        """What comes next, if anything waits; else None. An entry counts as delivered."""
        cdef Entry entry
        if self._urgent:
            self._last_added = None
            return self._urgent.popleft()
        while self._items:
            item = self._popped()
            if type(item) is not Entry:
                self._expired -= 1
                self._last_added = None
                return item
            entry = <Entry>item
            self._waiting -= 1
            self._waiting_bytes -= entry.cost
            if self._room_wanted:
                self._make_room()
            if entry.ended or entry.finishing:  # given up again before anybody heard of it
                continue
            if self._on_delivery is not None:
                self._on_delivery(entry)
            return self._tell(entry)
        return None

    cdef object _tell(self, Entry entry):
        cdef object payload = _named_tuple(
            self._info, 2, entry.data_stream_name, entry._id_text()
        )
        cdef object told = _named_tuple(
            self._notification, 4, self._kind, payload, entry._info_object(), entry.retry_count
        )
        entry.delivered = True
        self._last_added = entry
        return told

    def __anext__(self):
        cdef Next next = Next.__new__(Next)
        next._deliveries = self
        return next


@cython.final
@cython.freelist(8)
cdef class Next:
    """The coroutine `Deliveries.__anext__`.

    One that is compiled from `async def` costs more to make, run and end, and there is one for every
    notification.
    """

    cdef Deliveries _deliveries  # None when this has ended
    cdef object _waiting         # the coroutine that waits, once nothing was there at first

    cdef PySendResult _resume(self, object value, PyObject** result) except PYGEN_ERROR:
        cdef PySendResult how
        cdef Deliveries deliveries = self._deliveries
        result[0] = NULL
        if deliveries is None:
            raise RuntimeError("cannot reuse already awaited coroutine")
        if self._waiting is None:
            self._deliveries = None
            taken = deliveries._take()
            if taken is not None:
                Py_INCREF(taken)  # the caller's
                result[0] = <PyObject*>taken
                return PYGEN_RETURN
            self._deliveries = deliveries
            self._waiting = deliveries._next()
        try:
            how = PyIter_Send(self._waiting, value, result)
        except BaseException:
            self._deliveries = self._waiting = None
            raise
        if how == PYGEN_RETURN:
            self._deliveries = self._waiting = None
        return how

    @property
    def __name__(self):
        return "__anext__"

    @property
    def __qualname__(self):
        """As a task shows it that waits for this."""
        return "Notifications.__anext__"

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        """As of any coroutine."""
        cdef PyObject* result = NULL
        cdef PySendResult how = self._resume(value, &result)
        sent = <object>result
        Py_DECREF(sent)
        if how == PYGEN_NEXT:
            return sent
        raise StopIteration(sent)

    def throw(self, *exception):
        """As of any coroutine."""
        if self._deliveries is None:
            raise RuntimeError("cannot reuse already awaited coroutine")
        if self._waiting is None:
            self._waiting = self._deliveries._next()
        try:
            return self._waiting.throw(*exception)
        except BaseException:
            self._deliveries = self._waiting = None
            raise

    def close(self):
        """As of any coroutine."""
        waiting, self._deliveries, self._waiting = self._waiting, None, None
        if waiting is not None:
            waiting.close()


cdef PySendResult _send(object next, object value, PyObject** result) except PYGEN_ERROR:
    return (<Next>next)._resume(value, result)


# What `await` asks for first; there is no way to write it in a class. Without it `__next__` is
# called, which has to raise what it returns.
(<TypeWithAsync*><PyObject*>Next).tp_as_async.am_send = <sendfunc><void*>_send


def parse_id(bytes text not None):
    """An entry's id as `(ms, seq)`; None when `text` is no `<ms>-<seq>`."""
    cdef Id id
    if not _parse_id(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), &id):
        return None
    return id.ms, id.seq


ctypedef struct Owned:
    Id id
    Py_ssize_t index


cdef int _by_id(const void* a, const void* b) noexcept nogil:
    return _compare((<const Owned*>a).id, (<const Owned*>b).id)


cdef class Audit:
    """Compares the entries a consumer believes it owns with those pending for it, page by page.

    Takes 32 bytes an owned entry, and time linear in owned and pending (owned mostly come in order).
    """

    cdef list _entries
    cdef Owned* _owned
    cdef Py_ssize_t _n
    cdef Py_ssize_t _next

    def __cinit__(self, list entries not None):
        cdef Py_ssize_t i
        cdef bint ordered = True
        cdef Entry entry
        self._entries = list(entries)  # the caller's may change between pages
        self._n = len(self._entries)
        self._owned = <Owned*>PyMem_Malloc(max(self._n, 1) * sizeof(Owned))
        if self._owned == NULL:
            raise MemoryError()
        for i in range(self._n):
            entry = <Entry?>_at(self._entries, i)
            self._owned[i].id = entry._id
            self._owned[i].index = i
            if i and _compare(self._owned[i - 1].id, entry._id) > 0:
                ordered = False
        if not ordered:
            qsort(self._owned, self._n, sizeof(Owned), _by_id)

    def __dealloc__(self):
        PyMem_Free(self._owned)

    def page(self, PendingPage page not None, int64_t min_idle_ms, bint last):
        """Takes the next page; `last` when none follows. Returns `(missing, strays)`:
        owned entries that are not pending, and the ids pending but not owned, idle for at least
        `min_idle_ms`.
        """
        cdef list missing = [], strays = []
        cdef Pending* pending
        cdef int64_t i
        cdef int order
        for i in range(page._n):
            pending = &page._at[i]
            while True:
                order = 1
                if self._next < self._n:
                    order = _compare(self._owned[self._next].id, pending.id)
                if order >= 0:
                    break
                missing.append(self._entries[self._owned[self._next].index])
                self._next += 1
            if order == 0:
                self._next += 1
            elif pending.idle_ms >= min_idle_ms:
                strays.append(_id_bytes(pending.id))
        if last:
            while self._next < self._n:
                missing.append(self._entries[self._owned[self._next].index])
                self._next += 1
        return missing, strays
