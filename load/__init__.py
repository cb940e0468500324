"""Load on a running desk, as its clients would make it: `make load`."""
