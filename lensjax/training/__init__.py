"""Pure training steps on arrays."""
