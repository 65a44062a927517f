"""Every policy on the same sequences at the same number of entries, and what the differences between them are worth."""

import itertools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from lensjax.context import allocator, rollouts
from lensjax.context import working as contexts
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.evaluation import faithfulness, held_out, rivals
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, policy_contexts, policy_scores, split
from lensjax.runs.config import Config
from lensjax.training import nll, preferences

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
    """Whether LensNet's focus on one sequence is about that sequence (see `theatre`); a leading axis for many."""

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
    config: Config,
) -> dict[str, Measured]:
    """All policies on one sequence, at one length.

    Args:
      models: the models.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      answers: int32[A], first tokens of the blocks to be shown; None where they are not known.
      key: PRNG key of the random policies, consumed.
      length: entries of every context, a reachable length.
      draws: contexts of each random policy.
      oracle_rounds: see `policies.greedy_oracle`; known answers are one of its starts.
      config: shapes, and how the allocator acts.

    Returns:
      `Measured` by the name of the policy; `rivals.information` says what each may know.
    """
    shape = config.context
    window = split(tokens, horizon=shape.horizon)
    tree = build_tree(models, params, window.history, config)
    rival_key, lens_key = _keys(key)
    made = rivals.causal(models, params, window.history, rival_key, length=length, draws=draws, config=config)
    path = _path(models, params, tree, lens_key, length=length, config=config)
    fresh = {**params, "lens": models.lens.init(jax.random.fold_in(lens_key, FRESH_STREAM))}
    untrained = _path(models, fresh, tree, lens_key, length=length, config=config)
    paths = {"lensnet_1": path[:2], f"lensnet_{config.focus.steps}": path, FRESH: untrained}
    made |= {name: steps[-1] for name, steps in paths.items()}
    made |= rivals.hindsight(
        models, params, window, made, answers, length=length, draws=draws, oracle_rounds=oracle_rounds, config=config
    )

    def measured(variants: WorkingContext) -> Measured:
        losses, _ = nll.variant_losses(models.base, params["base"], tree, variants, window.horizon)
        return _measured(variants, losses, answers, config)

    report = {name: measured(variants) for name, variants in made.items()}
    for name, steps in paths.items():
        report[name] = replace(report[name], **_movement(steps, window=shape.history))
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
    config: Config,
) -> tuple[Array, Array]:
    """What no LensNet is needed for to say how much of the gap one closes; arguments as for `measure`.

    Returns:
      float32[], the loss of recency, and float32[], that of the best context that the greedy search finds from the
      contexts of all policies but LensNet.
    """
    window = split(tokens, horizon=config.context.horizon)
    tree = build_tree(models, params, window.history, config)
    made = rivals.causal(models, params, window.history, _keys(key)[0], length=length, draws=draws, config=config)
    known = rivals.hindsight(
        models, params, window, made, answers, length=length, draws=draws, oracle_rounds=oracle_rounds, config=config
    )
    both = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), made["recency"], known["oracle"])
    losses, _ = nll.variant_losses(models.base, params["base"], tree, both, window.horizon)
    return losses[0], losses[1]


def measure_full(
    models: Models, params: dict[str, Params], tokens: Array, answers: Array | None, *, config: Config
) -> Measured:
    """The whole history in full, without a budget; arguments as for `measure`."""
    shape = config.context
    window = split(tokens, horizon=shape.horizon)
    in_full = _one(contexts.baseline(shape.history, window=shape.history, capacity=shape.history))
    tree = build_tree(models, params, window.history, config)
    losses, _ = nll.variant_losses(models.base, params["base"], tree, in_full, window.horizon)
    return _measured(in_full, losses, answers, config)


def focused(
    models: Models, params: dict[str, Params], history: Array, key: Array, *, length: int, config: Config
) -> WorkingContext:
    """LensNet's last context of one history int32[C], that of `measure`; other arguments as there."""
    tree = build_tree(models, params, history, config)
    last = _path(models, params, tree, _keys(key)[1], length=length, config=config)[-1]
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
    config: Config,
) -> FocusEvidence:
    """LensNet's focus beside another sequence's, and beside recency.

    LensNet acts on a context by its scores of the nodes alone, and all sequences have one cold start. So the scores of
    another sequence, applied to this one step by step, show the spans that they showed of the other.

    Args:
      models: the models.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      answers: int32[A], see `measure`.
      key: PRNG key of the rollouts, consumed; of the same one `measure` draws the same.
      own: what `focused` makes of the sequence.
      foreign: what it makes of another one.
      length: entries of every context, a reachable length.
      draws: number of random rollouts.
      config: shapes.

    Returns:
      `FocusEvidence`.
    """
    shape, geometry, share = config.context, config.context.geometry, config.hyper.lod2_share
    window = split(tokens, horizon=shape.horizon)
    tree = build_tree(models, params, window.history, config)
    random_key, _ = jax.random.split(_keys(key)[0])
    drawn, distinct = rollouts.sample_rollouts(
        random_key, length, share, rollouts=draws, geometry=geometry, capacity=length
    )
    variants = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), foreign, drawn)
    losses, entries = nll.variant_losses(models.base, params["base"], tree, variants, window.horizon)

    scores = policy_scores(models, params["lens"], jax.tree.map(lambda leaf: leaf[1:], entries))
    values = preferences.variant_values(
        scores,
        drawn,
        window=shape.history,
        block_size=shape.block_size,
        max_lod=shape.max_lod,
        recent_tokens=shape.recent_tokens,
    )
    # What all rollouts share, the loss of the baseline, changes no correlation.
    found, is_defined = preferences.correlation(values, -losses[1:], distinct)

    def symbols(context: WorkingContext) -> Array:
        return context.start * (shape.max_lod + 1) + context.lod

    recency = contexts.baseline(length, window=shape.history, capacity=length)
    return FocusEvidence(
        foreign=_measured(_one(foreign), losses[:1], answers, config),
        divergence=faithfulness.divergence(symbols(own), own.length, symbols(recency), recency.length),
        changed_edits=_changed_edits(own, foreign, length=length, config=config),
        correlation=jnp.where(is_defined, found, jnp.nan),
    )


def _changed_edits(own: WorkingContext, foreign: WorkingContext, *, length: int, config: Config) -> Array:
    """Jaccard distance of two contexts' edits of the cold start, float32[]; 0 where there are none."""
    geometry = config.context.geometry
    start = allocator.uniform(length, geometry).collapsed

    def edited(context: WorkingContext) -> Array:
        cut = contexts.to_cut(context, window=geometry.window)
        return allocator.from_cut(cut, geometry).collapsed != start

    by_own, by_foreign = edited(own), edited(foreign)
    changed, either = (jnp.sum(x, dtype=jnp.float32) for x in (by_own ^ by_foreign, by_own | by_foreign))
    return changed / jnp.maximum(either, 1)


def _keys(key: Array) -> tuple[Array, Array]:
    """Randomness of the rivals, and of LensNet's allocator."""
    rival_key, lens_key = jax.random.split(key)
    return rival_key, lens_key


def _path(
    models: Models, params: dict[str, Params], tree: TreeState, key: Array, *, length: int, config: Config
) -> list[WorkingContext]:
    """The steps of LensNet's way from the cold start."""
    walk = policy_contexts(models, params["lens"], tree, length, config=config, capacity=length, key=key)
    return [_one(jax.tree.map(lambda leaf, i=i: leaf[i], walk)) for i in range(config.focus.steps + 1)]


def _one(context: WorkingContext) -> WorkingContext:
    return jax.tree.map(lambda leaf: leaf[None], context)


def _measured(variants: WorkingContext, losses: Array, answers: Array | None, config: Config) -> Measured:
    nothing = jnp.full((), jnp.nan)
    hit = nothing
    if answers is not None:
        shown = jax.vmap(lambda one: held_out.shows_in_full(one, answers, config))(variants)
        hit = jnp.mean(shown, dtype=jnp.float32)
    entries = jnp.stack([variants.length.min(), variants.length.max()])
    return Measured(losses.mean(), hit, nothing, nothing, entries)


def _movement(path: list[WorkingContext], *, window: int) -> dict[str, Array]:
    """How much a sequence of contexts of one length moves."""
    rates = [
        jax.vmap(lambda a, b: allocator.swap_rate(a, b, window=window))(before, after)[0]
        for before, after in itertools.pairwise(path)
    ]
    # Of n contexts of W entries, W + new entries stays begin; together they last n W steps.
    residency = len(path) / (1 + sum(rates, jnp.zeros(())))
    return {"swap_rate": jnp.mean(jnp.stack(rates)), "residency": residency}


def gap_closed(policy: float, recency: float, reference: float) -> float:
    """(recency - policy) / (recency - reference): 0 is recency, 1 the reference; NaN if that is not below recency."""
    gap = recency - reference
    return (recency - policy) / gap if gap > 0 else math.nan
