-- find_or_create: find or create one entry's service, state and task in one atomic step.
--
-- Braces are literal: they are the cluster hash tag, here the bucket of the service.
-- KEYS[1]   sequence   cs:{12630}:seq               string, the n of the bucket's last id
-- KEYS[2]   ids        cs:{12630}:ids               hash, service id -> identity
-- KEYS[3]   tree       cs:{12630}:tree:<identity>   hash, the active service with its states and tasks
-- ARGV[1]   bucket     0 to 16383; every id is n * 16384 + bucket
-- ARGV[2]   token      16 hexadecimal digits: which entry of which request this is
-- ARGV[3]   now        the worker's clock: 2026-01-31T08:30:00.000Z
-- ARGV[4]   on_found   "merge" or "keep"
-- ARGV[5]   associate  "1": a task created here records the state's id
-- ARGV[6..] the service, the state and, if the entry has one, the task, each as
--             at, record, number of data, key, JSON, key, JSON, ...
--
-- The tree:
--   <at>         service, state:<type>, task:<type>: what is active, as <id>:<token>:<updated>. The token is that of the
--                entry that created it, updated the time when it was last written to.
--   <id>         the object's record, a JSON object that never changes
--   <id>.<key>   its attached data, JSON
-- One field for all that never changes: a field costs Redis some 60 bytes and a microsecond, whatever is in it.
--
-- Returns "<service_id> <created> <state_id> <created>[ <task_id> <created>]", created being 1 or 0.
-- Returns the error BADTREE if a pointer cannot be read, and BADSEQUENCE if the next id would not be one: someone else
-- wrote to the tree or to the sequence.
--
-- Safe to repeat: an entry that created anything is recognised by its token. It is told "created" again, and is not
-- merged a second time, so that a repeat never overwrites what others have written since.
--
-- The tree is read and checked before anything is written, and it is written last: a script that fails half way
-- (a key of another type, for instance) costs an unused id and never leaves half a service.

local SEQUENCE, IDS, TREE = KEYS[1], KEYS[2], KEYS[3]
local bucket, token, now = ARGV[1], ARGV[2], ARGV[3]
local merge, associate = ARGV[4] == 'merge', ARGV[5] == '1'
local BUCKETS = 16384
-- The last n whose id is below 2^53: ids beyond it are rounded, and two objects would share one.
local LAST = 2 ^ 39 - 1
-- Lua hands at most some 8,000 values to one call.
local CHUNK = 4000

-- Where the arguments of each object begin: its name, its record, how many data, the data.
local service = 6
local state = service + 3 + 2 * ARGV[service + 2]
local task = state + 3 + 2 * ARGV[state + 2]
local starts, pointers = { service, state }, nil
if ARGV[task] then
  starts[3] = task
  pointers = redis.call('HMGET', TREE, ARGV[service], ARGV[state], ARGV[task])
else
  pointers = redis.call('HMGET', TREE, ARGV[service], ARGV[state])
end

-- By kind: 1 is the service, 2 the state, 3 the task. What this entry makes or made has its token.
local ids, tokens = {}, {}
local missing, applied = 0, false
for kind = 1, #starts do
  local pointer = pointers[kind]
  if pointer then
    local id, creator = string.match(pointer, '^([1-9]%d*):(%x+):')
    if not id or #id > 16 then
      local name = string.match(ARGV[starts[kind]], '^%a+')
      return redis.error_reply('BADTREE the pointer of a ' .. name .. ' cannot be read')
    end
    ids[kind], tokens[kind] = id, creator
    applied = applied or creator == token
  else
    missing = missing + 1
  end
end

local n = 0
if missing > 0 then
  n = redis.call('INCRBY', SEQUENCE, missing) - missing
  if n < 0 or n + missing > LAST then
    return redis.error_reply('BADSEQUENCE the sequence of bucket ' .. bucket .. ' gives no id')
  end
end

local writes, count = {}, 0
for kind = 1, #starts do
  local start, id = starts[kind], ids[kind]
  local writes_data = merge and not applied
  if not id then
    n = n + 1
    -- Not tostring: it rounds at 14 digits.
    id = string.format('%.0f', n * BUCKETS + bucket)
    ids[kind], tokens[kind] = id, token
    local record = ARGV[start + 1]
    if kind == 1 then
      -- The tree's key goes on with the identity where that of the ids ends: `ids` against `tree:`.
      redis.call('HSET', IDS, id, string.sub(TREE, #IDS + 3))
    elseif kind == 3 and associate then
      record = string.sub(record, 1, -2) .. ',"state_id":' .. ids[2] .. '}'
    end
    writes[count + 1], writes[count + 2] = id, record
    count = count + 2
    writes_data = true
  end
  if writes_data then
    writes[count + 1], writes[count + 2] = ARGV[start], id .. ':' .. tokens[kind] .. ':' .. now
    count = count + 2
    for at = start + 3, start + 1 + 2 * ARGV[start + 2], 2 do
      writes[count + 1], writes[count + 2] = id .. '.' .. ARGV[at], ARGV[at + 1]
      count = count + 2
    end
  end
end

for from = 1, count, CHUNK do
  redis.call('HSET', TREE, unpack(writes, from, math.min(from + CHUNK - 1, count)))
end

local answer = ids[1] .. (tokens[1] == token and ' 1 ' or ' 0 ') .. ids[2] .. (tokens[2] == token and ' 1' or ' 0')
if ids[3] then
  answer = answer .. ' ' .. ids[3] .. (tokens[3] == token and ' 1' or ' 0')
end
return answer
