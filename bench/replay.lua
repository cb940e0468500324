-- Repeats for wrk: wrk … -s replay.lua URL -- FILE
-- The keys in FILE, which orders were placed with before, one after the other, again and again. An answer counts as
-- wrong unless it is a 201 that says that it is a repeat.
local counting = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "counting.lua")
local keys = {}
local sent = 0
local before, after

function init(args)
  for key in io.lines(args[1]) do
    keys[#keys + 1] = key
  end
  before = counting.order_head()
  after = "\r\n\r\n" .. counting.body
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
