-- Orders for wrk, each with a key of its own: wrk … -s order.lua URL -- SEED TAIL FILE
-- Keys look like UUIDs and are scattered like them, so that each meets the index of keys in another place: eight digits
-- of a xorshift sequence, which repeats none within 2^32 - 1 steps, and the TAIL of this run. FILE gets the key of
-- every 201, taken out of the answer. Further arguments are keys of clients, which show them in turn.
local counting = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "counting.lua")
local bit = require("bit")
local bxor, lshift, rshift, tohex = bit.bxor, bit.lshift, bit.rshift, bit.tohex
local find, sub = string.find, string.sub
local member = '"client_order_id":"'
local state, before, tail, body, file
local shown, turn = {}, 0

function init(args)
  state = tonumber(args[1])
  file = assert(io.open(args[3], "w"))
  file:setvbuf("full", 65536)
  before = counting.order_head()
  for place = 4, #args do
    table.insert(shown, "\r\nAuthorization: Bearer " .. args[place])
  end
  tail, body = args[2], "\r\n\r\n" .. counting.body
end

function request()
  state = bxor(state, lshift(state, 13))
  state = bxor(state, rshift(state, 17))
  state = bxor(state, lshift(state, 5))
  turn = turn % math.max(#shown, 1) + 1
  return before .. tohex(state) .. tail .. (shown[turn] or "") .. body
end

function response(status, headers, answer)
  local _, last = find(answer, member, 1, true)
  if status == 201 and last then
    file:write(sub(answer, last + 1, last + 36), "\n")
  else
    others = others + 1
  end
end
