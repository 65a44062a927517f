"""Held-out measurements: the training metrics on fixed batches, and the loss of contexts that the policy picks."""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import CutGeometry
from lensjax.context.working import WorkingContext
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, policy_contexts, policy_scores, split
from lensjax.models.hyperlora import Deltas
from lensjax.runs.config import Config
from lensjax.training import nll, objective
from lensjax.training.metrics import Metrics
from lensjax.training.scoring import Batch, score_variants
from lensjax.training.steps import adaptation
from lensjax.training.steps.preference import TrainState, current_length, objective_key, score_supports


def eval_step(state: TrainState, batch: Batch, key: Array, *, config: Config, models: Models) -> Metrics:
    """Metrics of one held-out batch; changes nothing.

    Args:
      state: the state to measure.
      batch: `tokens` int32[B, T]; for tasks with known answers also `answers` int32[B, A], the first
        tokens of the blocks to be shown.
      key: PRNG key of the rollouts, consumed; fixed per batch, so that runs are compared on the same rollouts.
      config: static.
      models: static.

    Returns:
      The names of `train_step` that concern the objective, and at the length of the curriculum's end `nll_policy` (the
      context that the policy makes of a cold start), `mc/swap_rate` (the share of entries that each refocus step on
      the way there replaces, mean over steps), and where answers are known `hit_rate` (that context shows them
      all in full), `hit_rate_random` (the share of the rollouts that do) and `nll_oracle` (the answers in full, then
      the most recent blocks). Where a hypernetwork is trained, `nll_policy_adapted` and `hit_rate_adapted` are of the
      contexts that LensNet picks when it is adapted to each sequence by rollouts of its past.
    """
    length = current_length(jnp.asarray(config.steps, jnp.int32), state.hyper, config)
    keys = jax.random.split(key, batch["tokens"].shape[0])
    scored = jax.vmap(
        lambda tokens, row: score_variants(
            models, state.params, tokens, row, length, state.hyper.lod2_share, config=config
        )
    )(batch["tokens"], keys)
    scores = policy_scores(models, state.params["lens"], scored.entries)
    anchor_scores = None if state.anchor is None else policy_scores(models, state.anchor, scored.entries)
    report = objective.lens_objective(
        scored,
        scores,
        anchor_scores,
        objective_key(key),
        normaliser=state.normaliser,
        budget=state.budget,
        temperature=state.hyper.temperature_end,
        hyper=state.hyper,
        config=config,
    ).metrics
    if "answers" in batch:
        shown = jax.vmap(jax.vmap(lambda variant, answers: shows_in_full(variant, answers, config), (0, None)))
        hits = shown(scored.contexts, batch["answers"])[:, 1:]
        report["hit_rate_random"] = jnp.mean(hits, dtype=jnp.float32)
    report |= _pick_metrics(state.params, batch, keys, length, config, models)
    if "hyper" in state.params:
        support = score_supports(state, batch, keys, config.steps, config=config, models=models)
        deltas = jax.vmap(lambda one: adaptation.document_deltas(models, state.params, one, config=config))(support)
        picked = _pick_metrics(state.params, batch, keys, length, config, models, deltas)
        report |= {f"{name}_adapted": picked[name] for name in ("nll_policy", "hit_rate") if name in picked}
    return report


def oracle_state(answers: ArrayLike, length: ArrayLike, geometry: CutGeometry) -> FocusState:
    """The context of one length that shows the blocks at tokens int32[A] in full, and else the most recent blocks."""
    tokens, answers = jnp.arange(geometry.window), jnp.asarray(answers)
    is_answer = jnp.any(tokens[None, :] // geometry.block_size == answers[:, None] // geometry.block_size, axis=0)
    wish = jnp.where(is_answer, 1.0, tokens / geometry.window - 1)
    return allocator.fit(
        allocator.uniform(geometry.window, geometry), nodes.pool_tokens(wish, geometry), length, geometry
    )


def shows_in_full(context: WorkingContext, answers: ArrayLike, config: Config) -> Array:
    """Whether a context shows all of the blocks that begin at tokens int32[A] in full; bool[]."""
    shape = config.context
    cut = contexts.to_cut(context, window=shape.history)
    tokens = jnp.asarray(answers)[:, None] + jnp.arange(shape.block_size)[None, :]
    return jnp.all(cut[tokens] == 0)


def _lens_key(key: Array) -> Array:
    """Randomness of the allocator on a sequence whose rollouts take `key`."""
    return jax.random.fold_in(key, 1)


def _pick_metrics(
    params: dict[str, Params],
    batch: Batch,
    keys: Array,
    length: Array,
    config: Config,
    models: Models,
    deltas: Deltas | None = None,
) -> Metrics:
    """Of the contexts that LensNet picks, as it is or adapted to each sequence by the deltas given."""
    shape, geometry, capacity = config.context, config.context.geometry, config.context_capacity
    has_answer = "answers" in batch
    answers = batch["answers"] if has_answer else jnp.zeros((batch["tokens"].shape[0], 1), jnp.int32)

    def measure(tokens: Array, answers: Array, key: Array, delta: Deltas | None) -> tuple[Array, Array, Array]:
        window = split(tokens, horizon=shape.horizon)
        tree = build_tree(models, params, window.history, config)
        lens = params["lens"] if delta is None else adaptation.adapted(params["lens"], delta)
        made = policy_contexts(models, lens, tree, length, config=config, capacity=capacity, key=_lens_key(key))
        picked = [jax.tree.map(lambda leaf: leaf[-1], made)]
        if has_answer:
            picked.append(allocator.to_context(oracle_state(answers, length, geometry), geometry, capacity=capacity))
        variants = jax.tree.map(lambda *leaves: jnp.stack(leaves), *picked)
        losses, _ = nll.variant_losses(models.base, params["base"], tree, variants, window.horizon)
        before, after = jax.tree.map(lambda leaf: leaf[:-1], made), jax.tree.map(lambda leaf: leaf[1:], made)
        rates = jax.vmap(functools.partial(allocator.swap_rate, window=geometry.window))(before, after)
        return losses, shows_in_full(picked[0], answers, config), rates

    losses, hits, rates = jax.vmap(measure)(batch["tokens"], answers, keys, deltas)
    report = {"nll_policy": jnp.mean(losses[:, 0]), "mc/swap_rate": jnp.mean(rates)}
    if has_answer:
        report |= {"nll_oracle": jnp.mean(losses[:, 1]), "hit_rate": jnp.mean(hits, dtype=jnp.float32)}
    return report


def pretrain_eval_step(params: dict[str, Params], batch: Batch, *, config: Config, models: Models) -> Metrics:
    """Teacher-forced loss of a held-out batch on full windows, and on the last `horizon` tokens alone.

    Args:
      params: parameters of `base`.
      batch: `tokens` int32[B, T].
      config: static.
      models: static.

    Returns:
      `nll_full` and `nll_full_tail`, nats per token.
    """
    losses = jax.vmap(lambda row: nll.sequence_losses(models.base, params["base"], row))(batch["tokens"])
    return {"nll_full": jnp.mean(losses), "nll_full_tail": jnp.mean(losses[:, -config.context.horizon :])}


def mean_over_batches(reports: Iterable[Metrics]) -> dict[str, float]:
    """Mean of each metric over batches of one size; undefined (NaN) values are left out of their mean.

    Counts are added up rather than averaged.
    """
    rows = [jax.device_get(report) for report in reports]
    merged: dict[str, float] = {}
    for name in rows[0]:
        values = np.asarray([row[name] for row in rows], np.float64)
        if name == "mc/preference_pair_count":
            merged[name] = float(values.sum())
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


def variant_maps(state: TrainState, tokens: Array, key: Array, *, config: Config, models: Models) -> dict[str, Array]:
    """What the baseline, the rollouts and the policy's pick show of each sequence, for drawing.

    Args:
      state: the state to look at.
      tokens: int32[B, T].
      key: PRNG key of the rollouts, consumed.
      config: static.
      models: static.

    Returns:
      With R = V + 1 rows, the pick last: `cuts` int32[B, R, C], `scores` float32[B, R, C] (the score of the entry that
      shows each token; NaN where it is not shown), `nll` float32[B, R].
    """
    shape = config.context
    length = current_length(jnp.asarray(config.steps, jnp.int32), state.hyper, config)

    def one(row: Array, row_key: Array) -> dict[str, Array]:
        scored = score_variants(models, state.params, row, row_key, length, state.hyper.lod2_share, config=config)
        window = split(row, horizon=shape.horizon)
        tree = build_tree(models, state.params, window.history, config)
        lens, capacity = state.params["lens"], config.context_capacity
        made = policy_contexts(models, lens, tree, length, config=config, capacity=capacity, key=_lens_key(row_key))
        picked = jax.tree.map(lambda leaf: leaf[-1:], made)
        loss, entries = nll.variant_losses(models.base, state.params["base"], tree, picked, window.horizon)
        variants, all_entries, losses = jax.tree.map(
            lambda many, last: jnp.concatenate([many, last]),
            (scored.contexts, scored.entries, scored.losses),
            (picked, entries, loss),
        )
        scores = policy_scores(models, state.params["lens"], all_entries)
        cuts = jax.vmap(lambda variant: contexts.to_cut(variant, window=shape.history))(variants)
        per_token = jax.vmap(functools.partial(_score_of_tokens, window=shape.history))(variants, scores)
        return {"cuts": cuts, "scores": per_token, "nll": losses}

    return jax.vmap(one)(tokens, jax.random.split(key, tokens.shape[0]))


def _score_of_tokens(context: WorkingContext, scores: Array, *, window: int) -> Array:
    entry = jnp.searchsorted(context.start, jnp.arange(window, dtype=jnp.int32), side="right") - 1
    return jnp.where(entry >= 0, jnp.take(scores, entry, mode="clip"), jnp.nan)
