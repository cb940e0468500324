"""Settings: every time-out, pool and limit, what each value has to be, and how they are read, once."""
