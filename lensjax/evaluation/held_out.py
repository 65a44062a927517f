"""Held-out measurements: the training metrics on fixed batches, and the loss of contexts that the policy picks."""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lensjax import _settings
from lensjax.context import allocator, refocus
from lensjax.context import working as contexts
from lensjax.context.working import WorkingContext
from lensjax.evaluation.answers import oracle_state, shows_in_full
from lensjax.models import HyperLoRAModel, Models, Params
from lensjax.models.decision import build_tree, policy, policy_scores, split
from lensjax.models.hyperlora import Deltas
from lensjax.training import key_tokens, metrics, nll, objective
from lensjax.training.metrics import Metrics
from lensjax.training.objective import Statistics
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch, ScoredVariants, reward_weights, score_variants
from lensjax.training.steps.adaptation import adapted, document_deltas, score_supports
from lensjax.training.steps.difficulty import current_length, hardest_share
from lensjax.training.steps.train_state import TrainState, objective_key
from lensjax.training.steps.update import all_parts


def eval_step(
    key: Array, state: TrainState, batch: Batch, frozen: dict[str, Params], *, recipe: Recipe, models: Models
) -> Metrics:
    """Metrics of one held-out batch; changes nothing.

    Args:
      key: PRNG key of the rollouts, consumed; fixed per batch, so that runs are compared on the same rollouts.
      state: the state to measure.
      batch: `tokens` int32[B, T]; for tasks with known answers also `answers` int32[B, A], the first
        tokens of the blocks to be shown.
      frozen: parameters of those of `base`, `gist` and `lens` that the state does not train.
      recipe: static.
      models: static.

    Returns:
      The names of `train_step` that concern the objective, and at the length of the curriculum's end `nll_policy` (the
      context that the policy makes of a cold start), `nll_policy_key` and `nll_baseline_key` (on the key tokens of the
      batch, NaN where it has none), `key_token_share` (of all scored tokens), `mc/swap_rate` (the share of entries that
      each refocus step on the way there replaces, mean over steps), and where answers are known `hit_rate` (that
      context shows them all in full), `hit_rate_random` (the share of the rollouts that do) and `nll_oracle` (the
      answers in full, then the most recent blocks). Losses are of all tokens of the horizon, whichever are rewarded,
      but for those named so.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lensjax as lx
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), context=lx.ContextConfig(window=64, max_lod=1))
      >>> recipe, models = config.recipe, config.build_models()
      >>> state, frozen = lx.init_train_state(jax.random.key(0), recipe=recipe, models=models)
      >>> measure = jax.jit(functools.partial(lx.eval_step, recipe=recipe, models=models))
      >>> tokens = jax.random.randint(jax.random.key(1), (2, config.context.window), 0, 256)
      >>> report = measure(jax.random.key(2), state, {"tokens": tokens}, frozen)
      >>> bool(jnp.abs(report["nll_policy"] - jnp.log(256.0)) < 0.2)  # a fresh model is near uniform
      True
    """
    length, keys, params = final_length(state, recipe), batch_keys(batch, key), all_parts(state, frozen)

    def score(recipe: Recipe) -> ScoredVariants:
        one = functools.partial(_score, models, params, state)
        return jax.vmap(lambda tokens, row: one(tokens, row, length, recipe))(batch["tokens"], keys)

    scored = score(recipe)
    scores = policy_scores(models.lens, params["lens"], scored.entries)
    anchor_scores = None if state.anchor is None else policy_scores(models.lens, state.anchor, scored.entries)
    report = objective.lens_objective(
        objective_key(key),
        scored,
        scores,
        anchor_scores,
        Statistics(state.normaliser, state.demand, state.hyper.temperature_end),
        state.hyper,
        recipe=recipe.measured,
    ).metrics
    if recipe.context.reward != "mean":
        plain = score(_settings.replace(recipe, **{"context.reward": "mean"}))
        losses = metrics.advantage_metrics(plain.nll, plain.distinct)
        report |= {name: value for name, value in losses.items() if name.startswith("nll_")}
    if "answers" in batch:
        shown = jax.vmap(jax.vmap(lambda variant, blocks: shows_in_full(variant, blocks, recipe.geometry), (0, None)))
        hits = shown(scored.contexts, batch["answers"])[:, 1:]
        report["hit_rate_random"] = jnp.mean(hits, dtype=jnp.float32)
    return report | pick_metrics(models, params, batch, keys, length, recipe=recipe)


def final_length(state: TrainState, recipe: Recipe) -> Array:
    """Entries of a working context at the curriculum's end, int32[]."""
    # A curriculum may be longer than what is left of it: without preferences there is no step of it at all.
    last = max(recipe.steps, recipe.optimizer.curriculum_steps or 0)
    return current_length(jnp.asarray(last, jnp.int32), state.hyper, recipe=recipe)


def batch_keys(batch: Batch, key: Array) -> Array:
    """The key of each sequence of a held-out batch, [B]."""
    return jax.random.split(key, batch["tokens"].shape[0])


def _score(
    models: Models,
    params: dict[str, Params],
    state: TrainState,
    tokens: Array,
    key: Array,
    length: Array,
    recipe: Recipe,
) -> ScoredVariants:
    # All policies are measured on random variants: none chooses what it is asked.
    context = _settings.replace(recipe.context, own_rollouts=0, proposed_rollouts=0)
    return score_variants(
        key,
        params,
        tokens,
        length,
        hardest_share(state.hyper, recipe),
        models=models,
        context=context,
        capacity=recipe.capacity,
        short=recipe.short,
    )


def _lens_key(key: Array) -> Array:
    """Randomness of the allocator on a sequence whose rollouts take `key`."""
    return jax.random.fold_in(key, 1)


def pick_metrics(
    models: Models,
    params: dict[str, Params],
    batch: Batch,
    keys: Array,
    length: Array,
    *,
    recipe: Recipe,
    deltas: Deltas | None = None,
) -> Metrics:
    """Of the contexts that LensNet picks.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      batch: as for `eval_step`.
      keys: PRNG keys [B] of the sequences.
      length: int32[], entries of every context; may be traced.
      recipe: shapes, and how the allocator acts.
      deltas: leading axis B: adapts LensNet to each sequence; None leaves it as it is.

    Returns:
      `nll_policy`, `mc/swap_rate`, and where answers are known `nll_oracle` and `hit_rate`; `nll_policy_key`,
      `nll_baseline_key` and `key_token_share`, see `eval_step`.
    """
    geometry, capacity = recipe.geometry, recipe.capacity
    has_answer = "answers" in batch
    answers = batch["answers"] if has_answer else jnp.zeros((batch["tokens"].shape[0], 1), jnp.int32)

    def measure(tokens: Array, blocks: Array, key: Array, delta: Deltas | None) -> tuple[Array, Array, Array, Array]:
        window = split(tokens, horizon=recipe.context.horizon)
        tree = build_tree(models, params, window.history, geometry)
        lens = params["lens"] if delta is None else adapted(params["lens"], delta)
        path = refocus.cold_start(
            policy(models.lens, lens, tree),
            length,
            geometry,
            capacity=capacity,
            settings=recipe.focus,
            key=_lens_key(key),
        )
        picked = [jax.tree.map(lambda leaf: leaf[-1], path), contexts.recency(length, geometry, capacity=capacity)]
        if has_answer:
            picked.append(allocator.to_context(oracle_state(blocks, length, geometry), geometry, capacity=capacity))
        variants = jax.tree.map(lambda *leaves: jnp.stack(leaves), *picked)
        losses, _ = nll.variant_token_nll(models.base, params["base"], tree, variants, window.horizon, geometry)
        is_key = key_tokens.find(models.base, params["base"], window, recipe.context.key, short=recipe.short)
        before, after = jax.tree.map(lambda leaf: leaf[:-1], path), jax.tree.map(lambda leaf: leaf[1:], path)
        rates = jax.vmap(lambda one, other: refocus.swap_rate(one, other, geometry))(before, after)
        return losses, is_key, shows_in_full(picked[0], blocks, geometry), rates

    losses, is_key, hits, rates = jax.vmap(measure)(batch["tokens"], answers, keys, deltas)
    of_policy, of_recency = (key_tokens.key_nll(losses[:, place].ravel(), is_key.ravel()) for place in (0, 1))
    report = {
        "nll_policy": jnp.mean(losses[:, 0]),
        "nll_policy_key": of_policy,
        "nll_baseline_key": of_recency,
        "key_token_share": jnp.mean(is_key, dtype=jnp.float32),
        "mc/swap_rate": jnp.mean(rates),
    }
    if has_answer:
        report |= {"nll_oracle": jnp.mean(losses[:, 2]), "hit_rate": jnp.mean(hits, dtype=jnp.float32)}
    return report


_ADAPTED = ("nll_policy", "nll_policy_key", "hit_rate")


def adaptation_eval_step(
    key: Array,
    state: TrainState,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    models: Models,
    hypernet: HyperLoRAModel,
) -> Metrics:
    """`eval_step`, and of the contexts that LensNet picks when it is adapted to each sequence by rollouts of its past.

    Returns:
      Also `nll_policy_adapted`, `nll_policy_key_adapted`, and where answers are known `hit_rate_adapted`.
    """
    report = eval_step(key, state, batch, frozen, recipe=recipe, models=models)
    keys, params = batch_keys(batch, key), all_parts(state, frozen)
    supports = score_supports(params, state, batch, keys, recipe.steps, recipe=recipe, models=models)
    past = recipe.past.geometry
    deltas = jax.vmap(lambda one: document_deltas(models, hypernet, params, one, past))(supports)
    length = final_length(state, recipe)
    picked = pick_metrics(models, params, batch, keys, length, recipe=recipe, deltas=deltas)
    return report | {f"{name}_adapted": picked[name] for name in _ADAPTED if name in picked}


def pretrain_eval_step(params: dict[str, Params], batch: Batch, *, horizon: int, models: Models) -> Metrics:
    """Teacher-forced loss of a held-out batch on full windows, and on the last `horizon` tokens alone.

    Args:
      params: parameters of `base`.
      batch: `tokens` int32[B, T].
      horizon: tokens behind the cursor H.
      models: static.

    Returns:
      `nll_full` and `nll_full_tail`, nats per token.
    """
    losses = jax.vmap(lambda row: nll.sequence_nll(models.base, params["base"], row))(batch["tokens"])
    return {"nll_full": jnp.mean(losses), "nll_full_tail": jnp.mean(losses[:, -horizon:])}


def mean_over_batches(reports: Iterable[Metrics]) -> dict[str, float]:
    """Mean of each metric over batches of one size; undefined (NaN) values are left out of their mean.

    Counts are added up rather than averaged; a loss on key tokens is the mean over those of all batches.
    """
    rows = [jax.device_get(report) for report in reports]
    merged: dict[str, float] = {}
    for name in rows[0]:
        values = np.asarray([row[name] for row in rows], np.float64)
        if name == "mc/preference_pair_count":
            merged[name] = float(values.sum())
        elif name in metrics.ON_KEY_TOKENS:
            shares = np.asarray([row["key_token_share"] for row in rows], np.float64)
            there = shares > 0
            merged[name] = float(np.average(values[there], weights=shares[there])) if there.any() else math.nan
        elif name == "mc/preference_corr_max":
            merged[name] = _ignoring_nan(np.max, values)
        elif name == "mc/preference_corr_min":
            merged[name] = _ignoring_nan(np.min, values)
        elif name == "mc/preference_corr_mean":
            merged[name] = _ignoring_nan(np.mean, values)
        else:
            merged[name] = float(values.mean())
    return merged


def _ignoring_nan(reduce: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(reduce(defined)) if defined.size else math.nan


def variant_maps(
    state: TrainState, tokens: Array, key: Array, frozen: dict[str, Params], *, recipe: Recipe, models: Models
) -> dict[str, Array]:
    """What recency, the rollouts and the policy's pick show of each sequence, for drawing.

    Args:
      state: the state to look at.
      tokens: int32[B, T].
      key: PRNG key of the rollouts, consumed.
      frozen: parameters of those of `base`, `gist` and `lens` that the state does not train.
      recipe: static.
      models: static.

    Returns:
      With R = V + 1 rows, the pick last: `cuts` int32[B, R, C], `scores` float32[B, R, C] (the score of the entry that
      shows each token; NaN where it is not shown), `nll` float32[B, R], as rewarded.
    """
    geometry, length, params = recipe.geometry, final_length(state, recipe), all_parts(state, frozen)
    lens = params["lens"]

    def one(row: Array, row_key: Array) -> dict[str, Array]:
        scored = _score(models, params, state, row, row_key, length, recipe)
        window = split(row, horizon=recipe.context.horizon)
        tree = build_tree(models, params, window.history, geometry)
        score_fn, own_key = policy(models.lens, lens, tree), _lens_key(row_key)
        path = refocus.cold_start(
            score_fn, length, geometry, capacity=recipe.capacity, settings=recipe.focus, key=own_key
        )
        picked = jax.tree.map(lambda leaf: leaf[-1:], path)
        weights = reward_weights(models, params, window, recipe.context, recipe.short)
        picked_nll, entries = nll.variant_nll(
            models.base, params["base"], tree, picked, window.horizon, geometry, weights
        )
        variants, all_entries, measured = jax.tree.map(
            lambda many, last: jnp.concatenate([many, last]),
            (scored.contexts, scored.entries, scored.nll),
            (picked, entries, picked_nll),
        )
        scores = policy_scores(models.lens, lens, all_entries)
        cuts = jax.vmap(lambda variant: contexts.to_cut(variant, geometry))(variants)
        per_token = jax.vmap(functools.partial(_score_of_tokens, history=geometry.history))(variants, scores)
        return {"cuts": cuts, "scores": per_token, "nll": measured}

    return jax.vmap(one)(tokens, jax.random.split(key, tokens.shape[0]))


def _score_of_tokens(context: WorkingContext, scores: Array, *, history: int) -> Array:
    entry = jnp.searchsorted(context.start, jnp.arange(history, dtype=jnp.int32), side="right") - 1
    return jnp.where(entry >= 0, jnp.take(scores, entry, mode="clip"), jnp.nan)
