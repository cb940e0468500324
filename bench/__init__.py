"""`make bench`: what the desk does in a second, beside what PostgreSQL, the bare HTTP server and a plain service do.

Everything is measured in one run, on one machine, in turn; docs/benchmarks.md says how and keeps the last full run.
"""
