-- Orders by quote for wrk: wrk … -s quoted.lua URL -- TOKENS IDS
-- The quotes in the file TOKENS, each once: a further answer counts as wrong. IDS gets the id of the quote of every 201.
local counting = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "counting.lua")
local member = '"quote_id":"'
local find, sub = string.find, string.sub
local tokens = {}
local sent = 0
local file

function init(args)
  for token in io.lines(args[1]) do
    tokens[#tokens + 1] = token
  end
  file = assert(io.open(args[2], "w"))
  file:setvbuf("full", 65536)
end

function request()
  sent = sent + 1
  local body = '{"quote":"' .. (tokens[sent] or "") .. '"}'
  return counting.head(#body) .. "\r\n\r\n" .. body
end

function response(status, headers, answer)
  local _, last = find(answer, member, 1, true)
  if status == 201 and last and not (headers["idempotent-replayed"] or headers["Idempotent-Replayed"]) then
    file:write(sub(answer, last + 1, last + 36), "\n")
  else
    others = others + 1
  end
end
