-- Quotes for wrk: wrk … -s quote.lua URL -- FILE
-- FILE gets the token of every 201, taken out of the answer.
local counting = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "counting.lua")
local member = '"quote":"'
local find, sub = string.find, string.sub
local asked, file

function init(args)
  file = assert(io.open(args[1], "w"))
  file:setvbuf("full", 65536)
  asked = counting.head(#counting.body) .. "\r\n\r\n" .. counting.body
end

function request()
  return asked
end

function response(status, headers, answer)
  local _, last = find(answer, member, 1, true)
  if status == 201 and last then
    file:write(sub(answer, last + 1, find(answer, '"', last + 1, true) - 1), "\n")
  else
    others = others + 1
  end
end
