"""The grid model: encoder of example pairs, ConvGRU solver and head. HyperLoRA adapts its gates and its head.

Pure functions over a plain parameter dict, for one grid or pair; `jax.vmap` them. Letters: S side of a grid, D width,
T solver steps.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from experiments.rlan.grids import COLOURS, PADDING
from lensjax._numerics import masked_mean
from lensjax._settings import Repeats, Width, settings
from lensjax.models import Params
from lensjax.models.hyperlora import Deltas, mix

TARGETS = ("gru_reset", "gru_update", "gru_candidate", "output_head")
"""What is adapted: the outputs of these layers, each of width D."""
POSITION_STD = 0.1
"""Of fresh position embeddings; colours have 1, for what a rule says is mostly about them."""


@settings("grid")
class GridConfig:
    """Sizes of the grid model."""

    dim: Width = 64
    steps: Repeats = 6


@dataclass(frozen=True)
class GridModel:
    """Hashable: pass it as a static argument of `jax.jit`."""

    config: GridConfig
    size: int
    """Side of the padded grids [S]."""

    @property
    def targets(self) -> tuple[tuple[str, int, int], ...]:
        """What the hypernetwork is told of its targets."""
        return tuple((name, self.config.dim, self.config.dim) for name in TARGETS)

    def init(self, key: Array) -> Params:
        """Fresh parameters. `key` is consumed."""
        dim, keys = self.config.dim, iter(jax.random.split(key, 12))

        def matrix(inputs: int, outputs: int) -> Array:
            return jax.random.normal(next(keys), (inputs, outputs)) * inputs**-0.5

        return {
            "colours": jax.random.normal(next(keys), (COLOURS + 1, dim)),
            "rows": POSITION_STD * jax.random.normal(next(keys), (self.size, dim)),
            "columns": POSITION_STD * jax.random.normal(next(keys), (self.size, dim)),
            "pair": {"in": matrix(4 * dim, dim), "bias": jnp.zeros(dim), "conv": matrix(9 * dim, dim)},
            "gru": {
                "input": matrix(9 * dim, 3 * dim),
                "bias": jnp.zeros(3 * dim),
                "gates": matrix(9 * dim, 2 * dim),
                "candidate": matrix(9 * dim, dim),
            },
            "head": {"hidden": matrix(dim, dim), "bias": jnp.zeros(dim), "out": matrix(dim, COLOURS)},
        }

    def embed(self, params: Params, grid: ArrayLike) -> Array:
        """Colours and places of a grid int32[S, S]; float32[S, S, D]."""
        return params["colours"][jnp.asarray(grid)] + params["rows"][:, None] + params["columns"][None, :]

    def encode(self, params: Params, pair: ArrayLike) -> Array:
        """What an example says, from [in, out, out - in, in * out] of every cell.

        The published encoder pools to 8 x 8 first, for an attention that is left out here; the mean over cells, which
        is what the hypernetwork reads, is the same.

        Args:
          params: from `init`.
          pair: int32[2, S, S], input and output.

        Returns:
          float32[D], mean over the cells that are not padding in both.
        """
        pair = jnp.asarray(pair)
        source, target = self.embed(params, pair[0]), self.embed(params, pair[1])
        cells = jnp.concatenate([source, target, target - source, source * target], axis=-1)
        cells = jax.nn.gelu(_shifted(cells @ params["pair"]["in"], params["pair"]["bias"]))
        cells = cells + jax.nn.gelu(_conv(cells, params["pair"]["conv"]))
        content = jnp.any(pair != PADDING, axis=0)[..., None]
        return jnp.sum(jnp.where(content, cells, 0.0), axis=(0, 1)) / jnp.maximum(
            jnp.sum(content, dtype=jnp.float32), 1
        )

    def solve(self, params: Params, deltas: Deltas, grid: ArrayLike) -> Array:
        """Hidden states of the ConvGRU.

            r, u = sigmoid(gates(x, h)),  c = tanh(candidate(x, r h)),  h <- (1 - u) h + u c

        Args:
          params: from `init`.
          deltas: of the task.
          grid: int32[S, S], the input to answer.

        Returns:
          float32[T, S, S, D], of every step.
        """
        weights, inputs = params["gru"], self.embed(params, grid)
        from_input = jnp.split(_shifted(_conv(inputs, weights["input"]), weights["bias"]), 3, axis=-1)

        # To keep the neighbourhoods of every step for the gradient takes longer than to collect them anew.
        @jax.checkpoint
        def step(hidden: Array, _: None) -> tuple[Array, Array]:
            gates = jnp.split(_conv(hidden, weights["gates"]), 2, axis=-1)
            reset = jax.nn.sigmoid(mix(from_input[0] + gates[0], deltas["gru_reset"]))
            update = jax.nn.sigmoid(mix(from_input[1] + gates[1], deltas["gru_update"]))
            proposed = from_input[2] + _conv(reset * hidden, weights["candidate"])
            candidate = jnp.tanh(mix(proposed, deltas["gru_candidate"]))
            hidden = (1 - update) * hidden + update * candidate
            return hidden, hidden

        return jax.lax.scan(step, jnp.tanh(inputs), None, length=self.config.steps)[1]

    def logits(self, params: Params, deltas: Deltas, hidden: ArrayLike) -> Array:
        """Colours of the answer, of one step or of all: float32[..., S, S, D] to float32[..., S, S, 10]."""
        weights = params["head"]
        features = mix(_shifted(jnp.asarray(hidden) @ weights["hidden"], weights["bias"]), deltas["output_head"])
        return jax.nn.gelu(features) @ weights["out"]


def best_step(logits: ArrayLike, where: ArrayLike) -> Array:
    """The solver's step whose prediction is surest: that of the lowest mean entropy. For inference only.

    Args:
      logits: float32[T, S, S, 10].
      where: bool[S, S], cells of the answer.

    Returns:
      int32[].
    """
    log_p = jax.nn.log_softmax(jnp.asarray(logits))
    entropies = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.argmin(jax.vmap(masked_mean, in_axes=(0, None))(entropies, where)).astype(jnp.int32)


def _shifted(values: Array, bias: Array) -> Array:
    return values + jnp.expand_dims(bias, range(values.ndim - 1))


def _conv(cells: Array, kernel: Array) -> Array:
    """3 x 3 convolution with zeros around the square, as one product: [S, S, D] and [9 D, F] to [S, S, F]."""
    side = cells.shape[0]
    framed = jnp.pad(cells, ((1, 1), (1, 1), (0, 0)))
    shifted = [framed[i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel
