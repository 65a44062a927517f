"""Everybody who could choose a context, by name: policies that see the history alone, and bounds in hindsight."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from lensjax.context import allocator, rollouts
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import CutGeometry
from lensjax.context.working import WorkingContext
from lensjax.evaluation import baselines, held_out
from lensjax.models import Models, Params
from lensjax.models.decision import Window, build_tree
from lensjax.runs.config import Config
from lensjax.training import nll


def causal(
    models: Models,
    params: dict[str, Params],
    history: Array,
    key: Array,
    *,
    length: int,
    draws: int,
    config: Config,
) -> dict[str, WorkingContext]:
    """The contexts of every causal policy but LensNet: they see the history, and the query at its end.

    Args:
      models: the models.
      params: parameters of `base` and `gist`.
      history: int32[C].
      key: PRNG key of the random policies, consumed.
      length: entries of every context, a reachable length.
      draws: contexts of each random policy.
      config: shapes.

    Returns:
      By name; leading axis: the policy's draws.
    """
    geometry, share = config.context.geometry, config.hyper.lod2_share
    random_key, recent_key = jax.random.split(key)
    drawn, _ = rollouts.sample_rollouts(random_key, length, share, rollouts=draws, geometry=geometry, capacity=length)
    query = slice(-geometry.recent_tokens, None)
    attention, key_norm = baselines.attention(models.base, params["base"], history, query, geometry)
    scored = {
        "key_norm": key_norm,
        "snapkv": attention,
        "bm25": baselines.bm25(history, history[query], geometry),
        "lookup": baselines.lookup(history, geometry),
    }
    return {
        "recency": _one(contexts.baseline(length, window=geometry.window, capacity=length)),
        "uniform": _one(allocator.to_context(allocator.uniform(length, geometry), geometry, capacity=length)),
        "random": drawn,
        "recent_random": baselines.recent_random(recent_key, length, share, draws=draws, geometry=geometry),
        **{name: _by_scores(scores, length, geometry) for name, scores in scored.items()},
    }


def hindsight(
    models: Models,
    params: dict[str, Params],
    window: Window,
    rivals: dict[str, WorkingContext],
    answers: Array | None,
    *,
    length: int,
    draws: int,
    oracle_rounds: int,
    config: Config,
) -> dict[str, WorkingContext]:
    """Contexts chosen by the horizon itself, bounds that no policy can be held to; arguments as for `measure`.

    Args:
      models: the models.
      params: parameters of `base` and `gist`.
      window: history and horizon.
      rivals: contexts of the causal policies, the search's starts.
      answers: int32[A], see `measure`.
      length: entries of every context.
      draws: random contexts of which the best is taken.
      oracle_rounds: see `policies.greedy_oracle`.
      config: shapes.

    Returns:
      By name: `snapkv_hindsight` and `bm25_hindsight` have the horizon as their query, `answer` shows what is known to
      be needed, `best_of_N` and `oracle` choose by the loss. Leading axis 1.
    """
    geometry = config.context.geometry
    tree = build_tree(models, params, window.history, config)
    tokens = jnp.concatenate([window.history, window.horizon])
    # The rows that predict the horizon: those of its tokens but the last, and of the token before it.
    query = slice(geometry.window - 1, -1)
    attention, _ = baselines.attention(models.base, params["base"], tokens, query, geometry)
    losses, _ = nll.variant_losses(models.base, params["base"], tree, rivals["random"], window.horizon)
    best = jnp.argmin(losses)
    found = baselines.greedy_oracle(
        models,
        params,
        tree,
        window.horizon,
        _starts(rivals, answers, length, config),
        length=length,
        rounds=oracle_rounds,
        config=config,
    )
    return {
        "snapkv_hindsight": _by_scores(attention, length, geometry),
        "bm25_hindsight": _by_scores(baselines.bm25(window.history, window.horizon, geometry), length, geometry),
        **({} if answers is None else {"answer": _one(_in_full(answers, length, geometry))}),
        f"best_of_{draws}": jax.tree.map(lambda leaf: leaf[best][None], rivals["random"]),
        "oracle": _one(allocator.to_context(found, geometry, capacity=length)),
    }


def information(name: str) -> Literal["causal", "hindsight"]:
    """Whether a policy chooses from the history alone, or knows the horizon or its loss."""
    is_hindsight = name in ("answer", "oracle") or name.startswith("best_of_") or name.endswith("_hindsight")
    return "hindsight" if is_hindsight else "causal"


def order(name: str) -> tuple[int, str]:
    """Key to sort the names of policies by: what knows nothing first, what chooses in hindsight last."""
    kinds = (
        "recency",
        "uniform",
        "random",
        "recent_random",
        "key_norm",
        "snapkv",
        "bm25",
        "lookup",
        "lensnet",
        "snapkv_hindsight",
        "bm25_hindsight",
        "best_of",
        "answer",
        "oracle",
    )
    places = [place for place, kind in enumerate(kinds) if name == kind or name.startswith(f"{kind}_")]
    return (max(places, default=len(kinds)), name)


def _starts(made: dict[str, WorkingContext], answers: Array | None, length: int, config: Config) -> FocusState:
    """Where the search for the oracle may start: every cut of the whole history (recency leaves its beginning out)."""
    geometry = config.context.geometry
    covering = [context for name, context in made.items() if name != "recency"]
    variants = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *covering)
    cuts = jax.vmap(lambda one: contexts.to_cut(one, window=geometry.window))(variants)
    starts = jax.vmap(lambda cut: allocator.from_cut(cut, geometry))(cuts)
    if answers is None:
        return starts
    known = held_out.oracle_state(answers, length, geometry)
    return jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), starts, known)


def _in_full(answers: Array, length: int, geometry: CutGeometry) -> WorkingContext:
    return allocator.to_context(held_out.oracle_state(answers, length, geometry), geometry, capacity=length)


def _by_scores(scores: Array, length: int, geometry: CutGeometry) -> WorkingContext:
    return _one(allocator.to_context(baselines.by_scores(scores, length, geometry), geometry, capacity=length))


def _one(context: WorkingContext) -> WorkingContext:
    return jax.tree.map(lambda leaf: leaf[None], context)
