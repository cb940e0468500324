-- Orders for wrk, each with a key of its own: wrk … -s order.lua URL -- SEED TAIL FILE
-- Keys look like UUIDs and are scattered like them, so that each meets the index of keys in another place: eight digits
-- of a xorshift sequence, which repeats none within 2^32 - 1 steps, and the TAIL of this run. FILE gets the key of
-- every 201, taken out of the answer.
local bit = require("bit")
local bxor, lshift, rshift, tohex = bit.bxor, bit.lshift, bit.rshift, bit.tohex
local find, sub = string.find, string.sub
local body = '{"currency":"EUR","amount":"0.05"}'
local member = '"client_order_id":"'
local threads = {}
local state, before, after, file

others = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  state = tonumber(args[1])
  file = assert(io.open(args[3], "w"))
  file:setvbuf("full", 65536)
  before = "POST " .. wrk.path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port
    .. "\r\nContent-Type: application/json\r\nContent-Length: " .. #body .. "\r\nIdempotency-Key: "
  after = args[2] .. "\r\n\r\n" .. body
end

function request()
  state = bxor(state, lshift(state, 13))
  state = bxor(state, rshift(state, 17))
  state = bxor(state, lshift(state, 5))
  return before .. tohex(state) .. after
end

function response(status, headers, answer)
  local _, last = find(answer, member, 1, true)
  if status == 201 and last then
    file:write(sub(answer, last + 1, last + 36), "\n")
  else
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
