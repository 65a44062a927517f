"""Advantages of variants, importance weights and masks: what policy gradients of variants and of entries share.

    gradient = mask x importance weight x advantage x gradient of the log-likelihood

(the unified estimator of HPT, arXiv:2509.04419; its reference denominator is the importance weight here).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.losses import credit, curvature
from lensjax.losses.advantages import blended_advantages, group_advantages, most_informative, optimal_baseline
from lensjax.losses.sets import set_advantages
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.levels import level_distances
from lensjax.training.optim import schedules
from lensjax.training.terms.inputs import ObjectiveConfig, TermInputs

MOST_WEIGHT = 10.0
"""Bound on the importance weight of a variant."""


def variant_advantages(inputs: TermInputs, rewards: Array, where: Array) -> Array:
    """Advantages by `objective.group_baseline`, times the weights of `objective.group_weights`.

    Args:
      inputs: the batch.
      rewards: float32[G, N], of groups of variants: the sequences, or one group of all.
      where: bool[G, N], variants that count.

    Returns:
      float32[G, N], 0 where not valid.
    """
    settings, hyper = inputs.objective, inputs.hyper
    advantages = _advantages(inputs, rewards, where)
    if settings.group_weights == "importance":
        weigh = functools.partial(credit.group_weights, beta=hyper.beta, most=MOST_WEIGHT)
        advantages = advantages * jax.vmap(weigh)(inputs.values, where)
    return advantages


def _advantages(inputs: TermInputs, rewards: Array, where: Array) -> Array:
    """Of variants, before they are weighed."""
    settings, hyper = inputs.objective, inputs.hyper
    if settings.group_baseline == "blended":
        outcomes = hyper.outcome_width * jnp.round(rewards / hyper.outcome_width)
        return blended_advantages(outcomes, where, sharpness=hyper.blend_sharpness, threshold=hyper.blend_entropy)
    if settings.group_baseline == "optimal":
        norms, _ = jax.vmap(curvature.softmax_curvature)(hyper.beta * inputs.values, where)
        baseline = jax.vmap(optimal_baseline)(rewards, norms, where)
        return jnp.where(where, rewards - baseline[:, None], 0.0)
    if settings.group_baseline == "sets":
        distances = jax.vmap(functools.partial(level_distances, geometry=inputs.geometry))(inputs.scored.contexts)
        return jax.vmap(functools.partial(set_advantages, size=settings.set_size))(rewards, distances, where)
    return jax.vmap(functools.partial(group_advantages, baseline=settings.group_baseline))(rewards, where)


def informative_share(step: ArrayLike, hyper: Hyperparameters, *, settings: ObjectiveConfig, steps: int) -> ArrayLike:
    """Share of the entries that `objective.mask informative` leaves at a step of a run: few at first, then more.

    Args:
      step: int32[], from 0.
      hyper: the shares at the first and at the last step.
      settings: 1 without that mask.
      steps: length of the run.

    Returns:
      float32[].
    """
    if settings.mask != "informative":
        return 1.0
    return schedules.linear(step, start=hyper.informative_start, end=hyper.informative_end, steps=steps)


def variant_mask(inputs: TermInputs, advantages: Array, where: Array) -> Array:
    """bool[G, N]: the variants that `objective.mask` leaves, of those that count."""
    if inputs.objective.mask == "none":
        return where
    norms, curvatures = jax.vmap(curvature.softmax_curvature)(inputs.hyper.beta * inputs.values, where)
    return where & _trusted(inputs, advantages, norms, curvatures)


def entry_mask(inputs: TermInputs, scores: Array, actions: Array, advantages: Array, where: Array) -> Array:
    """The entries of one sequence that `objective.mask` leaves.

    Args:
      inputs: the batch.
      scores: float32[V, W], of the policy, whose entries choose by sigmoid(s / temperature).
      actions: float32[V, W], +1 finer and -1 coarser.
      advantages: float32[V, W], of these actions.
      where: bool[V, W], entries that count.

    Returns:
      bool[V, W].
    """
    if inputs.objective.mask == "none":
        return where
    logits = jnp.where(where, scores, 0.0) / inputs.temperature
    if inputs.objective.mask == "trust":
        return where & _trusted(inputs, advantages, *curvature.bernoulli_curvature(logits, actions > 0))
    flat = (leaf.ravel() for leaf in (advantages, credit.bernoulli_entropy(logits), where))
    return most_informative(*flat, share=inputs.informative_share).reshape(where.shape)


def _trusted(inputs: TermInputs, advantages: Array, norms: Array, curvatures: Array) -> Array:
    hyper = inputs.hyper
    interval = {"low": hyper.trust_low, "high": hyper.trust_high, "shift": hyper.trust_shift}
    return curvature.trusted(advantages, norms, curvatures, step=hyper.trust_step, **interval)
