"""A bitcoin buy-order desk: six small services over PostgreSQL and Redis."""

from importlib.metadata import version

__version__ = version("buydesk")
