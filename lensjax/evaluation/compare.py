"""Every policy on the same sequences at the same number of entries, and what the differences between them are worth."""

import itertools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from lensjax.context import allocator, refocus, rollouts
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.evaluation import faithfulness, rivals
from lensjax.evaluation.answers import shows_in_full
from lensjax.models import Models, Params
from lensjax.models.decision import Window, build_tree, policy, policy_scores, split
from lensjax.training import key_tokens, nll, preferences
from lensjax.training.recipe import Recipe

FULL = "full"
"""Name of the whole history in full, which is no policy and has no budget."""
FRESH = "lensnet_fresh"
"""Name of a LensNet that nobody has trained, drawn anew for each sequence: what its architecture alone is worth."""
FRESH_STREAM = 1
FOREIGN = "lensnet_foreign"
"""Name of LensNet's focus on another sequence, applied to this one: no policy, but what one has to be better than."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Measured:
    """One policy on one sequence; a leading axis for many."""

    nll: Array
    """float32[]: nats per token on the horizon; for a random policy the mean over its draws."""
    key_nll: Array
    """float32[]: the same on the key tokens of the horizon; NaN where it has none."""
    key_tokens: Array
    """int32[]: how many of these there are, the same for every policy."""
    hit: Array
    """float32[]: share of its contexts that show the answer in full; NaN where there is none."""
    swap_rate: Array
    """float32[]: share of the entries that a refocus step replaces, mean over steps; NaN for policies without steps."""
    residency: Array
    """float32[]: mean number of contexts in a row that hold an entry; NaN for policies without steps."""
    entries: Array
    """int32[2]: fewest and most entries of its contexts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FocusEvidence:
    """Whether LensNet's focus on one sequence is about that sequence (see `faithfulness`); a leading axis for many."""

    foreign: Measured
    """The sequence shown as another one's focus would have it."""
    divergence: Array
    """float32[]: edit distance to the entries of recency, as a share of their number."""
    changed_edits: Array
    """float32[]: of the nodes that either focus edits in the cold start, the share that only one of them does."""
    correlation: Array
    """float32[]: of LensNet's values of random rollouts and their advantages; NaN where one of these is constant."""


def measure(
    models: Models,
    params: dict[str, Params],
    tokens: Array,
    answers: Array | None,
    key: Array,
    *,
    length: int,
    draws: int,
    oracle_rounds: int,
    recipe: Recipe,
) -> dict[str, Measured]:
    """All policies on one sequence, at one length.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      answers: int32[A], first tokens of the blocks to be shown; None where they are not known.
      key: PRNG key of the random policies, consumed.
      length: entries of every context, a reachable length.
      draws: contexts of each random policy.
      oracle_rounds: see `baselines.greedy_oracle`; known answers are one of its starts.
      recipe: shapes, and how the allocator acts.

    Returns:
      `Measured` by the name of the policy; `rivals.information` says what each may know.
    """
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    rival_key, lens_key = _keys(key)
    shown = _causal(models, params, window.history, rival_key, length=length, draws=draws, recipe=recipe)
    path = _path(models, params, tree, lens_key, length=length, recipe=recipe)
    fresh = {**params, "lens": models.lens.init(jax.random.fold_in(lens_key, FRESH_STREAM))}
    untrained = _path(models, fresh, tree, lens_key, length=length, recipe=recipe)
    paths = {"lensnet_1": path[:2], f"lensnet_{recipe.focus.steps}": path, FRESH: untrained}
    shown |= {name: steps[-1] for name, steps in paths.items()}
    shown |= rivals.hindsight(
        models, params, window, shown, answers, geometry, length=length, oracle_rounds=oracle_rounds
    )

    is_key = _is_key(models, params, window, length=length, recipe=recipe)
    # One pass over all: of a base model of many layers, a pass for each policy takes minutes to compile.
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *shown.values())
    losses, _ = nll.variant_token_nll(models.base, params["base"], tree, together, window.horizon, geometry)
    ends = list(itertools.accumulate(variants.valid.shape[0] for variants in shown.values()))
    report = {
        name: _measured(variants, own, is_key, answers, geometry)
        for (name, variants), own in zip(shown.items(), jnp.split(losses, ends[:-1]), strict=True)
    }
    for name, steps in paths.items():
        report[name] = replace(report[name], **_movement(steps, geometry))
    return report


def bounds(
    models: Models,
    params: dict[str, Params],
    tokens: Array,
    answers: Array | None,
    key: Array,
    *,
    length: int,
    draws: int,
    oracle_rounds: int,
    recipe: Recipe,
) -> tuple[Array, Array]:
    """The two ends of the gap that a policy can close; arguments of `measure`.

    Returns:
      float32[], the loss of recency, and float32[], that of the best context that the greedy search finds from the
      contexts of all policies but LensNet.
    """
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    shown = _causal(models, params, window.history, _keys(key)[0], length=length, draws=draws, recipe=recipe)
    known = rivals.hindsight(
        models, params, window, shown, answers, geometry, length=length, oracle_rounds=oracle_rounds
    )
    both = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), shown["recency"], known["oracle"])
    each, _ = nll.variant_nll(models.base, params["base"], tree, both, window.horizon, geometry)
    return each[0], each[1]


def measure_full(
    models: Models, params: dict[str, Params], tokens: Array, answers: Array | None, *, length: int, recipe: Recipe
) -> Measured:
    """The whole history in full, on the tokens that are key beside contexts of `length`; arguments of `measure`."""
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    in_full = _one(contexts.recency(geometry.history, geometry, capacity=geometry.history))
    tree = build_tree(models, params, window.history, geometry)
    losses, _ = nll.variant_token_nll(models.base, params["base"], tree, in_full, window.horizon, geometry)
    is_key = _is_key(models, params, window, length=length, recipe=recipe)
    return _measured(in_full, losses, is_key, answers, geometry)


def measure_pick(
    models: Models, params: dict[str, Params], tokens: Array, answers: Array | None, key: Array, *, recipe: Recipe
) -> dict[str, Array]:
    """LensNet's last context at the budget, and recency: what a study needs of `measure`, at a small part of its cost.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      answers: int32[A], see `measure`.
      key: PRNG key of the allocator, consumed.
      recipe: shapes, and how the allocator acts.

    Returns:
      float32[] each: `lensnet` and `recency`, nats per token on the horizon, and `hit`, 1 where LensNet shows all
      answers in full, NaN without answers.
    """
    geometry, length = recipe.geometry, recipe.budget
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    own = _path(models, params, tree, key, length=length, recipe=recipe)[-1]
    recency = _one(contexts.recency(length, geometry, capacity=length))
    variants = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), own, recency)
    each, _ = nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, geometry)
    shown = jax.tree.map(lambda leaf: leaf[0], own)
    hit = jnp.full((), jnp.nan) if answers is None else shows_in_full(shown, answers, geometry).astype(jnp.float32)
    return {"lensnet": each[0], "recency": each[1], "hit": hit}


def focused(
    models: Models, params: dict[str, Params], history: Array, key: Array, *, length: int, recipe: Recipe
) -> WorkingContext:
    """LensNet's last context of one history int32[C], that of `measure`."""
    tree = build_tree(models, params, history, recipe.geometry)
    last = _path(models, params, tree, _keys(key)[1], length=length, recipe=recipe)[-1]
    return jax.tree.map(lambda leaf: leaf[0], last)


def measure_focus(
    models: Models,
    params: dict[str, Params],
    tokens: Array,
    answers: Array | None,
    key: Array,
    own: WorkingContext,
    foreign: WorkingContext,
    *,
    length: int,
    draws: int,
    recipe: Recipe,
) -> FocusEvidence:
    """LensNet's focus beside another sequence's, and beside recency.

    LensNet acts on a context by its scores of the nodes alone, and all sequences have one cold start. So the scores of
    another sequence, applied to this one step by step, show the spans that they showed of the other.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      answers: int32[A], see `measure`.
      key: PRNG key of the rollouts, consumed; with the key of `measure` they are those of its `random`.
      own: what `focused` makes of the sequence.
      foreign: what it makes of another one.
      length: entries of every context, a reachable length.
      draws: number of random rollouts.
      recipe: shapes.

    Returns:
      `FocusEvidence`.
    """
    geometry, share = recipe.geometry, recipe.hyper.high_lod_share
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    random_key, _ = jax.random.split(_keys(key)[0])
    drawn, distinct = rollouts.sample_rollouts(
        random_key, length, share, rollouts=draws, geometry=geometry, capacity=length
    )
    variants = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), foreign, drawn)
    losses, entries = nll.variant_token_nll(models.base, params["base"], tree, variants, window.horizon, geometry)
    is_key = _is_key(models, params, window, length=length, recipe=recipe)

    scores = policy_scores(models.lens, params["lens"], jax.tree.map(lambda leaf: leaf[1:], entries))
    values = preferences.variant_values(scores, drawn, geometry)
    # What all rollouts share, the loss of recency, changes no correlation.
    correlation, is_defined = preferences.correlation(values, -nll.mean_nll(losses[1:]), distinct)

    def symbols(context: WorkingContext) -> Array:
        return context.start * (geometry.max_lod + 1) + context.lod

    recency = contexts.recency(length, geometry, capacity=length)
    shown, recency = contexts.read(own, geometry), contexts.read(recency, geometry)
    return FocusEvidence(
        foreign=_measured(_one(foreign), losses[:1], is_key, answers, geometry),
        divergence=faithfulness.divergence(symbols(shown), shown.length, symbols(recency), recency.length),
        changed_edits=_changed_edits(own, foreign, geometry, length=length, settings=recipe.focus),
        correlation=jnp.where(is_defined, correlation, jnp.nan),
    )


def _causal(
    models: Models, params: dict[str, Params], history: Array, key: Array, *, length: int, draws: int, recipe: Recipe
) -> dict[str, WorkingContext]:
    share = recipe.hyper.high_lod_share
    return rivals.causal(
        models, params, history, key, recipe.geometry, length=length, draws=draws, high_lod_share=share
    )


def _is_key(models: Models, params: dict[str, Params], window: Window, *, length: int, recipe: Recipe) -> Array:
    """The key tokens beside contexts of `length`: told by less than recency shows, and by no context that is compared.

    bool[H].
    """
    settings = recipe.context.key
    return key_tokens.find(models.base, params["base"], window, settings, short=settings.tokens(length))


def _changed_edits(
    own: WorkingContext, foreign: WorkingContext, geometry: Geometry, *, length: int, settings: FocusConfig
) -> Array:
    """Jaccard distance of two contexts' edits of the cold start, float32[]; 0 where there are none."""
    start = allocator.start(length, geometry, settings=settings).collapsed

    def edited(context: WorkingContext) -> Array:
        cut = contexts.to_cut(context, geometry)
        return allocator.from_cut(cut, geometry).collapsed != start

    by_own, by_foreign = edited(own), edited(foreign)
    changed, either = (jnp.sum(x, dtype=jnp.float32) for x in (by_own ^ by_foreign, by_own | by_foreign))
    return changed / jnp.maximum(either, 1)


def _keys(key: Array) -> tuple[Array, Array]:
    """Randomness of the rivals, and of LensNet's allocator."""
    rival_key, lens_key = jax.random.split(key)
    return rival_key, lens_key


def _path(
    models: Models, params: dict[str, Params], tree: TreeState, key: Array, *, length: int, recipe: Recipe
) -> list[WorkingContext]:
    """The steps of LensNet's way from the cold start."""
    score_fn = policy(models.lens, params["lens"], tree)
    walk = refocus.cold_start(score_fn, length, recipe.geometry, capacity=length, settings=recipe.focus, key=key)
    return [_one(jax.tree.map(lambda leaf, i=i: leaf[i], walk)) for i in range(recipe.focus.steps + 1)]


def _one(context: WorkingContext) -> WorkingContext:
    return jax.tree.map(lambda leaf: leaf[None], context)


def _measured(
    variants: WorkingContext, losses: Array, is_key: Array, answers: Array | None, geometry: Geometry
) -> Measured:
    nothing = jnp.full((), jnp.nan)
    hit = nothing
    if answers is not None:
        shown = jax.vmap(lambda one: shows_in_full(one, answers, geometry))(variants)
        hit = jnp.mean(shown, dtype=jnp.float32)
    entries = contexts.entry_count(variants, geometry)
    fewest, most = entries.min(), entries.max()
    key_nll = key_tokens.key_nll(losses, is_key).mean()
    count = is_key.sum(dtype=jnp.int32)
    return Measured(losses.mean(), key_nll, count, hit, nothing, nothing, jnp.stack([fewest, most]))


def _movement(path: list[WorkingContext], geometry: Geometry) -> dict[str, Array]:
    """How much a sequence of contexts of one length moves."""
    rates = [
        jax.vmap(lambda a, b: refocus.swap_rate(a, b, geometry))(before, after)[0]
        for before, after in itertools.pairwise(path)
    ]
    # Of n contexts of W entries, W + new entries stays begin; together they last n W steps.
    residency = len(path) / (1 + sum(rates, jnp.zeros(())))
    return {"swap_rate": jnp.mean(jnp.stack(rates)), "residency": residency}


def gap_closed(policy: float, recency: float, reference: float) -> float:
    """(recency - policy) / (recency - reference): 0 is recency, 1 the reference; NaN if that is not below recency."""
    gap = recency - reference
    return (recency - policy) / gap if gap > 0 else math.nan
