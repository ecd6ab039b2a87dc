-- find_or_create: find or create one entry's service, state and task in one atomic step.
--
-- Braces are literal: they are the cluster hash tag, here the bucket of the service.
-- KEYS[1]   sequence   cs:{12630}:seq               string, the n of the bucket's last id
-- KEYS[2]   ids        cs:{12630}:ids               hash, service id -> identity
-- KEYS[3]   tree       cs:{12630}:tree:<identity>   hash, the active service with its states and tasks
-- ARGV[1]   token      16 hexadecimal digits: which entry of which request this is
-- ARGV[2]   now        the worker's clock: 2026-01-31T08:30:00.000Z
-- ARGV[3]   on_found   "keep", or to merge, for how many seconds updates are remembered
-- ARGV[4]   task       "none", "alone", or "associated": if it is created here, it records the state's id
-- ARGV[5]   update     12 bytes: the token in 8, and now, in seconds since 1970, in 4; both big-endian
-- ARGV[6..] the service, the state and, if there is one, the task, each as
--             at, record
--           and then the attached data of all of them, each as
--             name, JSON
--           or packed in one argument: an array in MessagePack with a text for each of them, which is a sequence of
--             key, JSON
--
-- The tree's fields:
--   <at>         service, state:<type>, task:<type>: what is active, as <id>:<token>:<updated>. The token is that of the
--                entry that created it, updated the time when it was last written to, which never goes back.
--   <id>         the object's record, a JSON object that never changes
--   <at>/<key>   its attached data, JSON; that is the name above. In a type, / is escaped, and a long one is a digest.
--   recent       the latest updates, as they came in ARGV[5], oldest first; absent until something is merged onto the service
--   recent:<x>   in place of recent, where they are many: those whose token begins with the hexadecimal digit x
-- One field for all that never changes: a field costs Redis some 60 bytes and a microsecond, whatever is in it.
--
-- Returns "<service_id> <created> <state_id> <created>[ <task_id> <created>][ moved]", created being 0 for what was found,
-- 1 for what is created now, 2 for what this same entry created when it came before, and 3 for what it found then; moved
-- says that the sequence was lost or set back, and was moved on to ids that are free.
-- Returns the error BADTREE if a pointer or recent cannot be read, and BADSEQUENCE if the next id would not be one or
-- none that is free was found: someone else wrote to the tree or to the sequence.
--
-- With ARGV[1] = "PROBE", and nothing behind it, it is a probe: it tries every command that it uses over keys that nothing
-- else uses, and changes nothing, since each write is one that Redis objects to for its arguments, when all that could
-- forbid a write has been looked at. Returns "PROBE", or the error "PROBE <command> <error>".
--
-- Safe to repeat: an entry is applied once, so that a repeat never overwrites what others have written since. One that
-- created anything is recognised by the token in the pointer of what it created. One that created nothing, and merged its
-- attached data onto what it found, leaves its token in recent. An entry without attached data overwrites nothing.
--
-- An update is forgotten when it is older than what is to be remembered, and pauses between updates count as no more than
-- half of that: an outage does not make a service forget the updates just before it. Clocks of workers may differ, and
-- a call that was given up may run late, with an old time; so of two times that run back only the earlier counts.
--
-- The sequence may be deleted, evicted or set back, and its ids given out before: no record is ever overwritten. It is lost
-- if it begins anew though the bucket has services, or if an id that it gives is one of a service of the bucket, or of
-- this tree. Then it goes on at 64 times the seconds since 1970: beyond all that was given out, unless a bucket creates
-- more than 64 objects a second. No scan is needed for that.
--
-- The tree is read and checked before anything is written, and it is written last: a script that fails half way
-- (a key of another type, for instance) costs an unused id and never leaves half a service.
--
-- Lua is most of what a call costs: each table that grows, each pattern with captures and each byte of a new string
-- shows. So the arguments themselves become what is written: the pointer takes the place of the record behind its at,
-- and from there to the end they are the fields of the tree. Packed, they are unpacked and written part by part.

local SEQUENCE, IDS, TREE = KEYS[1], KEYS[2], KEYS[3]
if ARGV[1] == 'PROBE' then
  local tried = {
    'HMGET', redis.pcall('HMGET', TREE, 'probe'),
    'HLEN', redis.pcall('HLEN', IDS),
    'INCRBY', redis.pcall('INCRBY', SEQUENCE, 'probe'),
    'HSET', redis.pcall('HSET', IDS, 'probe', '', 'probe'),
    'HSET', redis.pcall('HSET', TREE, 'probe', '', 'probe')
  }
  for at = 1, #tried, 2 do
    local error = type(tried[at + 1]) == 'table' and tried[at + 1].err
    -- A key of another type, too, shows that the command is allowed.
    local is_proof = not error
    for _, text in ipairs({ 'WRONGTYPE', 'value is not an integer', 'wrong number of arguments for' }) do
      is_proof = is_proof or string.find(error, text, 1, true)
    end
    if not is_proof then
      return redis.error_reply('PROBE ' .. tried[at] .. ' ' .. error)
    end
  end
  return 'PROBE'
end
local token, now = ARGV[1], ARGV[2]
local merge, associated = ARGV[3] ~= 'keep', ARGV[4] == 'associated'
-- By kind: 1 is the service, 2 the state, 3 the task. Its at is ARGV[4 + 2 * kind], its record the next.
local kinds = ARGV[4] == 'none' and 2 or 3
local data, last = 6 + 2 * kinds, #ARGV
local updates, packed = merge and last >= data, last == data
-- Of a pointer: an id has at most so many digits, behind it are so many bytes, and so many of them are the time.
local ID, BEHIND_ID, UPDATED = 16, 42, 24
-- Bytes of an update, and of the token it begins with. Those too old are looked for when there are a multiple of so many.
local UPDATE, TOKEN, LOOKED_AT = 12, 8, 8
-- Lua hands at most some 8,000 values to one call.
local CHUNK = 4000
local find, sub = string.find, string.sub

-- Where nothing is merged recent is not asked for, since it may be long, but a field that never is.
local found
if kinds == 3 then
  found = redis.call('HMGET', TREE, ARGV[6], ARGV[8], ARGV[10], updates and 'recent' or '')
else
  found = redis.call('HMGET', TREE, ARGV[6], ARGV[8], updates and 'recent' or '')
end

-- What there is; by kind, too. A pointer is refreshed on the way, for the case that it is written.
local ids, created = { false, false, false }, { ' 0', ' 0', ' 0' }
local missing, applied = 0, false
for kind = 1, kinds do
  local pointer = found[kind]
  if pointer then
    local _, colon = find(pointer, '^[1-9]%d*:')
    if not colon or colon > ID + 1 or #pointer ~= colon - 1 + BEHIND_ID then
      local name = string.match(ARGV[4 + 2 * kind], '^%a+')
      return redis.error_reply('BADTREE the pointer of a ' .. name .. ' cannot be read')
    end
    ids[kind] = sub(pointer, 1, colon - 1)
    if find(pointer, token, colon, true) then
      created[kind], applied = ' 2', true
    end
    if merge then
      local refreshed = sub(pointer, 1, -UPDATED - 1) .. now
      -- In a service time does not run back, whatever clock a call has. Both differ in digits at the same places alone,
      -- so the later is the greater in every locale's order. The service's is the latest: every merge writes to it.
      if kind == 1 and refreshed < pointer then
        refreshed, now = pointer, sub(pointer, -UPDATED)
      end
      ARGV[5 + 2 * kind] = refreshed
    end
  else
    missing = missing + 1
  end
end

-- Updates that are many are spread over fields of their own, recent being empty: this call's is one of them.
local recent, updates_in = updates and found[kinds + 1], 'recent'
if recent and not applied then
  if recent == '' then
    updates_in = 'recent:' .. sub(token, 1, 1)
    recent = redis.call('HMGET', TREE, updates_in)[1] or ''
  end
  if #recent % UPDATE ~= 0 then
    return redis.error_reply('BADTREE the recent updates of a service cannot be read')
  end
  -- The bytes of one token may stand across two others, too.
  local own = sub(ARGV[5], 1, TOKEN)
  local at = find(recent, own, 1, true)
  while at and at % UPDATE ~= 1 do
    at = find(recent, own, at + 1, true)
  end
  if at then
    created, applied = { ' 3', ' 3', ' 3' }, true
  end
end

local records, moved = nil, ''
if missing > 0 then
  local BUCKETS = 16384
  -- The last n whose id is below 2^53: ids beyond it are rounded, and two objects would share one.
  local LAST = 2 ^ 39 - 1
  -- Where a lost sequence goes on, by the second; and how often, and how far, it goes on further if that is not free.
  local IDS_A_SECOND, MOVES, FURTHER = 64, 3, 64 * 86400
  local given = redis.call('INCRBY', SEQUENCE, missing) - missing
  local bucket = string.match(SEQUENCE, '{(%d+)}:seq$')
  local first, lost = given, given == 0 and redis.call('HLEN', IDS) > 0
  for move = 0, MOVES do
    if lost then
      first = math.max(first, IDS_A_SECOND * struct.unpack('>I4', ARGV[5], TOKEN + 1)) + (move > 1 and FURTHER or 0)
      moved = ' moved'
    end
    if first < 0 or first + missing > LAST then
      return redis.error_reply('BADSEQUENCE the sequence of bucket ' .. bucket .. ' gives no id')
    end
    local n = first
    for kind = 1, kinds do
      if not found[kind] then
        n = n + 1
        -- Not tostring: it rounds at 14 digits.
        ids[kind] = string.format('%.0f', n * BUCKETS + bucket)
      end
    end
    if not found[1] then
      -- The tree's key goes on with the identity where that of the ids ends: `ids` against `tree:`.
      lost = redis.call('HMGET', IDS, ids[1])[1]
      if not lost then
        redis.call('HSET', IDS, ids[1], sub(TREE, #IDS + 3))
      end
    else
      -- The new ids, or the new one twice.
      local used = redis.call('HMGET', TREE, found[2] and ids[kinds] or ids[2], found[kinds] and ids[2] or ids[kinds])
      lost = used[1] or used[2]
    end
    if not lost then
      break
    end
  end
  if first > given then
    redis.call('INCRBY', SEQUENCE, first - given)
  end
  if lost then
    return redis.error_reply('BADSEQUENCE the sequence of bucket ' .. bucket .. ' gives ids that are in use')
  end
  records = {}
  for kind = 1, kinds do
    if not found[kind] then
      local record = ARGV[5 + 2 * kind]
      if kind == 3 and associated then
        record = sub(record, 1, -2) .. ',"state_id":' .. ids[2] .. '}'
      end
      created[kind] = ' 1'
      records[#records + 1], records[#records + 2] = ids[kind], record
      ARGV[5 + 2 * kind] = ids[kind] .. ':' .. token .. ':' .. now
    end
  end
end

-- What is found is left alone, unless this merges, and for the first time.
local all = merge and not applied
if packed then
  last = data - 1
  for kind, text in ipairs(cmsgpack.unpack(ARGV[data])) do
    local offset = 0
    if text ~= '' and (all or not found[kind]) then
      local begin = ARGV[4 + 2 * kind] .. '/'
      while offset >= 0 do
        -- The next offset, or -1, and then what stands here.
        local part = { cmsgpack.unpack_limit(text, CHUNK, offset) }
        offset = part[1]
        for name = 2, #part, 2 do
          part[name] = begin .. part[name]
        end
        redis.call('HSET', TREE, unpack(part, 2))
      end
    end
  end
end

local writes, from = ARGV, 6
if missing < kinds and not all then
  local fields = last
  writes, from, last = {}, 1, 0
  for kind = 1, kinds do
    if not found[kind] then
      local at = ARGV[4 + 2 * kind]
      writes[last + 1], writes[last + 2] = at, ARGV[5 + 2 * kind]
      last = last + 2
      for name = data, fields, 2 do
        if sub(ARGV[name], 1, #at + 1) == at .. '/' then
          writes[last + 1], writes[last + 2] = ARGV[name], ARGV[name + 1]
          last = last + 2
        end
      end
    end
  end
elseif updates and missing == 0 then
  if not recent then
    recent = ARGV[5]
  elseif #recent % (UPDATE * LOOKED_AT) ~= 0 then
    recent = recent .. ARGV[5]
  else
    -- So many updates are together before they are spread over so many fields.
    local TOGETHER, FIELDS = 64, 16
    -- At so many updates a second none is forgotten early; beyond that the oldest are. A field has room for more than its
    -- share, since tokens are not spread evenly.
    local UPDATES_A_SECOND, SHARE = 20, 1.5 / FIELDS
    -- From the latest back to the first that is too old, or one too many.
    local remembered, most = tonumber(ARGV[3]), TOGETHER
    if updates_in ~= 'recent' then
      most = math.ceil(UPDATES_A_SECOND * remembered * SHARE)
    end
    local earliest, age, at = struct.unpack('>I4', ARGV[5], TOKEN + 1), 0, #recent + 1
    while at > 1 and #recent - at < UPDATE * most do
      local time = struct.unpack('>I4', recent, at - UPDATE + TOKEN)
      age = age + math.min(math.max(earliest - time, 0), remembered / 2)
      if age > remembered then
        break
      end
      earliest, at = math.min(earliest, time), at - UPDATE
    end
    recent = sub(recent, at) .. ARGV[5]
    if updates_in == 'recent' and #recent > UPDATE * TOGETHER then
      local fields = {}
      for update = 1, #recent, UPDATE do
        local name = string.format('recent:%x', math.floor(string.byte(recent, update) / FIELDS))
        fields[name] = (fields[name] or '') .. sub(recent, update, update + UPDATE - 1)
      end
      for name, some in pairs(fields) do
        ARGV[last + 1], ARGV[last + 2] = name, some
        last = last + 2
      end
      recent = ''
    end
  end
  ARGV[last + 1], ARGV[last + 2] = updates_in, recent
  last = last + 2
end
if records then
  for of = 1, #records do
    writes[last + of] = records[of]
  end
  last = last + #records
end
for first = from, last, CHUNK do
  redis.call('HSET', TREE, unpack(writes, first, first + CHUNK > last and last or first + CHUNK - 1))
end

local answer = ids[1] .. created[1] .. ' ' .. ids[2] .. created[2]
if kinds == 3 then
  answer = answer .. ' ' .. ids[3] .. created[3]
end
return answer .. moved
