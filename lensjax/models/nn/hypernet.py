"""HyperNet: what a task is, as a vector, to the low-rank deltas of the weights that solve it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lensjax.models import hyperlora
from lensjax.models.functional import Functional, checked
from lensjax.models.hyperlora import Delta, Deltas, HyperLoRAConfig
from lensjax.models.interfaces import Params

# The default of the framework that the published init_scale was chosen in.
_HIDDEN_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
HIDDEN_SQUARE = 0.11726
"""E[gelu(z)^2] for z normal with variance 1/3: what a fresh hidden layer gives behind a LayerNorm."""


class Factor(nnx.Module):
    """One factor of a delta: Linear, GELU, Linear."""

    def __init__(self, dim: int, shape: tuple[int, int], *, std: float, rngs: nnx.Rngs) -> None:
        self.shape = shape
        self.hidden = nnx.Linear(dim, dim, kernel_init=_HIDDEN_INIT, rngs=rngs)
        self.out = nnx.Linear(dim, math.prod(shape), kernel_init=nnx.initializers.normal(std), rngs=rngs)

    def __call__(self, context: Array) -> Array:
        """float32[D] to a matrix."""
        return self.out(jax.nn.gelu(self.hidden(context))).reshape(self.shape)


class HyperNet(nnx.Module):
    """A context to the deltas of all targets. See `HyperLoRAModel`.

    The published context network has a dropout of rate 0; it is left out.
    """

    def __init__(
        self, config: HyperLoRAConfig, dim: int, targets: Mapping[str, tuple[int, int]], *, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.widen = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.narrow = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.factors = nnx.Dict(
            {
                name: nnx.Dict(
                    {
                        "a": Factor(dim, (width, config.rank), std=_std(config, dim, width, out), rngs=rngs),
                        "b": Factor(dim, (config.rank, out), std=_std(config, dim, width, out), rngs=rngs),
                    }
                )
                for name, (width, out) in targets.items()
            }
        )

    def __call__(self, context: Array) -> Deltas:
        """float32[D] to a delta for each target."""
        context = self.norm(self.narrow(jax.nn.gelu(self.widen(context))))
        deltas = {
            name: Delta(self.config.scaling * pair["a"](context), pair["b"](context))
            for name, pair in self.factors.items()
        }
        if self.config.max_norm is None:
            return deltas
        limit = jnp.asarray(self.config.max_norm, jnp.float32)
        return {name: hyperlora.clamp(delta, limit) for name, delta in deltas.items()}


def _std(config: HyperLoRAConfig, dim: int, width: int, out: int) -> float:
    """Of the last layers' fresh weights.

    For a norm of `init_scale` in the mean, both factors have entries of variance v with in out r v^2 scaling^2 =
    init_scale^2.
    """
    if config.init == "std":
        return config.init_scale
    variance = config.init_scale / (config.scaling * math.sqrt(width * out * config.rank))
    return math.sqrt(variance / (dim * HIDDEN_SQUARE))


@dataclass(frozen=True)
class HyperLoRAModel(Functional[HyperNet]):
    """The hypernetwork as pure functions."""

    config: HyperLoRAConfig
    dim: int
    """Width of a context [D]."""
    targets: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of each matrix that gets a delta."""

    def _build(self, rngs: nnx.Rngs) -> HyperNet:
        sizes = {name: (width, out) for name, width, out in self.targets}
        return HyperNet(self.config, self.dim, sizes, rngs=rngs)

    def apply(self, params: Params, context: ArrayLike) -> Deltas:
        """The deltas for one task.

        Args:
          params: from `init`.
          context: float32[D], of `hyperlora.mean_context` or one row of `hyperlora.leave_one_out_contexts`.

        Returns:
          A delta for each target.

        Raises:
          ValueError: a shape does not fit.
        """
        return self._bind(params)(checked("context", context, self.dim))
