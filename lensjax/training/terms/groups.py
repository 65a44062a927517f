"""Terms over the values of a group of variants."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax.training.terms.advantages import variant_advantages, variant_mask
from lensjax.training.terms.inputs import Term, TermInputs

GroupLoss = Callable[..., Array]
"""A loss of variants, such as `losses.ipo`: values, rewards and mask [G] to float32[]."""


def group_term(
    inputs: TermInputs, *, loss: GroupLoss, settings: Callable[[TermInputs, Array], dict[str, Any]]
) -> Array:
    """A loss over each sequence's variants, mean over the sequences that hold a preference; or over all at once.

    Args:
      inputs: the batch.
      loss: of one group.
      settings: its keyword arguments, from the inputs and the group's PRNG key.

    Returns:
      float32[].
    """

    def one(values: Array, rewards: Array, where: Array, key: Array) -> Array:
        return loss(values, rewards, where, **settings(inputs, key))

    values, rewards, where, holds = _groups(inputs)
    if inputs.objective.group == "batch":
        return one(values[0], rewards[0], where[0], inputs.key)
    each = jax.vmap(one)(values, rewards, where, jax.random.split(inputs.key, len(values)))
    return masked_mean(each, holds)


def over_groups(loss: GroupLoss, settings: Callable[[TermInputs, Array], dict[str, Any]] | None = None) -> Term:
    """The term of a loss over groups; its keyword arguments are `beta` alone unless `settings` gives others."""
    chosen = settings or (lambda inputs, key: {"beta": inputs.hyper.beta})
    return functools.partial(group_term, loss=loss, settings=chosen)


def grpo_term(inputs: TermInputs) -> Array:
    """`losses.grpo` with the advantages, the weights and the mask of the objective; float32[].

    Mean over the sequences that hold a preference; over all where ties count as well, by what they are beside others.
    """
    values, rewards, where, holds = _groups(inputs)
    advantages = variant_advantages(inputs, rewards, where)
    kept = variant_mask(inputs, advantages, where)

    def one(values: Array, advantages: Array, where: Array) -> Array:
        log_probs = inputs.hyper.beta * jnp.where(where, values, 0.0)
        old = jnp.zeros_like(values)
        return losses.clipped_surrogate(log_probs, advantages, where, old_log_probs=old, clip=inputs.hyper.clip)

    holds = jnp.any(where, axis=-1) if inputs.objective.group_baseline == "blended" else holds
    return masked_mean(jax.vmap(one)(values, advantages, kept), holds)


def _groups(inputs: TermInputs) -> tuple[Array, Array, Array, Array]:
    """Values, rewards and mask [G, N] of what is compared, and bool[G]: groups that hold a preference.

    A group is a sequence; or all of the batch together, relative to the means of their sequences.
    """
    compared, rewards, values = inputs.compared, -inputs.scored.nll, inputs.relative_values
    lowest = jnp.min(jnp.where(compared, rewards, jnp.inf), axis=-1)
    highest = jnp.max(jnp.where(compared, rewards, -jnp.inf), axis=-1)
    holds = highest > lowest
    if inputs.objective.group == "sequence":
        return values, rewards, compared, holds
    centre = jax.vmap(lambda row, where: row - masked_mean(row, where))
    together = (centre(values, compared), centre(rewards, compared), compared & holds[:, None])
    values, rewards, where = (leaf.reshape(1, -1) for leaf in together)
    return values, rewards, where, jnp.ones(1, bool)
