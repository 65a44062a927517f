"""Held-out measurements: the training metrics on fixed batches, and the loss of contexts that the policy picks."""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lensjax import context as contexts
from lensjax import focus, nll, objective
from lensjax.config import Config
from lensjax.context import WorkingContext
from lensjax.metrics import Metrics
from lensjax.models import Models, Params
from lensjax.train import TrainState, current_length
from lensjax.variants import Batch, build_tree, policy_scores, score_variants


def eval_step(state: TrainState, batch: Batch, key: Array, *, config: Config, models: Models) -> Metrics:
    """Metrics of one held-out batch; changes nothing.

    Args:
      state: the state to measure.
      batch: `tokens` int32[B, T]; for recall also `answer` int32[B], first token of the block that the tail repeats.
      key: PRNG key of the rollouts, consumed; fixed per batch, so that runs are compared on the same rollouts.
      config: static.
      models: static.

    Returns:
      The names of `train_step` that concern the objective, and at the length of the curriculum's end `nll_policy` (the
      policy's own one-shot pick from a cold start), and for recall `hit_rate` (its top-scored block is the answer),
      `hit_rate_chance` (one over the number of blocks) and `nll_oracle` (the answer in full, then the most recent
      blocks).
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
        normaliser=state.normaliser,
        budget=state.budget,
        temperature=state.hyper.temperature_end,
        hyper=state.hyper,
        config=config,
    ).metrics
    return report | _pick_metrics(state.params, batch, length, config, models)


def cold_start_scores(models: Models, params: dict[str, Params], tokens: Array, *, config: Config) -> Array:
    """The policy's score of every LOD-1 block, seen from a context in which all of them are collapsed.

    Args:
      models: the models.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      config: shapes.

    Returns:
      float32[blocks(1)], oldest block first.
    """
    geometry = config.context.geometry
    capacity = geometry.window - geometry.blocks(1) * (geometry.block_size - 1)
    tree = build_tree(models, params, tokens, config)
    start = contexts.from_cut(focus.coarse_cut(geometry), block_size=geometry.block_size, capacity=capacity)
    scores = policy_scores(models, params["lens"], contexts.materialise(tree, start))
    return scores[: geometry.blocks(1)]


def _context_of_scores(block_scores: Array, length: Array, config: Config) -> WorkingContext:
    """The working context of one length that shows the highest-scored blocks in full."""
    cut = focus.cut_from_block_scores(block_scores, length, config.context.geometry)
    return contexts.from_cut(cut, block_size=config.context.block_size, capacity=config.context_capacity)


def _pick_metrics(params: dict[str, Params], batch: Batch, length: Array, config: Config, models: Models) -> Metrics:
    shape, geometry = config.context, config.context.geometry
    has_answer = "answer" in batch
    answers = batch["answer"] // shape.block_size if has_answer else jnp.zeros(batch["tokens"].shape[0], jnp.int32)

    def measure(tokens: Array, answer: Array) -> tuple[Array, Array]:
        block_scores = cold_start_scores(models, params, tokens, config=config)
        oracle_scores = (jnp.arange(geometry.blocks(1)) == answer).astype(jnp.float32)
        picks = [block_scores, oracle_scores] if has_answer else [block_scores]
        picked = jax.vmap(lambda pick: _context_of_scores(pick, length, config))(jnp.stack(picks))
        tree = build_tree(models, params, tokens, config)
        losses, _ = nll.variant_losses(models.base, params["base"], tree, picked, tokens, horizon=shape.horizon)
        return losses, jnp.argmax(block_scores) == answer

    losses, hits = jax.vmap(measure)(batch["tokens"], answers)
    report = {"nll_policy": jnp.mean(losses[:, 0])}
    if has_answer:
        report |= {
            "nll_oracle": jnp.mean(losses[:, 1]),
            "hit_rate": jnp.mean(hits, dtype=jnp.float32),
            "hit_rate_chance": jnp.asarray(1 / geometry.blocks(1), jnp.float32),
        }
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
      With R = V + 1 rows, the pick last: `cuts` int32[B, R, T], `scores` float32[B, R, T] (the score of the entry that
      shows each token; NaN where it is not shown), `nll` float32[B, R].
    """
    shape = config.context
    length = current_length(jnp.asarray(config.steps, jnp.int32), state.hyper, config)

    def one(row: Array, row_key: Array) -> dict[str, Array]:
        scored = score_variants(models, state.params, row, row_key, length, state.hyper.lod2_share, config=config)
        block_scores = cold_start_scores(models, state.params, row, config=config)
        picked = jax.tree.map(lambda leaf: leaf[None], _context_of_scores(block_scores, length, config))
        tree = build_tree(models, state.params, row, config)
        loss, entries = nll.variant_losses(models.base, state.params["base"], tree, picked, row, horizon=shape.horizon)
        variants, all_entries, losses = jax.tree.map(
            lambda many, last: jnp.concatenate([many, last]),
            (scored.contexts, scored.entries, scored.losses),
            (picked, entries, loss),
        )
        scores = policy_scores(models, state.params["lens"], all_entries)
        cuts = jax.vmap(lambda variant: contexts.to_cut(variant, window=shape.window))(variants)
        per_token = jax.vmap(functools.partial(_score_of_tokens, window=shape.window))(variants, scores)
        return {"cuts": cuts, "scores": per_token, "nll": losses}

    return jax.vmap(one)(tokens, jax.random.split(key, tokens.shape[0]))


def _score_of_tokens(context: WorkingContext, scores: Array, *, window: int) -> Array:
    entry = jnp.searchsorted(context.start, jnp.arange(window, dtype=jnp.int32), side="right") - 1
    return jnp.where(entry >= 0, jnp.take(scores, entry, mode="clip"), jnp.nan)
