"""The outside world: configurations, files, devices, signals."""
