"""What blocks are made of: norms, linear layers, gated MLPs."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

# Small: the mean of 64 fresh embeddings has mean square 6e-6, and must come out at unit scale like any other entry.
NORM_EPS = 1e-8

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def rms_norm(dim: int, rngs: nnx.Rngs, epsilon: float = NORM_EPS) -> nnx.RMSNorm:
    """RMSNorm in float32. Its epsilon keeps all-zero rows (padding) and their gradients finite."""
    return nnx.RMSNorm(dim, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def linear(
    inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs, gain: float = 1.0, bias: bool = False
) -> nnx.Linear:
    """Linear layer with weights ~ Normal(0, gain^2 / inputs)."""
    kernel_init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


class SwiGLU(nnx.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)), with SiLU as its activation a SwiGLU.

    References:
      Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, Eq. 6.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        gain: float = 1.0,
        activation: Activation = "silu",
    ) -> None:
        self.activation = activation
        # One product for both halves: on a CPU its gradient takes less than half the time of two.
        self.gate_up = linear(inputs, 2 * hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, outputs, dtype=dtype, rngs=rngs, gain=gain)

    def __call__(self, x: Array) -> Array:
        """Maps [..., inputs] to [..., outputs]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)
