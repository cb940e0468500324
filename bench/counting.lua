-- What the scripts for wrk share: the head of a request, answers that are wrong, and the line that load.py reads.
local threads = {}
local counting = {body = '{"currency":"EUR","amount":"0.05"}'}

others = 0  -- wrong answers of this thread

function counting.head(body_bytes)
  return "POST " .. wrk.path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port
    .. "\r\nContent-Type: application/json\r\nContent-Length: " .. body_bytes
end

function counting.order_head()
  return counting.head(#counting.body) .. "\r\nIdempotency-Key: "
end

function setup(thread)
  table.insert(threads, thread)
end

function done(summary, latency, requests)
  local wrong = 0
  for _, thread in ipairs(threads) do
    wrong = wrong + thread:get("others")
  end
  local errors = summary.errors
  io.write(string.format('\nbench {"seconds": %f, "answers": %d, "others": %d, "socket": %d, "timeout": %d}\n',
    summary.duration / 1e6, summary.requests, wrong, errors.connect + errors.read + errors.write, errors.timeout))
end

return counting
