"""The services of a desk and their ports."""

# In the order of their start, each service after those that it asks; they are stopped the other way round: the edges
# first, so that those behind them can finish what was accepted, and last health_check, which hears of all others.
PORTS = {
    "health_check": 8050,
    "db_proxy": 8010,
    "api_cache_proxy": 8002,
    "api_updater": 8003,
    "create_buy_order": 8001,
    "fetch_buy_orders": 8020,
    "process_buy_orders": 8030,
    "operate_desk": 8040,
}
SERVICES = tuple(PORTS)
