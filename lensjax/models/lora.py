"""LoRA: a low-rank change of a language model's queries and values, which is learned while the model itself stays.

    W + a b,  a float32[in, rank], b float32[rank, out]

The change is a part of its own beside the model's parameters; `hyperlora.adapt` gives the parameters of the changed
model, which every function of that model takes.

References:
  Hu et al., LoRA, arXiv:2106.09685, sections 4.1 and 7.1 (queries and values).
"""

import jax
import jax.numpy as jnp
from jax import Array

from lensjax._settings import require
from lensjax.models.hyperlora import Delta, Deltas
from lensjax.models.interfaces import Params

TARGETS = ("attention/query/kernel", "attention/value/kernel")


def init(key: Array, base: Params, *, rank: int) -> Deltas:
    """Fresh deltas, with which the model is what it was: b is 0.

    Args:
      key: PRNG key, consumed.
      base: parameters of a language model.
      rank: of each delta.

    Returns:
      A delta for the query and value projection of each layer.

    Raises:
      ValueError: the model has no such matrices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lensjax.models import hyperlora, lora
      >>> base = {"attention": {"query": {"kernel": jnp.ones((4, 6))}, "key": {"kernel": jnp.ones((4, 6))}}}
      >>> deltas = lora.init(jax.random.key(0), base, rank=2)
      >>> {name: (delta.a.shape, delta.b.shape) for name, delta in deltas.items()}
      {'attention/query/kernel': ((4, 2), (2, 6))}
      >>> bool(jnp.all(hyperlora.adapt(base, deltas)["attention"]["query"]["kernel"] == 1))
      True
    """
    leaves = jax.tree_util.tree_leaves_with_path(base)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    shapes = {name: leaf.shape for name, leaf in named.items() if name.endswith(TARGETS)}
    require(shapes != {}, f"the base model has no {' or '.join(TARGETS)}, which low-rank deltas could change")
    return {
        name: Delta(jax.random.normal(own, (inputs, rank)) * inputs**-0.5, jnp.zeros((rank, outputs)))
        for (name, (inputs, outputs)), own in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True)
    }
