# How many objects of each class there are, in debug builds: a test that leaves some behind has found a
# leak of references, also where the garbage collector does not look.

cdef extern from *:
    """
    #ifdef RELSTREAM_DEBUG
    #define RELSTREAM_COUNTED 1
    #define RELSTREAM_KINDS 16

    static struct {
        PyTypeObject* kind;
        allocfunc alloc;
        destructor dealloc;
        Py_ssize_t live;
    } relstream_counted[RELSTREAM_KINDS];

    /* Which of the counted classes this is, or derives from. */
    static int relstream_kind_of(PyTypeObject* kind) {
        int i;
        for (; kind != NULL; kind = kind->tp_base)
            for (i = 0; i < RELSTREAM_KINDS && relstream_counted[i].kind != NULL; i++)
                if (relstream_counted[i].kind == kind) return i;
        Py_FatalError("an object of a class that is not counted");
    }

    static PyObject* relstream_alloc(PyTypeObject* kind, Py_ssize_t size) {
        int i = relstream_kind_of(kind);
        PyObject* made = relstream_counted[i].alloc(kind, size);
        /* Classes that derive from one allocate without this. */
        if (made != NULL && relstream_counted[i].kind == kind) relstream_counted[i].live++;
        return made;
    }

    static void relstream_dealloc(PyObject* gone) {
        int i = relstream_kind_of(Py_TYPE(gone));
        if (relstream_counted[i].kind == Py_TYPE(gone)) relstream_counted[i].live--;
        relstream_counted[i].dealloc(gone);
    }

    static int relstream_count(PyTypeObject* kind, int i) {
        if (i >= RELSTREAM_KINDS) return -1;
        relstream_counted[i].kind = kind;
        relstream_counted[i].alloc = kind->tp_alloc;
        relstream_counted[i].dealloc = kind->tp_dealloc;
        kind->tp_alloc = relstream_alloc;
        kind->tp_dealloc = relstream_dealloc;
        return 0;
    }

    static Py_ssize_t relstream_live(int i) { return relstream_counted[i].live; }
    #else
    #define RELSTREAM_COUNTED 0
    #define relstream_count(kind, i) ((void)(kind), (void)(i), 0)
    #define relstream_live(i) ((void)(i), (Py_ssize_t)0)
    #endif
    """
    const bint RELSTREAM_COUNTED
    int relstream_count(PyTypeObject* kind, int place)
    Py_ssize_t relstream_live(int place)
    ctypedef struct PyTypeObject:
        pass


if RELSTREAM_COUNTED:
    _counted = (
        Reader, Batch, EntryIds, PendingPage, Template, Entry, CompletionQueue, Deliveries, Next, Audit,
        OwnedStreams, Plan,
    )
    for _place, _kind in enumerate(_counted):
        if relstream_count(<PyTypeObject*><PyObject*>_kind, _place):
            raise SystemError("too many classes to count")

    def live_objects():
        """How many objects of each class there are, by its name. In debug builds only.

        Not those of classes that derive from these.
        """
        return {kind.__name__: relstream_live(place) for place, kind in enumerate(_counted)}
