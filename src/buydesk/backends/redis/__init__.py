"""Prices and reports in Redis, which may be lost at any time."""
