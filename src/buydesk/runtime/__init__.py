"""What runs the desk: `up`, `serve`, wiring, the startup report, signals, the probe of containers."""
