"""Terms over the values of a group of variants."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lensjax._numerics import masked_mean
from lensjax.training.terms.inputs import Term, TermInputs

GroupLoss = Callable[..., Array]
"""A loss of variants, such as `losses.grpo`: values, rewards and mask [G] to float32[]."""


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

    compared, rewards, values = inputs.compared, -inputs.scored.nll, inputs.relative_values
    lowest = jnp.min(jnp.where(compared, rewards, jnp.inf), axis=-1)
    highest = jnp.max(jnp.where(compared, rewards, -jnp.inf), axis=-1)
    if inputs.objective.group == "batch":
        centre = jax.vmap(lambda row, where: row - masked_mean(row, where))
        values, rewards = centre(values, compared), centre(rewards, compared)
        where = compared & (highest > lowest)[:, None]
        return one(values.ravel(), rewards.ravel(), where.ravel(), inputs.key)
    each = jax.vmap(one)(values, rewards, compared, jax.random.split(inputs.key, len(values)))
    return masked_mean(each, highest > lowest)


def over_groups(loss: GroupLoss, settings: Callable[[TermInputs, Array], dict[str, Any]] | None = None) -> Term:
    """The term of a loss over groups; its keyword arguments are `beta` alone unless `settings` gives others."""
    chosen = settings or (lambda inputs, key: {"beta": inputs.hyper.beta})
    return functools.partial(group_term, loss=loss, settings=chosen)
