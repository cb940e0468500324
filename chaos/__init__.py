"""Faults under load: scenarios that hurt a real desk, a journal of what its clients were told, a judge of both."""
