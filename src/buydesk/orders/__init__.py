"""Orders: what is asked for, how it is batched, written as JSON, paged and verified."""
