"""Prices, reports and counts of requests in the memory of this process."""
