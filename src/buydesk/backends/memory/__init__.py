"""Prices and reports in the memory of this process."""
