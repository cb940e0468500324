-- Repeats for wrk: wrk … -s replay.lua URL -- FILE
-- The keys in FILE, which orders were placed with before, one after the other, again and again. An answer counts as
-- wrong unless it is a 201 that says that it is a repeat.
local body = '{"currency":"EUR","amount":"0.05"}'
local threads, keys = {}, {}
local sent = 0
local before, after

others = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  for key in io.lines(args[1]) do
    keys[#keys + 1] = key
  end
  before = "POST " .. wrk.path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port
    .. "\r\nContent-Type: application/json\r\nContent-Length: " .. #body .. "\r\nIdempotency-Key: "
  after = "\r\n\r\n" .. body
end

function request()
  sent = sent % #keys + 1
  return before .. keys[sent] .. after
end

function response(status, headers)
  if status ~= 201 or (headers["idempotent-replayed"] or headers["Idempotent-Replayed"]) ~= "true" then
    others = others + 1
  end
end

function done(summary, latency, requests)
  local others = 0
  for _, thread in ipairs(threads) do
    others = others + thread:get("others")
  end
  local errors = summary.errors
  io.write(string.format('\nbench {"seconds": %f, "answers": %d, "others": %d, "socket": %d, "timeout": %d}\n',
    summary.duration / 1e6, summary.requests, others, errors.connect + errors.read + errors.write, errors.timeout))
end
