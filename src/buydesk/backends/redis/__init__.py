"""Prices, reports and counts of requests in Redis, which may be lost at any time."""
