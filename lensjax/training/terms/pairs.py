"""Terms over the entries of preference pairs."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax.training.terms.inputs import TermInputs


def mean_over_pairs(inputs: TermInputs, each: Array) -> Array:
    """Weighted mean over the supervised pairs of the batch."""
    supervised = jnp.any(inputs.pair_entries.where, axis=-1)
    # Weights say how pairs compare; how many there are is no matter of theirs.
    weights = inputs.pair_weights / jnp.maximum(masked_mean(inputs.pair_weights, supervised), 1e-30)
    return masked_mean(weights * each, supervised)


def pair_term(inputs: TermInputs, *, form: Literal["logistic", "squared"]) -> Array:
    """`losses.preference_loss` of the span targets of each pair; float32[]."""

    def loss(score: Array, target: Array, where: Array, weight: Array, gap: Array) -> Array:
        return losses.preference_loss(
            score,
            target,
            where,
            gap=gap,
            temperature=inputs.temperature,
            collapse_weight=inputs.hyper.collapse_weight,
            weights=weight,
            granularity=inputs.objective.granularity,
            form=form,
            **inputs.softening,
        )

    of = inputs.pair_entries
    return mean_over_pairs(inputs, jax.vmap(jax.vmap(loss))(of.scores, of.target, of.where, of.weight, of.gap))


def rank_term(inputs: TermInputs) -> Array:
    """`losses.rank_loss` of each pair; float32[]."""

    def loss(score: Array, target: Array, where: Array, weight: Array) -> Array:
        return losses.rank_loss(score, target, where, margin=inputs.hyper.margin, weights=weight)

    of = inputs.pair_entries
    return mean_over_pairs(inputs, jax.vmap(jax.vmap(loss))(of.scores, of.target, of.where, of.weight))


def entry_losses(inputs: TermInputs) -> Array:
    """float32[B, P, 2, W]: the preference loss by entry, for the log."""
    form: Literal["logistic", "squared"] = "squared" if inputs.objective.name == "mse" else "logistic"

    def loss(score: Array, target: Array, where: Array, gap: Array) -> Array:
        weight, temperature = inputs.hyper.collapse_weight, inputs.temperature
        hyper = {"gap": gap, "temperature": temperature, "collapse_weight": weight}
        return losses.preference_entry_losses(score, target, where, **hyper, form=form, **inputs.softening)

    of = inputs.pair_entries
    each = jax.vmap(jax.vmap(loss))(jax.lax.stop_gradient(of.scores), of.target, of.where, of.gap)
    return each.reshape(inputs.targets.where.shape)
