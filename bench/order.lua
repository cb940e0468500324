-- Orders for wrk, each with a key of its own: wrk … -s order.lua URL -- SEED TAIL FILE
-- Keys look like UUIDs and are scattered like them, so that each meets the index of keys in another place: eight digits
-- of a xorshift sequence, which repeats none within 2^32 - 1 steps, and the TAIL of this run. FILE gets the key of
-- every 201, taken out of the answer.
local counting = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "counting.lua")
local bit = require("bit")
local bxor, lshift, rshift, tohex = bit.bxor, bit.lshift, bit.rshift, bit.tohex
local find, sub = string.find, string.sub
local member = '"client_order_id":"'
local state, before, after, file

function init(args)
  state = tonumber(args[1])
  file = assert(io.open(args[3], "w"))
  file:setvbuf("full", 65536)
  before = counting.order_head()
  after = args[2] .. "\r\n\r\n" .. counting.body
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
