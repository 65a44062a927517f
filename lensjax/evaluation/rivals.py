"""Everybody who could choose a context, by name: policies that see the history alone, and bounds in hindsight."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from lensjax.context import allocator, rollouts
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from lensjax.evaluation import baselines
from lensjax.evaluation.answers import oracle_state
from lensjax.models import AttentiveLanguageModel, Models, Params
from lensjax.models.decision import Window, build_tree
from lensjax.models.lensnet import LensConfig
from lensjax.training import nll, teachers


def causal(
    models: Models,
    params: dict[str, Params],
    history: Array,
    key: Array,
    geometry: Geometry,
    *,
    length: int,
    draws: int,
    high_lod_share: float,
) -> dict[str, WorkingContext]:
    """The contexts of every causal policy but LensNet: they see the history, and the query at its end.

    Args:
      models: base model and GistNet are called.
      params: parameters of `base` and `gist`.
      history: int32[C].
      key: PRNG key of the random policies, consumed.
      geometry: the history.
      length: entries of every context, a reachable length.
      draws: contexts of each random policy.
      high_lod_share: see `rollouts.sample_cut`.

    Returns:
      By name; leading axis: the policy's draws. `key_norm` and `snapkv` only where the base model shows its attention.
    """
    share = high_lod_share
    random_key, recent_key = jax.random.split(key)
    drawn, _ = rollouts.sample_rollouts(random_key, length, share, rollouts=draws, geometry=geometry, capacity=length)
    query = slice(-geometry.recent_tokens, None)
    scored = {"recency_sink": baselines.and_sink(geometry)}
    if isinstance(models.base, AttentiveLanguageModel):
        attention, key_norm = baselines.attention(models.base, params["base"], history, query, geometry)
        scored |= {"key_norm": key_norm, "snapkv": attention}
    scored |= {"bm25": baselines.bm25(history, history[query], geometry), "lookup": baselines.lookup(history, geometry)}
    # Copied ahead: they keep what follows a match, where the rules of the literature keep the match.
    following = [name for name in ("snapkv", "lookup") if name in scored]
    scored |= {f"{name}_next": baselines.and_next(scored[name], length, geometry) for name in following}
    return {
        "recency": _one(contexts.recency(length, geometry, capacity=length)),
        "uniform": _one(allocator.to_context(allocator.uniform(length, geometry), geometry, capacity=length)),
        "random": drawn,
        "recent_random": baselines.recent_random(recent_key, length, share, draws=draws, geometry=geometry),
        **{name: _by_scores(scores, length, geometry) for name, scores in scored.items()},
    }


def hindsight(
    models: Models,
    params: dict[str, Params],
    window: Window,
    answers: Array | None,
    geometry: Geometry,
    *,
    length: int,
) -> dict[str, WorkingContext]:
    """Contexts that the horizon's tokens choose, bounds that no policy can be held to.

    Args:
      models: the base model is called.
      params: parameters of `base`.
      window: history and horizon.
      answers: int32[A], first tokens of the blocks to be shown; None where they are not known.
      geometry: the history.
      length: entries of every context.

    Returns:
      By name: `snapkv_hindsight` and `bm25_hindsight` have the horizon as their query, `answer` shows what is known to
      be needed. Leading axis 1.
    """
    scored: dict[str, Array] = {}
    if isinstance(models.base, AttentiveLanguageModel):
        scored["snapkv_hindsight"] = teachers.future_attention(models.base, params["base"], window, heads="mean")
    scored["bm25_hindsight"] = baselines.bm25(window.history, window.horizon, geometry)
    chosen = {name: _by_scores(scores, length, geometry) for name, scores in scored.items()}
    if answers is not None:
        in_full = oracle_state(answers, length, geometry)
        chosen["answer"] = _one(allocator.to_context(in_full, geometry, capacity=length))
    return chosen


def searched(
    models: Models,
    params: dict[str, Params],
    window: Window,
    shown: dict[str, WorkingContext],
    losses: dict[str, Array],
    geometry: Geometry,
    *,
    length: int,
    rounds: int,
) -> tuple[WorkingContext, Array]:
    """The best context that a search on the horizon's loss finds, from contexts whose losses are known.

    Args:
      models: base model and GistNet are called, and neither without rounds.
      params: parameters of `base` and `gist`.
      window: history and horizon.
      shown: contexts by the name of who chose them, leading axis: draws.
      losses: theirs, float32[draws] by name.
      geometry: the history.
      length: entries of every context.
      rounds: see `baselines.greedy_oracle`.

    Returns:
      The context, leading axis 1, and its loss float32[].
    """
    # Every cut of the whole history can be edited; without omission recency leaves its beginning out.
    names = [name for name in shown if geometry.omit or name != "recency"]
    variants = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(shown[name] for name in names))
    cuts = jax.vmap(lambda one: contexts.to_cut(one, geometry))(variants)
    starts = jax.vmap(lambda cut: allocator.from_cut(cut, geometry))(cuts)
    tree = build_tree(models, params, window.history, geometry)

    def loss(context: WorkingContext) -> Array:
        read = contexts.materialise(tree, contexts.read(context, geometry))
        return nll.token_nll(models.base, params["base"], read, window.horizon).mean()

    known = jnp.concatenate([losses[name] for name in names])
    best, least = baselines.greedy_oracle(loss, starts, known, geometry, length=length, rounds=rounds)
    return _one(allocator.to_context(best, geometry, capacity=length)), least


def information(name: str) -> Literal["causal", "hindsight"]:
    """Whether a policy chooses from the history alone, or knows the horizon or its loss."""
    is_hindsight = name in ("answer", "oracle") or name.startswith("best_of_") or name.endswith("_hindsight")
    return "hindsight" if is_hindsight else "causal"


def reads(name: str, *, history: int, horizon: int, rows: int) -> int:
    """How many vectors, tokens or entries, a policy looks at for one decision.

    Args:
      name: of the policy.
      history: tokens before the cursor C.
      horizon: tokens behind it H.
      rows: what LensNet is shown of a working context.

    Returns:
      0 for rules that look at none, `rows` for LensNet, C for what rates every token, C + H for what decides in
      hindsight, a search on the loss included.

    Raises:
      ValueError: nobody of that name is known.

    Example:
      >>> from lensjax.evaluation import rivals
      >>> [rivals.reads(name, history=224, horizon=32, rows=56) for name in ("recency", "lensnet_4", "bm25", "oracle")]
      [0, 56, 224, 256]
    """
    if information(name) == "hindsight":
        return history + horizon
    if name in _BLIND:
        return 0
    if name in ("key_norm", "snapkv", "snapkv_next", "bm25", "lookup", "lookup_next"):
        return history
    if name == "session" or name.startswith("lensnet_"):
        return rows
    raise ValueError(f"{name} is no policy of which is known what it reads")


def lens_rows(lens: LensConfig, geometry: Geometry, length: int) -> int:
    """Vectors that LensNet looks at: entries, the map of what is omitted, and every token of which it reads attention.

    Example:
      >>> import lensjax as lx
      >>> from lensjax.evaluation import rivals
      >>> geometry = lx.Geometry(history=224, block_size=8, max_lod=1, recent_tokens=8, omit=True)
      >>> [rivals.lens_rows(lx.LensConfig(reads=reads), geometry, 56) for reads in ("nothing", "attention")]
      [77, 301]
    """
    seen = geometry.seen(length) if lens.map else length
    return seen if lens.reads == "nothing" else seen + geometry.history


_BLIND = (
    *("recency", "recency_sink", "uniform", "random", "recent_random", "full", "empty"),
    *("sliding_window", "collapse_oldest", "random_scores", "whole_window"),
)


def order(name: str) -> tuple[int, str]:
    """Key to sort the names of policies by: what knows nothing first, what chooses in hindsight last."""
    kinds = (
        "empty",
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


def _by_scores(scores: Array, length: int, geometry: Geometry) -> WorkingContext:
    return _one(allocator.to_context(baselines.by_scores(scores, length, geometry), geometry, capacity=length))


def _one(context: WorkingContext) -> WorkingContext:
    return jax.tree.map(lambda leaf: leaf[None], context)
