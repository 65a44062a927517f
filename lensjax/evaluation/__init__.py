"""Is it any good? Held-out losses, baselines, comparisons and their statistics."""
