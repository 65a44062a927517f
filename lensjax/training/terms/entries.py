"""Terms over the entries of all variants: policy gradients, and what each span was worth."""

import jax
import jax.numpy as jnp
from jax import Array

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax.training import preferences
from lensjax.training.scoring import ScoredVariants
from lensjax.training.terms.inputs import TermInputs


def span_term(inputs: TermInputs) -> Array:
    """Policy gradient of the entries, each against a baseline of its own; mean over the sequences that have any.

        -sum_vi a_vi A_vi d_vi s_vi / sum_vi a_vi,    d = +1 where the level is finer than that of the others, else -1

    A finer level that came out better asks for detail, and so does a coarser one that came out worse. a is the tokens
    covered: both sides of a difference weigh the same, and the level alone says nothing (see `span_targets`).
    """

    def loss(scores: Array, advantages: Array, scored: ScoredVariants, compared: Array) -> tuple[Array, Array]:
        gained, finer, where = preferences.span_advantages(advantages, scored.contexts, compared, inputs.geometry)
        spans = jnp.where(where, scored.entries.spans, 0.0)
        share = spans / jnp.maximum(masked_mean(spans, where), 1)
        flat = (leaf.ravel() for leaf in (finer * scores, share * gained, where))
        return losses.policy_gradient(*flat), jnp.any(where)

    return masked_mean(*jax.vmap(loss)(inputs.scores, inputs.advantages, inputs.scored, inputs.compared))


def attribution_term(inputs: TermInputs) -> Array:
    """`losses.attribution_loss` of what the scored variants say of each span; mean over the sequences that say any.

    The attribution of an entry is its advantage over the variants that show its span at another level, positive where
    it speaks for the finer one, as in `span_term`.
    """

    def loss(scores: Array, advantages: Array, scored: ScoredVariants, compared: Array) -> tuple[Array, Array]:
        gained, finer, where = preferences.span_advantages(advantages, scored.contexts, compared, inputs.geometry)
        spans = jnp.where(where, scored.entries.spans, 0.0)
        flat = (leaf.ravel() for leaf in (scores, finer * gained, where))
        return losses.attribution_loss(*flat, weights=spans.ravel()), jnp.any(where)

    return masked_mean(*jax.vmap(loss)(inputs.scores, inputs.advantages, inputs.scored, inputs.compared))
