# Redis Cluster key slots: CRC16 (XMODEM) of the key, or of its hash tag, modulo 16384.
# https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#key-distribution-model

cdef uint16_t _crc_table[256]


cdef void _fill_crc_table() noexcept:
    cdef int i, bit
    cdef uint16_t crc
    for i in range(256):
        crc = <uint16_t>(i << 8)
        for bit in range(8):
            crc = <uint16_t>((crc << 1) ^ 0x1021) if crc & 0x8000 else <uint16_t>(crc << 1)
        _crc_table[i] = crc


_fill_crc_table()


cdef int _slot(bytes key) noexcept:
    cdef const char* at = PyBytes_AS_STRING(key)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(key)
    cdef const char* opened = <const char*>memchr(at, c'{', size)
    cdef const char* closed
    cdef uint16_t crc = 0
    cdef Py_ssize_t i
    if opened != NULL:
        closed = <const char*>memchr(opened + 1, c'}', size - (opened + 1 - at))
        if closed != NULL and closed > opened + 1:
            at = opened + 1
            size = closed - at
    for i in range(size):
        crc = <uint16_t>((crc << 8) ^ _crc_table[((crc >> 8) ^ <uint8_t>at[i]) & 0xFF])
    return crc & 0x3FFF


def key_slot(bytes key not None):
    """The slot (0 to 16383) of `key` in a Redis Cluster."""
    return _slot(key)


def by_owner(list keys not None, list places not None, list owners not None):
    """Which owner serves which keys: `[(owner, places), …]`, of the `places` in `keys`.

    `owners` names the owner of each of the 16384 slots, always by the same object: they are told
    apart by identity, which costs less than comparing them.
    """
    if len(owners) != 16384:
        raise ValueError(f"owners of {len(owners)} slots, expected 16384")
    cdef list found = []
    cdef list groups = []
    cdef object owner
    cdef bytes key
    cdef Py_ssize_t n = 0
    for place in places:
        key = <bytes?>_at(keys, place)
        owner = _at(owners, _slot(key))
        if not found or found[n] is not owner:
            n = 0
            while n < len(found) and found[n] is not owner:
                n += 1
            if n == len(found):
                found.append(owner)
                groups.append([])
        (<list>groups[n]).append(place)
    return list(zip(found, groups))


def scatter(list replies not None, list places not None, list part not None):
    """Puts the replies to commands in their places; whether there is an error among them."""
    cdef Py_ssize_t n, place
    cdef bint errors = False
    if len(places) != len(part):
        raise ValueError(f"{len(part)} replies to {len(places)} commands")
    for n in range(len(places)):
        reply = _at(part, n)
        errors = errors or type(reply) is ReplyError
        place = _at(places, n)
        if not 0 <= place < len(replies):
            raise _no_place(place, replies)
        replies[place] = reply
    return errors
