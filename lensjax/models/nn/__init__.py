"""Parts of models, as Flax modules."""
