"""Questions whose answers are known: every policy's loss on the answer, and how often the model would write it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from lensjax.context import working as contexts
from lensjax.context.working import WorkingContext
from lensjax.evaluation import choices
from lensjax.evaluation.answers import shows_in_full
from lensjax.evaluation.compare import FULL
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.recipe import Recipe

EMPTY = "empty"
"""Name of the protected tail alone, which every context shows: what the model knows without any history."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answered:
    """One policy on one question, the mean over its draws; a leading axis for many."""

    nll: Array
    """float32[]: nats per token of the answer."""
    match: Array
    """float32[]: 1 where the likeliest token is the answer's at each of its places, else 0."""
    hit: Array
    """float32[]: 1 where all that is needed is shown in full, else 0."""


def measure(
    models: Models,
    params: dict[str, Params],
    tokens: Array,
    answers: Array,
    scored: Array,
    key: Array,
    *,
    length: int,
    draws: int,
    recipe: Recipe,
) -> dict[str, Answered]:
    """All policies on one question, at one length.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T], a text with the question at its end, then the answer.
      answers: int32[A], first tokens of the blocks that are needed.
      scored: bool[H], the tokens of the answer; at least one.
      key: PRNG key of the random policies, consumed.
      length: entries of every context, a reachable length.
      draws: contexts of each random policy.
      recipe: shapes, and how the allocator acts.

    Returns:
      By name: the policies of `compare.measure` but those who search on the loss, the whole history, and `EMPTY`.
    """
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    causal, known, _ = choices.by_all(
        models, params, tree, window, answers, key, length=length, draws=draws, recipe=recipe
    )
    alone = _one(contexts.recency(geometry.recent_tokens, geometry, capacity=length))
    shown = causal | known | {EMPTY: alone}
    in_full = _one(contexts.recency(geometry.history, geometry, capacity=geometry.history))

    weights = scored.astype(jnp.float32) / jnp.sum(scored, dtype=jnp.float32)

    def answered(variants: WorkingContext) -> Answered:
        losses, is_likeliest = nll.variant_matches(
            models.base, params["base"], tree, variants, window.horizon, geometry
        )
        hits = jax.vmap(lambda one: shows_in_full(one, answers, geometry))(variants)
        return Answered(
            nll=nll.mean_nll(losses, weights),
            match=jnp.all(is_likeliest, axis=1, where=scored).astype(jnp.float32),
            hit=hits.astype(jnp.float32),
        )

    # One pass over all: of a base model of many layers, a pass for each policy takes minutes to compile.
    together = answered(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *shown.values()))
    report, begin = {FULL: _mean(answered(in_full))}, 0
    for name, variants in shown.items():
        end = begin + variants.valid.shape[0]
        report[name] = _mean(jax.tree.map(lambda leaf, rows=slice(begin, end): leaf[rows], together))
        begin = end
    return report


def _mean(answered: Answered) -> Answered:
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), answered)


def _one(context: WorkingContext) -> WorkingContext:
    return jax.tree.map(lambda leaf: leaf[None], context)
