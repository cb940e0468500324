"""What `up` starts beside the services: PostgreSQL, Redis, supervised processes, the data directory."""
