"""A bitcoin buy-order desk: eight small services over PostgreSQL and Redis."""

__version__ = "0.1.0"
