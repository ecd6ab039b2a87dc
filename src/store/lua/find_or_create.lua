-- find_or_create: find or create one entry's service, state and task in one atomic step.
--
-- Braces are literal: they are the cluster hash tag, here the bucket of the service.
-- KEYS[1]   sequence   cs:{12630}:seq               string, the n of the bucket's last id
-- KEYS[2]   ids        cs:{12630}:ids               hash, service id -> identity
-- KEYS[3]   tree       cs:{12630}:tree:<identity>   hash, the active service with its states and tasks
-- ARGV[1]   bucket     0 to 16383; every id is n * 16384 + bucket
-- ARGV[2]   identity   as in the tree's key
-- ARGV[3]   token      16 hexadecimal digits: which entry of which request this is
-- ARGV[4]   now        JSON string, the worker's clock
-- ARGV[5]   on_found   "merge" or "keep"
-- ARGV[6]   associate  "1": a task created here records the state's id
-- ARGV[7]   state      its type, as text
-- ARGV[8]   task       its type, as text; empty: the entry has no task
-- ARGV[9]   service_start, ARGV[10] service_data   numbers of fields
-- ARGV[11]  state_start,   ARGV[12] state_data     numbers of fields
-- ARGV[13]  task_start,    ARGV[14] task_data      numbers of fields
-- ARGV[15..] name, JSON, name, JSON, ...           the fields, in the order of the numbers above
--
-- The tree:
--   service, state:<type>, task:<type>   pointers to what is active: <id>:<token of the entry that created it>
--   <id>.<name>                          the fields of an object, JSON
--
-- Returns { service_id, created, state_id, created [, task_id, created] }, created being 1 or 0.
-- Returns the error BADTREE if a pointer cannot be read, and BADSEQUENCE if the next id would not be one: someone else
-- wrote to the tree or to the sequence.
--
-- Safe to repeat: an entry that created anything is recognised by its token. It is told "created" again, and is not
-- merged a second time, so that a repeat never overwrites what others have written since.
--
-- The tree is read and checked before anything is written, and it is written last: a script that fails half way
-- (a key of another type, for instance) costs an unused id and never leaves half a service.

local SEQUENCE, IDS, TREE = KEYS[1], KEYS[2], KEYS[3]
local bucket, identity, token, now = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local merge, associate = ARGV[5] == 'merge', ARGV[6] == '1'
local has_task = ARGV[8] ~= ''
local BUCKETS = 16384
-- The last n whose id is below 2^53: ids beyond it are rounded, and two objects would share one.
local LAST = 2 ^ 39 - 1
-- Lua hands at most some 8,000 values to one call.
local CHUNK = 4000

local kinds = { 'service', 'state:' .. ARGV[7], has_task and 'task:' .. ARGV[8] or nil }
local pointers = redis.call('HMGET', TREE, unpack(kinds))

-- ids, by kind; created marks what this entry makes or made.
local ids, created = {}, {}
local missing, applied = 0, false
for kind = 1, #kinds do
  local pointer = pointers[kind]
  if pointer then
    local id = string.match(pointer, '^([1-9]%d*):%x+$')
    if not id or #id > 16 then
      return redis.error_reply('BADTREE the pointer of a ' .. string.match(kinds[kind], '^%a+') .. ' cannot be read')
    end
    ids[kind] = id
    created[kind] = string.sub(pointer, -#token) == token
    applied = applied or created[kind]
  else
    missing = missing + 1
  end
end

local writes, count = {}, 0
local function put(name, value)
  writes[count + 1], writes[count + 2] = name, value
  count = count + 2
end
-- Writes the fields number first + 1 to first + n of ARGV onto the object.
local function put_fields(id, first, n)
  local position = 15 + 2 * first
  for at = position, position + 2 * n - 2, 2 do
    put(id .. '.' .. ARGV[at], ARGV[at + 1])
  end
end

local n = 0
if missing > 0 then
  n = redis.call('INCRBY', SEQUENCE, missing) - missing
  if n < 0 or n + missing > LAST then
    return redis.error_reply('BADSEQUENCE the sequence of bucket ' .. bucket .. ' gives no id')
  end
end

local first = 0
for kind = 1, #kinds do
  local start_fields, data_fields = tonumber(ARGV[7 + 2 * kind]), tonumber(ARGV[8 + 2 * kind])
  local id = ids[kind]
  if not id then
    n = n + 1
    -- Not tostring: it rounds at 14 digits.
    id = string.format('%.0f', n * BUCKETS + bucket)
    ids[kind], created[kind] = id, true
    put(kinds[kind], id .. ':' .. token)
    put_fields(id, first, start_fields + data_fields)
    put(id .. '.updated', now)
    if kind == 1 then
      redis.call('HSET', IDS, id, identity)
    elseif kind == 3 and associate then
      put(id .. '.state_id', ids[2])
    end
  elseif merge and not applied then
    put_fields(id, first + start_fields, data_fields)
    put(id .. '.updated', now)
  end
  first = first + start_fields + data_fields
end

for from = 1, count, CHUNK do
  redis.call('HSET', TREE, unpack(writes, from, math.min(from + CHUNK - 1, count)))
end

local answer = {}
for kind = 1, #kinds do
  answer[2 * kind - 1] = tonumber(ids[kind])
  answer[2 * kind] = created[kind] and 1 or 0
end
return answer
