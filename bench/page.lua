-- Pages of ten at random places for wrk: wrk … -s page.lua URL -- SEED LOWEST HIGHEST (how many newer orders to leave out)
-- A fourth argument is the key of a client, which is shown.
local random = math.random
local lowest, highest, before, after

function init(args)
  math.randomseed(tonumber(args[1]))
  lowest, highest = tonumber(args[2]), tonumber(args[3])
  before = "GET " .. wrk.path .. "?start="
  after = "&page_size=10 HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port
  after = after .. (args[4] and "\r\nAuthorization: Bearer " .. args[4] or "") .. "\r\n\r\n"
end

function request()
  return before .. random(lowest, highest) .. after
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('\nbench {"seconds": %f, "answers": %d, "others": %d, "socket": %d, "timeout": %d}\n',
    summary.duration / 1e6, summary.requests, errors.status, errors.connect + errors.read + errors.write,
    errors.timeout))
end
