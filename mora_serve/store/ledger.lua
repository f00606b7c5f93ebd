-- The ledger's atomic steps on Redis 6.2 or newer: one call of this script is one step.
-- KEYS[1] is the key prefix, ARGV[1] the step, the rest its arguments. All keys share the prefix,
-- so a clustered server has to keep them in one slot. Times are milliseconds by the server's clock.
--
--   <p>:active            zset of unfinished batch ids, score = turn of the last lease
--   <p>:batches           zset of all batch ids in order of creation
--   <p>:batch:<id>        hash: doc, options, status, counts, stamps (s:), usage (u:), classes (c:)
--   <p>:batch:<id>:...    shards, free, leased, tokens, holders, rows:<k>, tries:<k>,
--                         sealed, tail, parts, readers, rate (ring of buckets, see rate.py)
--   <p>:<name>:index/docs a collection of JSON documents (files, jobs, events, policies ...)
--   <p>:files:expiry      zset of file ids, score = Unix seconds of the end
--   <p>:outputs           hash: output file id -> its batch, as long as the file is there
--   <p>:orphans           set of batches whose output is gone and whose pairs are still read
--   <p>:upload:<id>       hash: doc, status, received, file; <p>:upload:<id>:parts: part id -> bytes
--   <p>:uploads:expiry    zset of pending uploads, score = Unix seconds of the end
--   <p>:litter            zset of blob keys, and prefixes of keys that end in '/', to be deleted,
--                         score = Unix seconds from when on

local prefix = KEYS[1]
local call = redis.call
local steps = {}

local clock = call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local terminal = { completed = true, failed = true, expired = true, cancelled = true }
local bucket_ms, num_buckets = 2000, 30 -- as in rate.py
local upload_kept_s = 7 * 24 * 3600 -- how long an upload that is over can be asked for

local function key(id, suffix)
  local name = prefix .. ':batch:' .. id
  if suffix then return name .. ':' .. suffix end
  return name
end

local function number(value)
  return tonumber(value or '0') or 0
end

local function whole(value)
  return string.format('%.0f', value)
end

-- What readers of a batch can see has changed.
local function changed(id)
  call('HINCRBY', key(id), 'version', 1)
end

local function discard(blob)
  call('ZADD', prefix .. ':litter', clock[1], blob)
end

local function enter(id, status)
  call('HSET', key(id), 'status', status, 's:' .. status .. '_at', clock[1])
  changed(id)
  if terminal[status] then
    call('ZREM', prefix .. ':active', id)
    call('HDEL', key(id), 'claim', 'claimer', 'claims', 'claim_tries', 'working_since', 'outcome',
      'postponed', 'num_shards', 'input', 'input_bytes', 'input_rows')
    for _, name in ipairs({ 'rows', 'duplicates', 'input' }) do
      discard('batches/' .. id .. '/' .. name .. '/')
    end
  end
end

local function count_in_ring(id, rows)
  local bucket = math.floor(now / bucket_ms)
  local ring, slot = key(id, 'rate'), bucket % num_buckets
  local known, count = string.match(call('HGET', ring, slot) or '', '^(%d+):(%d+)$')
  if number(known) == bucket then rows = rows + number(count) end
  call('HSET', ring, slot, whole(bucket) .. ':' .. whole(rows))
end

local function held(id, shard, token)
  return call('HGET', key(id, 'holders'), shard) == token
end

local function take(id, shard, ttl)
  call('ZREM', key(id, 'free'), shard)
  local token = call('HINCRBY', key(id, 'tokens'), shard, 1)
  local expires = now + ttl
  call('ZADD', key(id, 'leased'), whole(expires), shard)
  call('HSET', key(id, 'holders'), shard, whole(token))
  local spec = call('HGET', key(id, 'shards'), shard)
  local done = call('HKEYS', key(id, 'rows:' .. shard))
  local tries = call('HGETALL', key(id, 'tries:' .. shard))
  return { id, shard, whole(token), whole(expires), spec, done, tries }
end

local function trim(id)
  local keep = number(call('HGET', key(id), 'pairs_sealed'))
  local readers = call('HGETALL', key(id, 'readers'))
  for i = 1, #readers, 2 do
    local position, till = string.match(readers[i + 1], '^(-?%d+)|(%d+)$')
    if number(till) > now then
      keep = math.min(keep, number(position) + 1)
    else
      call('HDEL', key(id, 'readers'), readers[i])
    end
  end
  call('XTRIM', key(id, 'tail'), 'MINID', whole(keep + 1))
end

local function close(id, outcome)
  call('HSET', key(id), 'closed', '1', 'outcome', outcome, 'claim', '0')
end

local function close_if_due(id)
  local state = call('HMGET', key(id), 'status', 'closed', 'expires', 'num_shards')
  local status = state[1]
  if state[2] == '1' then return end
  if status == 'cancelling' then
    if call('ZCOUNT', key(id, 'leased'), '(' .. whole(now), '+inf') == 0 then
      close(id, 'cancelled')
    end
  elseif number(state[3]) <= now then
    close(id, 'expired')
    enter(id, 'finalizing')
  elseif status == 'in_progress' and call('HLEN', key(id, 'sealed')) == number(state[4]) then
    close(id, 'completed')
    enter(id, 'finalizing')
  end
end

-- collections: JSON documents in order of insertion

local function put_new(name, id, doc)
  if call('HSETNX', prefix .. ':' .. name .. ':docs', id, doc) == 0 then return 0 end
  call('ZADD', prefix .. ':' .. name .. ':index', call('INCR', prefix .. ':counter'), id)
  return 1
end

function steps.put(name, id, doc)
  if put_new(name, id, doc) == 0 then call('HSET', prefix .. ':' .. name .. ':docs', id, doc) end
  return 1
end

function steps.put_new(name, id, doc)
  return put_new(name, id, doc)
end

function steps.get(name, id)
  return call('HGET', prefix .. ':' .. name .. ':docs', id)
end

function steps.remove(name, id)
  local doc = call('HGET', prefix .. ':' .. name .. ':docs', id)
  call('HDEL', prefix .. ':' .. name .. ':docs', id)
  call('ZREM', prefix .. ':' .. name .. ':index', id)
  return doc
end

local function page_ids(index, after, limit, ascending)
  local low, high = '-inf', '+inf'
  if after ~= '' then
    local score = call('ZSCORE', index, after)
    if not score then return false end
    if ascending == '1' then low = '(' .. score else high = '(' .. score end
  end
  if ascending == '1' then
    return call('ZRANGEBYSCORE', index, low, high, 'LIMIT', 0, limit)
  end
  return call('ZREVRANGEBYSCORE', index, high, low, 'LIMIT', 0, limit)
end

-- files: documents {file, blob}; an expired one is there until it is collected, for those who read it

function steps.reserve_blob(blob, lifetime_s)
  return call('ZADD', prefix .. ':litter', whole(number(clock[1]) + number(lifetime_s)), blob)
end

function steps.put_file(id, doc, expires_at, blob)
  steps.put('files', id, doc)
  call('ZREM', prefix .. ':litter', blob)
  if expires_at ~= '' then call('ZADD', prefix .. ':files:expiry', expires_at, id) end
  return 1
end

function steps.get_file(id, even_expired)
  local expires = call('ZSCORE', prefix .. ':files:expiry', id)
  if expires and tonumber(expires) <= now / 1000 and even_expired == '0' then return false end
  return steps.get('files', id)
end

function steps.remove_file(id)
  local doc = steps.remove('files', id)
  if not doc then return false end
  call('ZREM', prefix .. ':files:expiry', id)
  local batch = call('HGET', prefix .. ':outputs', id)
  if batch then
    call('HDEL', prefix .. ':outputs', id)
    call('SADD', prefix .. ':orphans', batch)
  end
  local blob = cjson.decode(doc).blob
  if not string.find(blob, '://', 1, true) then discard(blob) end
  return blob
end

-- The file's blob, or the unfinished batch that reads it.
function steps.delete_file(id)
  for _, batch in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do
    if cjson.decode(call('HGET', key(batch), 'doc')).input_file_id == id then
      return { 'read', batch }
    end
  end
  local blob = steps.remove_file(id)
  return blob and { 'deleted', blob }
end

function steps.page(name, after, limit, ascending)
  local ids = page_ids(prefix .. ':' .. name .. ':index', after, limit, ascending)
  if not ids then return false end
  local docs = {}
  for i, id in ipairs(ids) do docs[i] = call('HGET', prefix .. ':' .. name .. ':docs', id) end
  return docs
end

-- uploads: a hash, and its parts. Every step answers with the upload as it is, or nothing.

local function upload_key(id, suffix)
  return prefix .. ':upload:' .. id .. (suffix or '')
end

local function end_upload(id, status)
  local name = upload_key(id)
  call('HSET', name, 'status', status)
  call('ZREM', prefix .. ':uploads:expiry', id)
  call('EXPIRE', name, upload_kept_s)
  call('EXPIRE', upload_key(id, ':parts'), upload_kept_s)
  discard('uploads/' .. id .. '/')
end

local function upload_status(id)
  local expires = call('ZSCORE', prefix .. ':uploads:expiry', id)
  if expires and tonumber(expires) <= now / 1000 then end_upload(id, 'expired') end
  return call('HGET', upload_key(id), 'status')
end

function steps.create_upload(id, doc, lifetime_s)
  local expires = whole(number(clock[1]) + number(lifetime_s))
  call('HSET', upload_key(id), 'doc', doc, 'status', 'pending', 'received', '0',
    'created', clock[1], 'expires', expires)
  call('ZADD', prefix .. ':uploads:expiry', expires, id)
  return steps.get_upload(id)
end

function steps.get_upload(id)
  if not upload_status(id) then return false end
  return { call('HGETALL', upload_key(id)), call('HGETALL', upload_key(id, ':parts')), clock[1] }
end

-- The part counts only where the upload is pending and its announced bytes and the number of parts
-- are not exceeded.
function steps.add_part(id, part, num_bytes, announced, max_parts)
  local parts = upload_key(id, ':parts')
  local room = call('HLEN', parts) < number(max_parts)
  if upload_status(id) == 'pending' and room and call('HEXISTS', parts, part) == 0 then
    local received = number(call('HGET', upload_key(id), 'received')) + number(num_bytes)
    if received <= number(announced) then
      call('HSET', upload_key(id), 'received', whole(received))
      call('HSET', parts, part, num_bytes)
    end
  end
  return steps.get_upload(id)
end

function steps.cancel_upload(id)
  if upload_status(id) == 'pending' then end_upload(id, 'cancelled') end
  return steps.get_upload(id)
end

-- Only one completion makes its file; what others joined is theirs to remove.
function steps.complete_upload(id, file_id, file, expires_at, blob)
  if upload_status(id) == 'pending' then
    steps.put_file(file_id, file, expires_at, blob)
    call('HSET', upload_key(id), 'file', file)
    end_upload(id, 'completed')
  end
  return steps.get_upload(id)
end

local function readers_left(id)
  local readers = call('HVALS', key(id, 'readers'))
  for _, entry in ipairs(readers) do
    if number(string.match(entry, '|(%d+)$')) > now then return true end
  end
  for _, job in ipairs(call('ZRANGE', prefix .. ':jobs:active', 0, -1)) do
    if call('HGET', prefix .. ':job:' .. job, 'training_file') == '"' .. id .. '"' then
      return true
    end
  end
  return false
end

-- Pairs go with the output of their batch, once nobody reads them.
local function collect_pairs()
  for _, id in ipairs(call('SMEMBERS', prefix .. ':orphans')) do
    if not readers_left(id) then
      call('SREM', prefix .. ':orphans', id)
      call('UNLINK', key(id, 'tail'), key(id, 'parts'), key(id, 'readers'))
      call('HSET', key(id), 'pairs_removed', '1')
      discard('batches/' .. id .. '/pairs/')
    end
  end
end

-- Ends uploads and forgets files whose time is over, and answers with blobs to be deleted. A file
-- that an unfinished batch reads stays until the batch is finished.
function steps.collect(limit)
  local uploads = prefix .. ':uploads:expiry'
  for _, id in ipairs(call('ZRANGEBYSCORE', uploads, '-inf', clock[1])) do upload_status(id) end
  local expired = call('ZRANGEBYSCORE', prefix .. ':files:expiry', '-inf', clock[1])
  if #expired > 0 then
    local read = {}
    for _, id in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do
      read[cjson.decode(call('HGET', key(id), 'doc')).input_file_id] = true
    end
    for _, id in ipairs(expired) do
      if not read[id] then steps.remove_file(id) end
    end
  end
  collect_pairs()
  return call('ZRANGEBYSCORE', prefix .. ':litter', '-inf', clock[1], 'LIMIT', 0, limit)
end

function steps.collected(...)
  return call('ZREM', prefix .. ':litter', ...)
end

-- batches

function steps.known_batch(idempotency_key, body_hash)
  local known = call('HMGET', prefix .. ':idempotency:' .. idempotency_key, 'id', 'hash')
  if not known[1] then return false end
  return { known[2] == body_hash and 'known' or 'conflict', known[1] }
end

local function rate_ring(id)
  local since = call('HGET', key(id), 'working_since')
  return { since or whole(now), call('HVALS', key(id, 'rate')) }
end

-- Rows and input bytes that unfinished batches have left, and how fast each of them advances.
local function backlog()
  local rows, bytes, rings = 0, 0, {}
  for i, id in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do
    local counts = call('HMGET', key(id), 'total', 'completed', 'failed', 'input_bytes',
      'status', 'input_rows')
    local total = number(counts[1])
    local left = math.max(0, total - number(counts[2]) - number(counts[3]))
    rows = rows + math.max(1, counts[5] == 'validating' and number(counts[6]) or left)
    bytes = bytes + number(counts[4]) * (total > 0 and left / total or 1)
    rings[i] = rate_ring(id)
  end
  return { whole(rows), whole(bytes), rings, whole(now) }
end

function steps.backlog()
  return backlog()
end

-- A batch over the limits is admitted alone.
function steps.create_batch(
  id, doc, options, window_ms, idempotency_key, body_hash, input_bytes, input_rows, max_rows,
  max_bytes
)
  if idempotency_key ~= '' then
    local known = steps.known_batch(idempotency_key, body_hash)
    if known then return known end
  end
  if call('EXISTS', key(id)) == 1 then return { 'known', id } end
  local waiting = backlog()
  local over = number(waiting[1]) >= number(max_rows)
    or number(waiting[2]) + number(input_bytes) > number(max_bytes)
  if over and #waiting[3] > 0 then return { 'full', waiting } end
  if idempotency_key ~= '' then
    local name = prefix .. ':idempotency:' .. idempotency_key
    call('HSET', name, 'id', id, 'hash', body_hash)
    call('PEXPIRE', name, 7 * 24 * 3600 * 1000)
  end
  call('HSET', key(id), 'doc', doc, 'options', options, 'status', 'validating', 'closed', '0',
    'created', whole(now), 'expires', whole(now + number(window_ms)), 'claim', '0',
    'input_bytes', input_bytes, 'input_rows', input_rows, 'version', '1')
  call('ZADD', prefix .. ':batches', call('INCR', prefix .. ':counter'), id)
  call('ZADD', prefix .. ':active', call('INCR', prefix .. ':counter'), id)
  return { 'new', id }
end

function steps.state(id)
  return { call('HGETALL', key(id)), whole(now) }
end

function steps.progress(id)
  return { steps.state(id), rate_ring(id) }
end

function steps.list_batches(after, limit)
  local ids = page_ids(prefix .. ':batches', after, limit, '0')
  if not ids then return false end
  local states = {}
  for i, id in ipairs(ids) do states[i] = steps.state(id) end
  return states
end

function steps.cancel(id)
  local status = call('HGET', key(id), 'status')
  if not status then return 0 end
  if status == 'validating' or status == 'in_progress' then enter(id, 'cancelling') end
  return 1
end

function steps.unfinished()
  local states = {}
  for i, id in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do states[i] = steps.state(id) end
  return states
end

function steps.claim_validation(worker, ttl)
  for _, id in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do
    local state = call('HMGET', key(id), 'status', 'claim')
    if state[1] == 'validating' and number(state[2]) <= now then
      call('HSET', key(id), 'claim', whole(now + number(ttl)), 'claimer', worker)
      return { id, call('HINCRBY', key(id), 'claims', 1), call('HINCRBY', key(id), 'claim_tries', 1) }
    end
  end
  return false
end

local function validates(id, claim)
  local state = call('HMGET', key(id), 'status', 'claims')
  return state[1] == 'validating' and state[2] == claim
end

function steps.renew_validation(id, claim, ttl)
  if not validates(id, claim) then return 0 end
  call('HSET', key(id), 'claim', whole(now + number(ttl)))
  return 1
end

function steps.postpone_validation(id, claim)
  if not validates(id, claim) then return 0 end
  call('HINCRBY', key(id), 'claim_tries', -1)
  call('HSETNX', key(id), 'postponed', whole(now))
  return whole(now - number(call('HGET', key(id), 'postponed')))
end

function steps.renew_claim(id, worker, ttl)
  local state = call('HMGET', key(id), 'status', 'claimer')
  if not state[1] or terminal[state[1]] or state[2] ~= worker then return 0 end
  call('HSET', key(id), 'claim', whole(now + number(ttl)))
  return 1
end

-- input: the blob that the shards cut up.
function steps.open_batch(id, shards, total, input)
  if call('HGET', key(id), 'status') ~= 'validating' then return 0 end
  local specs = cjson.decode(shards)
  for i, spec in ipairs(specs) do
    call('HSET', key(id, 'shards'), i - 1, spec)
    call('ZADD', key(id, 'free'), i - 1, i - 1)
  end
  call('HSET', key(id), 'total', total, 'num_shards', #specs, 'claim', '0', 'input', input)
  enter(id, 'in_progress')
  return 1
end

function steps.fail(id, error)
  if call('HGET', key(id), 'status') ~= 'validating' then return 0 end
  call('HSET', key(id), 'errors', error, 'closed', '1')
  enter(id, 'failed')
  return 1
end

-- shards

-- Arguments after `ttl`: ids of batches to pass over.
function steps.lease_shard(worker, ttl, ...)
  local best, fewest
  local excluded = {}
  for _, id in ipairs({ ... }) do excluded[id] = true end
  for _, id in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do
    local state = call('HMGET', key(id), 'status', 'expires')
    if state[1] == 'in_progress' and number(state[2]) > now and not excluded[id] then
      local live = call('ZCOUNT', key(id, 'leased'), '(' .. whole(now), '+inf')
      local takeable = call('ZCARD', key(id, 'free')) + call('ZCARD', key(id, 'leased')) - live
      if takeable > 0 and (not fewest or live < fewest) then best, fewest = id, live end
      if fewest == 0 then break end
    end
  end
  if not best then return false end
  local shard = call('ZRANGEBYSCORE', key(best, 'leased'), '-inf', whole(now), 'LIMIT', 0, 1)[1]
    or call('ZRANGE', key(best, 'free'), 0, 0)[1]
  call('ZADD', prefix .. ':active', call('INCR', prefix .. ':counter'), best)
  if fewest == 0 then call('HSET', key(best), 'working_since', whole(now)) end
  return take(best, shard, number(ttl))
end

function steps.lease_leftover(id, worker, ttl)
  local state = call('HMGET', key(id), 'status', 'closed')
  if state[2] ~= '1' or terminal[state[1]] then return false end
  local shard = call('ZRANGE', key(id, 'free'), 0, 0)[1] or call('ZRANGE', key(id, 'leased'), 0, 0)[1]
  if not shard then return false end
  return take(id, shard, number(ttl))
end

function steps.heartbeat(id, shard, token, ttl)
  if not held(id, shard, token) then return 'lost' end
  call('ZADD', key(id, 'leased'), whole(now + number(ttl)), shard)
  if call('HGET', key(id), 'status') == 'in_progress' then return 'ok' end
  return 'stop'
end

function steps.release(id, shard, token)
  if not held(id, shard, token) then return 0 end
  call('HDEL', key(id, 'holders'), shard)
  call('ZREM', key(id, 'leased'), shard)
  call('ZADD', key(id, 'free'), shard, shard)
  return 1
end

-- Arguments after `data`: number of pairs, pairs, then (field, increment) of usage and classes.
function steps.commit_row(id, shard, token, line, kind, data, num_pairs, ...)
  if not held(id, shard, token) or call('HGET', key(id), 'closed') == '1' then return 'lost' end
  if call('HSETNX', key(id, 'rows:' .. shard), line, kind .. data) == 0 then return 'repeated' end
  call('HINCRBY', key(id), kind == 'o' and 'completed' or 'failed', 1)
  changed(id)
  count_in_ring(id, 1)
  local rest, count = { ... }, number(num_pairs)
  if count > 0 then
    local seq = call('HINCRBY', key(id), 'pairs', count) - count
    for i = 1, count do
      call('XADD', key(id, 'tail'), whole(seq + i) .. '-0', 'p', rest[i])
    end
  end
  for i = count + 1, #rest, 2 do call('HINCRBY', key(id), rest[i], rest[i + 1]) end
  return 'committed'
end

function steps.shard_rows(id, shard)
  return call('HGETALL', key(id, 'rows:' .. shard))
end

-- A row's tries: '<count>:<token of the last one>'. A lease begins a row once at most.
local function tries_of(id, shard, line)
  local entry = call('HGET', key(id, 'tries:' .. shard), line) or '0:'
  local count, last = string.match(entry, '^(%d+):(.*)$')
  return number(count), last
end

function steps.count_try(id, shard, token, line)
  if not held(id, shard, token) then return 0 end
  local count, last = tries_of(id, shard, line)
  if last == token then return count end
  call('HSET', key(id, 'tries:' .. shard), line, whole(count + 1) .. ':' .. token)
  return count + 1
end

-- Without the lease as well: whoever lost it still knows that it did not die of the row.
function steps.forget_try(id, shard, token, line)
  local count, last = tries_of(id, shard, line)
  if last ~= token then return 0 end
  call('HSET', key(id, 'tries:' .. shard), line, whole(count - 1) .. ':')
  return 1
end

function steps.seal_shard(id, shard, token, sealed, num_rows, num_extra)
  if not held(id, shard, token) then return 'lost' end
  local rows = call('HLEN', key(id, 'rows:' .. shard))
  local expected = number(string.match(call('HGET', key(id, 'shards'), shard), '^%d+,(%d+),'))
  local complete = rows == expected or call('HGET', key(id), 'closed') == '1'
  if rows ~= number(num_rows) or not complete then return 'changed' end
  call('HSET', key(id, 'sealed'), shard, sealed)
  call('HINCRBY', key(id), 'failed', num_extra)
  changed(id)
  call('DEL', key(id, 'rows:' .. shard), key(id, 'tries:' .. shard))
  call('HDEL', key(id, 'holders'), shard)
  call('ZREM', key(id, 'leased'), shard)
  return 'sealed'
end

function steps.sealed_shards(id)
  return call('HGETALL', key(id, 'sealed'))
end

-- end of a batch

function steps.claim_finalize(worker, ttl)
  for _, id in ipairs(call('ZRANGE', prefix .. ':active', 0, -1)) do
    close_if_due(id)
    local state = call('HMGET', key(id), 'closed', 'claim')
    if state[1] == '1' and number(state[2]) <= now then
      call('HSET', key(id), 'claim', whole(now + number(ttl)), 'claimer', worker)
      return id
    end
  end
  return false
end

-- Arguments: (field of the batch, then the arguments of put_file) per file.
function steps.finish(id, ...)
  local state = call('HMGET', key(id), 'status', 'closed', 'outcome')
  if terminal[state[1]] or state[2] ~= '1' then return state[1] end
  local files = { ... }
  for i = 1, #files, 5 do
    steps.put_file(files[i + 1], files[i + 2], files[i + 3], files[i + 4])
    call('HSET', key(id), files[i], files[i + 1])
    if files[i] == 'output_file_id' then call('HSET', prefix .. ':outputs', files[i + 1], id) end
  end
  enter(id, state[3])
  trim(id)
  call('PEXPIRE', key(id, 'tail'), 3600 * 1000)
  for _, suffix in ipairs({ 'shards', 'free', 'leased', 'tokens', 'holders', 'sealed', 'rate' }) do
    call('UNLINK', key(id, suffix))
  end
  return state[3]
end

-- pairs: stream id <seq + 1>-0

function steps.tail(id, after, limit)
  local low = whole(math.max(number(after) + 2, 1)) .. '-0'
  return call('XRANGE', key(id, 'tail'), low, '+', 'COUNT', limit)
end

function steps.tail_length(id)
  return call('XLEN', key(id, 'tail'))
end

function steps.add_pair_part(id, first, last, part)
  local state = call('HMGET', key(id), 'pairs_sealed', 'pairs')
  if number(state[1]) ~= number(first) or number(last) >= number(state[2]) then return 0 end
  call('ZADD', key(id, 'parts'), last, part)
  call('HSET', key(id), 'pairs_sealed', whole(number(last) + 1))
  trim(id)
  return 1
end

function steps.pair_part(id, seq)
  return call('ZRANGEBYSCORE', key(id, 'parts'), seq, '+inf', 'LIMIT', 0, 1)[1]
end

function steps.set_reader(id, reader, position, ttl)
  if call('EXISTS', key(id)) == 0 then return 0 end
  if position == '' then
    call('HDEL', key(id, 'readers'), reader)
  else
    call('HSET', key(id, 'readers'), reader, position .. '|' .. whole(now + number(ttl)))
    call('PEXPIRE', key(id, 'readers'), ttl)
  end
  trim(id)
  return 1
end

-- jobs: a hash of JSON-encoded fields

local job_terminal = { ['"succeeded"'] = true, ['"failed"'] = true, ['"cancelled"'] = true }

function steps.create_job(id, ...)
  local name = prefix .. ':job:' .. id
  if call('EXISTS', name) == 0 then
    call('HSET', name, ...)
    local turn = call('INCR', prefix .. ':counter')
    call('ZADD', prefix .. ':jobs', turn, id)
    call('ZADD', prefix .. ':jobs:active', turn, id)
  end
  return call('HGETALL', name)
end

function steps.get_job(id)
  return call('HGETALL', prefix .. ':job:' .. id)
end

function steps.list_jobs(after, limit)
  local ids = page_ids(prefix .. ':jobs', after, limit, '0')
  if not ids then return false end
  local jobs = {}
  for i, id in ipairs(ids) do jobs[i] = steps.get_job(id) end
  return jobs
end

function steps.update_job(id, ...)
  local name = prefix .. ':job:' .. id
  local status = call('HGET', name, 'status')
  if not status then return {} end
  local fields = { ... }
  for i = 1, #fields, 2 do
    local settled = fields[i] == 'status' or fields[i] == 'finished_at'
    if not (job_terminal[status] and settled) then
      call('HSET', name, fields[i], fields[i + 1])
    end
  end
  if not job_terminal[status] and job_terminal[call('HGET', name, 'status')] then
    if call('HGET', name, 'finished_at') == 'null' then
      call('HSET', name, 'finished_at', clock[1])
    end
    call('ZREM', prefix .. ':jobs:active', id)
    call('DEL', name .. ':claim')
  end
  return call('HGETALL', name)
end

-- quarantine: one runner at a time has the engines for itself. Every runner says now and then that it
-- lives, and for which claim of the quarantine it is quiet. No claim has the name of an earlier one.

function steps.claim_quarantine(claim, ttl)
  local name = prefix .. ':quarantine'
  if call('SET', name, claim, 'PX', ttl, 'NX') then return 1 end
  if call('GET', name) ~= claim then return 0 end
  call('PEXPIRE', name, ttl)
  return 1
end

function steps.leave_quarantine(claim)
  local name = prefix .. ':quarantine'
  if call('GET', name) == claim then call('DEL', name) end
  return 1
end

function steps.report_runner(worker, ttl, quiet_for)
  local name = prefix .. ':runners'
  if number(ttl) > 0 then
    call('HSET', name, worker, whole(now + number(ttl)) .. '|' .. quiet_for)
  else
    call('HDEL', name, worker)
  end
  return call('GET', prefix .. ':quarantine')
end

function steps.num_unquiet(worker, claim)
  local name, count = prefix .. ':runners', 0
  local reports = call('HGETALL', name)
  for i = 1, #reports, 2 do
    local till, quiet_for = string.match(reports[i + 1], '^(%d+)|(.*)$')
    if number(till) <= now then
      call('HDEL', name, reports[i])
    elseif reports[i] ~= worker and quiet_for ~= claim then
      count = count + 1
    end
  end
  return count
end

function steps.claim_job(worker, ttl)
  for _, id in ipairs(call('ZRANGE', prefix .. ':jobs:active', 0, -1)) do
    if call('SET', prefix .. ':job:' .. id .. ':claim', worker, 'PX', ttl, 'NX') then
      return steps.get_job(id)
    end
  end
  return {}
end

function steps.heartbeat_job(id, worker, ttl)
  local name = prefix .. ':job:' .. id
  if job_terminal[call('HGET', name, 'status')] then return 0 end
  local holder = call('GET', name .. ':claim')
  if holder and holder ~= worker then return 0 end
  call('SET', name .. ':claim', worker, 'PX', ttl)
  return 1
end

-- policy versions

function steps.set_policy(id)
  if call('HEXISTS', prefix .. ':policies:docs', id) == 0 then return -1 end
  local name = prefix .. ':policy'
  if call('HGET', name, 'id') ~= id then
    call('HSET', name, 'id', id)
    call('HINCRBY', name, 'epoch', 1)
  end
  return number(call('HGET', name, 'epoch'))
end

return steps[ARGV[1]](unpack(ARGV, 2))
