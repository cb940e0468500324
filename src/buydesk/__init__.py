"""A bitcoin buy-order desk: six small services over PostgreSQL and Redis."""

__version__ = "0.1.0"
