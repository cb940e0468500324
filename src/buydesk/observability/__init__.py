"""What the desk says of itself: logs, request ids, reports, Sentry, clocks that are off."""
