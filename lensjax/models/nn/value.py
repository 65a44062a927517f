"""ValueNet: what return to expect from a state, as a baseline of policy gradients."""

from dataclasses import dataclass

import jax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lensjax.models.functional import Functional, checked
from lensjax.models.interfaces import Params


class ValueNet(nnx.Module):
    """Features of a state to one number, through two hidden layers.

    The last layer starts at 0: a baseline that knows nothing expects nothing, and adds no noise to the first gradients.
    """

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, 1, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, features: Array) -> Array:
        """float32[F] to float32[]. See `ValueModel.apply`."""
        x = jax.nn.relu(self.first(features))
        return self.head(jax.nn.relu(self.second(x)))[0]


@dataclass(frozen=True)
class ValueModel(Functional[ValueNet]):
    """A value baseline as pure functions."""

    features: int
    """Numbers that describe a state [F]."""
    hidden: int = 256

    def _build(self, rngs: nnx.Rngs) -> ValueNet:
        return ValueNet(self.features, self.hidden, rngs=rngs)

    def apply(self, params: Params, features: ArrayLike) -> Array:
        """The return to expect from a state.

        Args:
          params: from `init`.
          features: float32[F]. Detach them where the value's loss must not train their source.

        Returns:
          float32[], 0 for fresh parameters.

        Raises:
          ValueError: a shape does not fit.
        """
        return self._bind(params)(checked("features", features, self.features))
