"""The Lua scripts: few, short, each bounded to about a hundred entries or locks a call.

Costs are server CPU a lock or entry, seen on Redis 7.0 with calls of 100.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relstream._core import ITEM, Template, first_error, pack, scatter
from relstream.errors import ReplyError

if TYPE_CHECKING:
    from relstream.net.topology import KeyConnection, Topology

SCRIPT_KEYS = 100
"""At most so many locks or entries a call keep it well under a millisecond of server time."""


class Script:
    """A script, sent by its digest (EVALSHA), and whole (EVAL) where that is not known."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()


# KEYS: locks; ARGV: value, TTL in ms. Returns places of locks not renewed: negative where somebody
# else holds the lock. About 0.9 us a lock.
RENEW = Script("""\
local values = redis.call('MGET', unpack(KEYS))
local failed = {}
for i = 1, #KEYS do
  if values[i] == ARGV[1] then
    redis.call('PEXPIRE', KEYS[i], ARGV[2])
  else
    failed[#failed + 1] = values[i] and -i or i
  end
end
return failed
""")

# KEYS: locks; ARGV: value. Returns places of locks that were not ours. About 0.6 us a lock.
RELEASE = Script("""\
local values = redis.call('MGET', unpack(KEYS))
local ours, others = {}, {}
for i = 1, #KEYS do
  if values[i] == ARGV[1] then
    ours[#ours + 1] = KEYS[i]
  else
    others[#others + 1] = i
  end
end
if #ours > 0 then
  redis.call('DEL', unpack(ours))
end
return others
""")

# The same for one lock: 1 (done), 0 (gone) or -1 (somebody else's). In a cluster hardly two locks
# share a slot. MGET, as GET would fail where something else than a string is in the way. About 5.4
# and 5.1 us; the scripts for many would take 6.6 and 5.8.
RENEW_ONE = Script("""\
local value = redis.call('MGET', KEYS[1])[1]
return value == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2]) or value and -1 or 0
""")
RELEASE_ONE = Script("""\
local value = redis.call('MGET', KEYS[1])[1]
return value == ARGV[1] and redis.call('DEL', KEYS[1]) or value and -1 or 0
""")

# KEYS: the load balancer stream, a receipt, then, where one server has all, the lock of each entry;
# ARGV: group, consumer, a token, ms for which the receipt is kept, the least and the greatest of
# the entries' ids, how many ids, the ids. XACK, XDEL and the release, all in one step. An entry
# whose lock is ours is ours, one whose lock is another's is not; one without, only if it is pending
# for us. That is asked for all at once, as many as these are, at 0.5 to 0.9 us each; what others of
# ours push out is asked for one by one, at 2.4 to 3.7 us. Returns the token, then the places whose
# given locks were not ours: negative where the entry was lost. The receipt keeps that for a call
# that is sent again, as its answer got lost. About 6 us a stream.
_FINISH = """\
local call, unpack, stream, group, token = redis.call, unpack, KEYS[1], ARGV[1], ARGV[3]
--begin
local values = call('MGET', unpack(KEYS, 2))
if values[1] and string.sub(values[1], 1, #token) == token then
  return values[1]
end
local size = tonumber(ARGV[7])
local pending, all = nil, nil
local ids, locks, others = {}, {}, {}
for i = 1, size do
  local id, holder, mine = ARGV[i + 7], values[i + 1], nil
  if not holder then
    if not pending then
      local page = redis.pcall('XPENDING', stream, group, ARGV[5], ARGV[6], size, ARGV[2])
      if page.err and not string.find(page.err, 'NOGROUP', 1, true) then
        return page
      end
      pending, all = {}, #page < size
      for j = 1, #page do
        pending[page[j][1]] = true
      end
    end
    mine = pending[id] or not all and call('XPENDING', stream, group, id, id, 1, ARGV[2])[1]
  end
  if holder == ARGV[2] or mine then
    ids[#ids + 1] = id
    --ours
    if holder then
      locks[#locks + 1] = KEYS[i + 2]
    elseif #KEYS > 2 then
      others[#others + 1] = i
    end
  else
    others[#others + 1] = -i
  end
end
if #ids > 0 then
  --first
  call('XACK', stream, group, unpack(ids))
  call('XDEL', stream, unpack(ids))
end
if #locks > 0 then
  call('DEL', unpack(locks))
end
local said = token .. table.concat(others, ' ')
redis.pcall('SET', KEYS[2], said, 'PX', ARGV[4])  -- out of memory, and nothing was ours
return said
"""
FINISH = Script(_FINISH)

# The same for streams that failed, whose entries wait in a sorted set, the last of KEYS; behind the
# ids when each is due, and what it is then. Where that can't be written nothing else is done. The
# XACK changes nothing: out of memory a script that has written may add, another one not. About
# 1.5 us a stream more.
FAIL = Script(
    _FINISH.replace("--begin", "local delayed, due = table.remove(KEYS), {}")
    .replace(
        "--ours",
        "due[#due + 1], due[#due + 2] = ARGV[2 * i + size + 6], ARGV[2 * i + size + 7]",
    )
    .replace(
        "--first",
        """call('XACK', stream, group, '0-0')
  local added = redis.pcall('ZADD', delayed, unpack(due))
  if type(added) == 'table' then
    return added
  end""",
    )
)

# KEYS: the load balancer stream, the sorted set of what is delayed; ARGV: how many entries to add
# again at most, and about how many bytes. What is due by the server's own clock is added to the
# stream and taken out of the set; what is no delayed entry becomes one that announces nothing.
# Returns how many were, and why the next one can't be: "" where it has more fields than Lua can
# pass on. About 6 us an entry.
MOVE_DUE = Script("""\
local function unpacked(member)
  local ok, fields = pcall(cmsgpack.unpack, member)
  if not ok or type(fields) ~= 'table' or #fields < 3 or #fields % 2 == 0 then
    return {'', 'lbs-input', member}
  end
  for i = 1, #fields do
    if type(fields[i]) ~= 'string' then
      return {'', 'lbs-input', member}
    end
  end
  return fields
end
local call, unpack, stream, delayed = redis.call, unpack, KEYS[1], KEYS[2]
local most, room, moved = tonumber(ARGV[1]), tonumber(ARGV[2]), 0
local time = call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
while moved < most and room > 0 do
  local due = call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, math.min(10, most - moved))
  if #due == 0 then
    break
  end
  call('ZREM', delayed, '')  -- so that what follows may add out of memory
  local gone, why = {}, nil
  for i = 1, #due do
    local fields = unpacked(due[i])
    local added = {err = ''}
    if #fields < 7000 then
      added = redis.pcall('XADD', stream, '*', unpack(fields, 2))
    end
    if type(added) == 'table' then
      why = added.err
      break
    end
    gone[i] = due[i]
    room = room - #due[i]
  end
  if #gone > 0 then
    call('ZREM', delayed, unpack(gone))
    moved = moved + #gone
  end
  if why then
    return {moved, why}
  end
end
return {moved}
""")

# KEYS: the load balancer stream, then, if there is a fence, the leader key, then, if they shall be
# free, the lock of each entry; ARGV: group, how many arguments the fields of each entry are, the
# fence or "", then for each its id and its fields. Nothing is done where the leader key has another
# value than the fence: then whoever judged the owners dead leads no more, or not since then. An
# entry is added again only if nobody holds its lock and it was pending until now, all in one step:
# there is no moment at which a crash could lose it. What can't be added stays as it was. One
# without fields is only taken away. Returns for each 1 (put back), 0 (was not pending), 2 (locked),
# -1 (more fields than Lua can pass on) or the error that adding it met. The first XACK changes
# nothing: out of memory a script that has written may add, another one not.
REQUEUE = Script("""\
local call, unpack, stream, group, size = redis.call, unpack, KEYS[1], ARGV[1], tonumber(ARGV[2])
local locks = #KEYS > 1 and call('MGET', unpack(KEYS, 2)) or {}
if ARGV[3] ~= '' and table.remove(locks, 1) ~= ARGV[3] then
  return redis.error_reply('FENCED another consumer leads by now')
end
local outcome, won = {}, {}
local n = 0
call('XACK', stream, group, '0-0')
for i = 4, #ARGV, size + 1 do
  n = n + 1
  local id = ARGV[i]
  local added = true
  if locks[n] then
    outcome[n] = 2
  elseif size >= 7000 then
    outcome[n] = -1
  else
    if size > 0 then
      added = redis.pcall('XADD', stream, '*', unpack(ARGV, i + 1, i + size))
    end
    if type(added) == 'table' then
      outcome[n] = added.err
    else
      outcome[n] = call('XACK', stream, group, id)
      won[#won + 1] = outcome[n] == 1 and id or added ~= true and added or nil
    end
  end
end
if #won > 0 then
  call('XDEL', stream, unpack(won))
end
return outcome
""")

# KEYS: the load balancer stream; ARGV: group, consumer. Removes a consumer from the group, if
# nothing is pending for it. Returns 1 if it did.
REMOVE_CONSUMER = Script("""\
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
  return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
""")


async def run(
    link: KeyConnection,
    script: Script,
    calls: Sequence[tuple[Sequence[bytes], Sequence[bytes | str | int]]],
) -> list[Any]:
    """Runs a script once for each `(keys, args)`, pipelined; returns the replies, errors as values.

    Where the server does not know it (a restart, SCRIPT FLUSH) it learns it by that.
    """
    return await run_packed(
        link,
        script,
        [pack(b"EVALSHA", script.digest, len(keys), *keys, *args) for keys, args in calls],
    )


async def run_packed(link: KeyConnection, script: Script, commands: Sequence[bytes]) -> list[Any]:
    """The same for packed EVALSHA commands."""
    replies = await link.pipeline(b"".join(commands), len(commands))
    missing = _missing(replies)
    if missing:
        known, whole = _head(b"EVALSHA", script.digest), _head(b"EVAL", script.source)
        packed = b"".join([commands[place].replace(known, whole, 1) for place in missing])
        scatter(replies, missing, await link.pipeline(packed, len(missing)))
    return replies


async def run_each(
    topology: Topology, script: Script, keys: list[bytes], args: Sequence[bytes | int]
) -> list[Any]:
    """Runs a script once for each key, wherever that is; else as `run`."""
    replies = await topology.each(Template(b"EVALSHA", script.digest, 1, ITEM, *args).pack, keys)
    missing = _missing(replies)
    if missing:
        whole = Template(b"EVAL", script.source, 1, ITEM, *args)
        again = await topology.each(whole.pack, [keys[place] for place in missing])
        scatter(replies, missing, again)
    return replies


def _head(name: bytes, what: bytes) -> bytes:
    """How a packed command starts that runs a script, behind the number of its arguments."""
    return b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(what), what)


def _missing(replies: list[Any]) -> list[int]:
    """Places of replies that say that the script is unknown."""
    if first_error(replies) is None:
        return []
    return [
        place
        for place, reply in enumerate(replies)
        if isinstance(reply, ReplyError) and reply.code == "NOSCRIPT"
    ]
