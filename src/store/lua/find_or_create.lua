-- find_or_create: find or create one entry's service, state and task in one atomic step.
--
-- Braces are literal: they are the cluster hash tag, here the bucket of the service.
-- KEYS[1]   sequence   cs:{12630}:seq               string, the n of the bucket's last id
-- KEYS[2]   ids        cs:{12630}:ids               hash, service id -> identity
-- KEYS[3]   tree       cs:{12630}:tree:<identity>   hash, the active service with its states and tasks
-- ARGV[1]   token      16 hexadecimal digits: which entry of which request this is
-- ARGV[2]   now        the worker's clock: 2026-01-31T08:30:00.000Z
-- ARGV[3]   on_found   "merge" or "keep"
-- ARGV[4]   task       "none", "alone", or "associated": if it is created here, it records the state's id
-- ARGV[5..] the service, the state and, if there is one, the task, each as
--             at, record
--           and then the attached data of all of them, each as
--             name, JSON
--
-- The tree's fields:
--   <at>         service, state:<type>, task:<type>: what is active, as <id>:<token>:<updated>. The token is that of the
--                entry that created it, updated the time when it was last written to.
--   <id>         the object's record, a JSON object that never changes
--   <at>/<key>   its attached data, JSON; that is the name above. In a type, / is escaped.
-- One field for all that never changes: a field costs Redis some 60 bytes and a microsecond, whatever is in it.
--
-- Returns "<service_id> <created> <state_id> <created>[ <task_id> <created>]", created being 0 for what was found, 1 for
-- what is created now, and 2 for what this same entry created when it came before.
-- Returns the error BADTREE if a pointer cannot be read, and BADSEQUENCE if the next id would not be one: someone else
-- wrote to the tree or to the sequence.
--
-- With ARGV[1] = "PROBE", and nothing behind it, it is a probe: it tries every command that it uses over keys that nothing
-- else uses, and changes nothing, since each write is one that Redis objects to for its arguments, when all that could
-- forbid a write has been looked at. Returns "PROBE", or the error "PROBE <command> <error>".
--
-- Safe to repeat: an entry that created anything is recognised by its token. It is told "created" again, and is not
-- merged a second time, so that a repeat never overwrites what others have written since.
--
-- The tree is read and checked before anything is written, and it is written last: a script that fails half way
-- (a key of another type, for instance) costs an unused id and never leaves half a service.
--
-- Lua is most of what a call costs: each table that grows, each pattern with captures and each byte of a new string
-- shows. So the arguments themselves become what is written: the pointer takes the place of the record behind its at,
-- and from there to the end they are the fields of the tree.

local SEQUENCE, IDS, TREE = KEYS[1], KEYS[2], KEYS[3]
if ARGV[1] == 'PROBE' then
  local tried = {
    'HMGET', redis.pcall('HMGET', TREE, 'probe'),
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
local merge, associated = ARGV[3] == 'merge', ARGV[4] == 'associated'
-- By kind: 1 is the service, 2 the state, 3 the task. Its at is ARGV[3 + 2 * kind], its record the next.
local kinds = ARGV[4] == 'none' and 2 or 3
local data, last = 5 + 2 * kinds, #ARGV
local BUCKETS = 16384
-- The last n whose id is below 2^53: ids beyond it are rounded, and two objects would share one.
local LAST = 2 ^ 39 - 1
-- Of a pointer: an id has at most so many digits, behind it are so many bytes, and so many of them are the time.
local ID, BEHIND_ID, UPDATED = 16, 42, 24
-- Lua hands at most some 8,000 values to one call.
local CHUNK = 4000
local find, sub = string.find, string.sub

local found
if kinds == 3 then
  found = redis.call('HMGET', TREE, ARGV[5], ARGV[7], ARGV[9])
else
  found = redis.call('HMGET', TREE, ARGV[5], ARGV[7])
end

-- What there is; by kind, too. A pointer is refreshed on the way, for the case that it is written.
local ids, created = { false, false, false }, { ' 0', ' 0', ' 0' }
local missing, applied = 0, false
for kind = 1, kinds do
  local pointer = found[kind]
  if pointer then
    local _, colon = find(pointer, '^[1-9]%d*:')
    if not colon or colon > ID + 1 or #pointer ~= colon - 1 + BEHIND_ID then
      local name = string.match(ARGV[3 + 2 * kind], '^%a+')
      return redis.error_reply('BADTREE the pointer of a ' .. name .. ' cannot be read')
    end
    ids[kind] = sub(pointer, 1, colon - 1)
    if find(pointer, token, colon, true) then
      created[kind], applied = ' 2', true
    end
    ARGV[4 + 2 * kind] = sub(pointer, 1, -UPDATED - 1) .. now
  else
    missing = missing + 1
  end
end

local writes, from, records = ARGV, 5, nil
if missing > 0 then
  local n = redis.call('INCRBY', SEQUENCE, missing) - missing
  local bucket = string.match(SEQUENCE, '{(%d+)}:seq$')
  if n < 0 or n + missing > LAST then
    return redis.error_reply('BADSEQUENCE the sequence of bucket ' .. bucket .. ' gives no id')
  end
  records = {}
  for kind = 1, kinds do
    if not found[kind] then
      n = n + 1
      -- Not tostring: it rounds at 14 digits.
      local id, record = string.format('%.0f', n * BUCKETS + bucket), ARGV[4 + 2 * kind]
      if kind == 1 then
        -- The tree's key goes on with the identity where that of the ids ends: `ids` against `tree:`.
        redis.call('HSET', IDS, id, sub(TREE, #IDS + 3))
      elseif kind == 3 and associated then
        record = sub(record, 1, -2) .. ',"state_id":' .. ids[2] .. '}'
      end
      ids[kind], created[kind] = id, ' 1'
      records[#records + 1], records[#records + 2] = id, record
      ARGV[4 + 2 * kind] = id .. ':' .. token .. ':' .. now
    end
  end
end

if missing < kinds and (applied or not merge) then
  -- What is found is left alone.
  writes, from, last = {}, 1, 0
  for kind = 1, kinds do
    if not found[kind] then
      local at = ARGV[3 + 2 * kind]
      writes[last + 1], writes[last + 2] = at, ARGV[4 + 2 * kind]
      last = last + 2
      for name = data, #ARGV, 2 do
        if sub(ARGV[name], 1, #at + 1) == at .. '/' then
          writes[last + 1], writes[last + 2] = ARGV[name], ARGV[name + 1]
          last = last + 2
        end
      end
    end
  end
end
if records then
  for of = 1, #records do
    writes[last + of] = records[of]
  end
  last = last + #records
end
for first = from, last, CHUNK do
  redis.call('HSET', TREE, unpack(writes, first, math.min(first + CHUNK - 1, last)))
end

local answer = ids[1] .. created[1] .. ' ' .. ids[2] .. created[2]
if kinds == 3 then
  answer = answer .. ' ' .. ids[3] .. created[3]
end
return answer
