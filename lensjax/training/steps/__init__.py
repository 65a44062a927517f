"""One training step a file: state and batch to the next state and metrics."""
