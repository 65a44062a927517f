"""ValueNet: what return to expect from a state, as a baseline of policy gradients."""

import jax
from flax import nnx
from jax import Array


class ValueNet(nnx.Module):
    """Features of a state to one number, through two hidden layers.

    The last layer starts at 0: a baseline that knows nothing expects nothing, and adds no noise to the first gradients.
    """

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, 1, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, features: Array) -> Array:
        """float32[F] to float32[]. See `lensjax.models.functional.ValueModel.apply`."""
        x = jax.nn.relu(self.first(features))
        return self.head(jax.nn.relu(self.second(x)))[0]
