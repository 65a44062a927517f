"""Who chooses which context of one history, at one length: all policies, and LensNets step by step."""

import jax
from jax import Array

from lensjax.context import refocus
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.evaluation import rivals
from lensjax.models import Models, Params
from lensjax.models.decision import Window, policy
from lensjax.training.recipe import Recipe

FRESH = "lensnet_fresh"
"""Name of a LensNet that nobody has trained, drawn anew for each sequence: what its architecture alone is worth."""
FRESH_STREAM = 1


def by_all(
    models: Models,
    params: dict[str, Params],
    tree: TreeState,
    window: Window,
    answers: Array | None,
    key: Array,
    *,
    length: int,
    draws: int,
    recipe: Recipe,
) -> tuple[dict[str, WorkingContext], dict[str, WorkingContext], dict[str, list[WorkingContext]]]:
    """What everybody chooses but those who search on the loss.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      tree: the history.
      window: the same, and the horizon.
      answers: int32[A], first tokens of the blocks to be shown; None where they are not known.
      key: PRNG key of the random policies, consumed.
      length: entries of every context, a reachable length.
      draws: contexts of each random policy.
      recipe: shapes, and how the allocator acts.

    Returns:
      By name, leading axis the policy's draws: contexts of causal policies; contexts that the horizon chose; and of
      LensNets the steps of their way from the cold start.
    """
    rival_key, lens_key = keys(key)
    shown = by_rivals(models, params, window.history, rival_key, length=length, draws=draws, recipe=recipe)
    path = by_lensnet(models, params, tree, lens_key, length=length, recipe=recipe)
    fresh = {**params, "lens": models.lens.init(jax.random.fold_in(lens_key, FRESH_STREAM))}
    untrained = by_lensnet(models, fresh, tree, lens_key, length=length, recipe=recipe)
    paths = {"lensnet_1": path[:2], f"lensnet_{recipe.focus.steps}": path, FRESH: untrained}
    shown |= {name: steps[-1] for name, steps in paths.items()}
    known = rivals.hindsight(models, params, window, answers, recipe.geometry, length=length)
    return shown, known, paths


def by_rivals(
    models: Models, params: dict[str, Params], history: Array, key: Array, *, length: int, draws: int, recipe: Recipe
) -> dict[str, WorkingContext]:
    """`rivals.causal` of a recipe."""
    share = recipe.hyper.high_lod_share
    return rivals.causal(
        models, params, history, key, recipe.geometry, length=length, draws=draws, high_lod_share=share
    )


def keys(key: Array) -> tuple[Array, Array]:
    """Randomness of the rivals, and of LensNet's allocator."""
    rival_key, lens_key = jax.random.split(key)
    return rival_key, lens_key


def by_lensnet(
    models: Models, params: dict[str, Params], tree: TreeState, key: Array, *, length: int, recipe: Recipe
) -> list[WorkingContext]:
    """The steps of LensNet's way from the cold start."""
    score_fn = policy(models.lens, params["lens"], tree)
    walk = refocus.cold_start(score_fn, length, recipe.geometry, capacity=length, settings=recipe.focus, key=key)
    return [_one(jax.tree.map(lambda leaf, i=i: leaf[i], walk)) for i in range(recipe.focus.steps + 1)]


def _one(context: WorkingContext) -> WorkingContext:
    return jax.tree.map(lambda leaf: leaf[None], context)
