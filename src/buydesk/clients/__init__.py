"""Clients: who calls, with which key, and what it permits."""
