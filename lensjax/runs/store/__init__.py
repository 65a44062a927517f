"""A run's folder: checkpoints, log, configuration."""
