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
from lensjax.context.working import Entries, WorkingContext
from lensjax.evaluation import choices, faithfulness, rivals
from lensjax.evaluation.answers import shows_in_full
from lensjax.models import Models, Params
from lensjax.models.decision import Window, build_tree, policy_scores, split
from lensjax.training import agreement, key_tokens, nll
from lensjax.training.recipe import Recipe

FULL = "full"
"""Name of the whole history in full, which is no policy and has no budget."""
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
class Comparison:
    """All policies on one sequence; a leading axis for many."""

    policies: dict[str, Measured]
    """By name; the whole history in full among them."""
    focus: WorkingContext
    """LensNet's last context."""
    divergence: Array
    """float32[]: its edit distance to the entries of recency, as a share of their number."""
    correlation: Array
    """float32[]: of LensNet's values of random rollouts and their advantages; NaN where one of these is constant."""
    is_key: Array
    """bool[H]: the key tokens beside contexts of this length: told by less than recency shows, and by no context that
    is compared."""


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
) -> Comparison:
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
      `Comparison`; `rivals.information` says what each of the policies may know.
    """
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    shown, known, paths = choices.by_all(
        models, params, tree, window, answers, key, length=length, draws=draws, recipe=recipe
    )

    losses, entries = _losses(models, params, tree, shown | known, window, geometry)
    starts = shown | {name: known[name] for name in known if name == "answer"}
    means = {name: nll.mean_nll(own) for name, own in losses.items()}
    oracle, _ = rivals.searched(models, params, window, starts, means, geometry, length=length, rounds=oracle_rounds)
    best = jnp.argmin(means["random"])
    chosen = {f"best_of_{draws}": jax.tree.map(lambda leaf: leaf[best][None], shown["random"]), "oracle": oracle}
    losses |= {f"best_of_{draws}": losses["random"][best][None]}
    losses |= _losses(models, params, tree, {"oracle": oracle}, window, geometry)[0]

    settings = recipe.context.key
    gain = key_tokens.token_gain(models.base, params["base"], window, short=settings.tokens(length))
    is_key = key_tokens.is_key(gain, settings)
    in_full = _one(contexts.recency(geometry.history, geometry, capacity=geometry.history))
    losses |= {FULL: -gain.long[None]}
    report = {
        name: _measured(variants, losses[name], is_key, answers, geometry)
        for name, variants in (shown | known | chosen | {FULL: in_full}).items()
    }
    for name, steps in paths.items():
        report[name] = replace(report[name], **_movement(steps, geometry))

    focus = jax.tree.map(lambda leaf: leaf[0], shown[f"lensnet_{recipe.focus.steps}"])
    # The rollouts' losses minus that of recency are their advantages, and what all share changes no correlation.
    scores = policy_scores(models.lens, params["lens"], entries["random"])
    values = agreement.variant_values(scores, shown["random"], geometry)
    distinct = rollouts.is_distinct(jax.vmap(lambda one: contexts.to_cut(one, geometry))(shown["random"]))
    correlation, is_defined = agreement.correlation(values, -means["random"], distinct)
    return Comparison(
        policies=report,
        focus=focus,
        divergence=_divergence(focus, geometry, length=length),
        correlation=jnp.where(is_defined, correlation, jnp.nan),
        is_key=is_key,
    )


def measure_foreign(
    models: Models,
    params: dict[str, Params],
    tokens: Array,
    answers: Array | None,
    found: Comparison,
    foreign: WorkingContext,
    *,
    length: int,
    recipe: Recipe,
) -> tuple[Measured, Array]:
    """LensNet's focus on another sequence, applied to this one.

    LensNet acts on a context by its scores of the nodes alone, and all sequences have one cold start. So the scores of
    another sequence, applied to this one step by step, show the spans that they showed of the other.

    Args:
      models: base model and GistNet are called.
      params: parameters of `base` and `gist`.
      tokens: int32[T].
      answers: int32[A], see `measure`.
      found: what `measure` finds of the sequence.
      foreign: the focus of another one.
      length: entries of every context.
      recipe: shapes, and how the allocator acts.

    Returns:
      `Measured` of the sequence in that context; float32[], of the nodes that either focus edits in the cold start, the
      share that only one of them does.
    """
    geometry = recipe.geometry
    window = split(tokens, horizon=recipe.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    losses, _ = nll.variant_token_nll(models.base, params["base"], tree, _one(foreign), window.horizon, geometry)
    changed = _changed_edits(found.focus, foreign, geometry, length=length, settings=recipe.focus)
    return _measured(_one(foreign), losses, found.is_key, answers, geometry), changed


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
    shown = choices.by_rivals(
        models, params, window.history, choices.keys(key)[0], length=length, draws=draws, recipe=recipe
    )
    if answers is not None:
        shown |= {"answer": rivals.hindsight(models, params, window, answers, geometry, length=length)["answer"]}
    losses, _ = _losses(models, params, tree, shown, window, geometry)
    means = {name: nll.mean_nll(own) for name, own in losses.items()}
    _, least = rivals.searched(models, params, window, shown, means, geometry, length=length, rounds=oracle_rounds)
    return means["recency"][0], least


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
    own = choices.by_lensnet(models, params, tree, key, length=length, recipe=recipe)[-1]
    recency = _one(contexts.recency(length, geometry, capacity=length))
    variants = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), own, recency)
    each, _ = nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, geometry)
    shown = jax.tree.map(lambda leaf: leaf[0], own)
    hit = jnp.full((), jnp.nan) if answers is None else shows_in_full(shown, answers, geometry).astype(jnp.float32)
    return {"lensnet": each[0], "recency": each[1], "hit": hit}


def _losses(
    models: Models,
    params: dict[str, Params],
    tree: TreeState,
    shown: dict[str, WorkingContext],
    window: Window,
    geometry: Geometry,
) -> tuple[dict[str, Array], dict[str, Entries]]:
    """Loss of each token of the horizon, float32[draws, H], and what a policy sees, by the name of who chose.

    One pass over all: of a base model of many layers, a pass for each policy takes minutes to compile.
    """
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *shown.values())
    losses, entries = nll.variant_token_nll(models.base, params["base"], tree, together, window.horizon, geometry)
    ends = list(itertools.accumulate(variants.valid.shape[0] for variants in shown.values()))

    def own(leaf: Array) -> list[Array]:
        return jnp.split(leaf, ends[:-1])

    rows = jax.tree.transpose(jax.tree.structure(entries), None, jax.tree.map(own, entries))
    return dict(zip(shown, own(losses), strict=True)), dict(zip(shown, rows, strict=True))


def _divergence(own: WorkingContext, geometry: Geometry, *, length: int) -> Array:
    def symbols(context: WorkingContext) -> Array:
        return context.start * (geometry.max_lod + 1) + context.lod

    recency = contexts.recency(length, geometry, capacity=length)
    shown, recency = contexts.read(own, geometry), contexts.read(recency, geometry)
    return faithfulness.divergence(symbols(shown), shown.length, symbols(recency), recency.length)


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
