# cython: auto_pickle=False, binding=False
#
# `binding=False` makes methods that check what they are called on, as those of built-in types do:
# Cython's own functions take `Reader.feed(5, b"x")` for a call on a Reader.
"""The engine's core: replies in, commands out, and the arithmetic between. No I/O, no asyncio.

One file a concern, included as text so that the C compiler sees them as one unit: `checks` (of arguments),
`reader` (RESP), `streams` (entries and pending pages), `pack` (commands), `lbs` (announcements and
what is owned), `owned` (their leases), `recover` (what to do about pending entries), `timing` (backoff and jitter), `slots` (Redis Cluster key slots), `live` (counts of objects, in debug builds).
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM
from cpython.version cimport PY_VERSION_HEX
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memchr, memcmp, memcpy, memmove

from collections import deque

from relstream.errors import ProtocolError, ReplyError

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX
    object PyType_GenericAlloc(type kind, Py_ssize_t size)
    void PyObject_GC_UnTrack(PyObject* made)

    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    PySendResult PyIter_Send(object, object, PyObject**) except PYGEN_ERROR
    ctypedef PySendResult (*sendfunc)(PyObject*, PyObject*, PyObject**)
    ctypedef struct AsyncMethods "PyAsyncMethods":
        sendfunc am_send
    ctypedef struct TypeWithAsync "PyTypeObject":
        AsyncMethods* tp_as_async

include "core/checks.pxi"
include "core/reader.pxi"
include "core/streams.pxi"
include "core/pack.pxi"
include "core/lbs.pxi"
include "core/owned.pxi"
include "core/recover.pxi"
include "core/timing.pxi"
include "core/slots.pxi"
include "core/live.pxi"
