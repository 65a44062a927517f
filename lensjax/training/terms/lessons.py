"""The term of sequences that a teacher takes over."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.training import lessons
from lensjax.training.terms.inputs import TermInputs


def lesson_term(inputs: TermInputs, worths: Array, taught: Array, *, temperature: ArrayLike) -> Array:
    """`lessons.lesson` of the rollouts of the sequences that are taught, each by what its teacher has to say.

    Recency is left out, which need not show the whole history.

    Args:
      inputs: the batch.
      worths: float32[B, N], of `lessons.node_worths`.
      taught: bool[B], sequences that are.
      temperature: float32[], above 0, of the scores before tanh.

    Returns:
      float32[], a mean over these sequences by the sums of their worths; 0 where none is taught.
    """
    scored, geometry = inputs.scored, inputs.geometry
    rollouts = scored.distinct.at[:, 0].set(False)
    each = jax.vmap(
        lambda row, contexts, where, worth: lessons.lesson(
            row, contexts, where, worth, geometry, temperature=temperature
        )
    )(inputs.scores, scored.contexts, rollouts, worths)
    mass = jnp.sum(jnp.where(taught[:, None] & lessons.taught_nodes(geometry)[None], worths, 0.0), axis=1)
    return jnp.sum(mass / jnp.maximum(jnp.sum(mass), 1e-9) * jnp.where(taught, each, 0.0))
