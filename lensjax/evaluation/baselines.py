"""Who else could choose a context: the policies that LensNet is measured against, and the best that a search finds.

All make working contexts of one exact length over the same history, and see what LensNet may see: its tokens, the last
of which are the query. Given the horizon as the query, or its loss, they choose in hindsight: a bound, and no policy.
Scorers that rate tokens (`attention`, `bm25`, `lookup`) share one allocator, `by_scores`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, nodes, rollouts
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import CutGeometry
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.models import BaseModel, Models, Params
from lensjax.runs.config import Config, FocusConfig
from lensjax.training import nll

BM25_K1 = 1.5
"""How fast a repeated term saturates."""


def by_scores(scores: ArrayLike, length: ArrayLike, geometry: CutGeometry) -> FocusState:
    """The cut of one length that collapses the lowest-scored blocks, and their parents, first.

    Args:
      scores: float32[T], worth of each token in full, of any size (see `lensjax.context.allocator` on those that are not finite);
        a block has the mean of its tokens (`nodes.pool_tokens`), of equal blocks the oldest goes first.
      length: int32[], entries wanted, rounded down to a reachable length; may be traced.
      geometry: the window.

    Returns:
      `FocusState`.
    """
    in_full = allocator.from_cut(jnp.zeros(geometry.window, jnp.int32), geometry)
    return allocator.fit(in_full, nodes.pool_tokens(scores, geometry), length, geometry)


def recent_random(
    key: Array, length: int, lod2_share: ArrayLike, *, draws: int, geometry: CutGeometry
) -> WorkingContext:
    """Half of the budget for the most recent tokens in full, a random cut of everything before them.

    Args:
      key: PRNG key, consumed.
      length: entries of each context.
      lod2_share: float32[], see `rollouts.sample_cut`.
      draws: number of contexts.
      geometry: the window.

    Returns:
      `WorkingContext` with leading axis `draws`. Where half the budget leaves too little for the rest, the tail in full
      is the longest that does not.
    """
    recent = max(length // 2, geometry.recent_tokens)
    while (longer := replace(geometry, recent_tokens=recent)).shortest > length and recent > geometry.recent_tokens:
        recent -= 1
    drawn, _ = rollouts.sample_rollouts(key, length, lod2_share, rollouts=draws, geometry=longer, capacity=length)
    return drawn


def bm25(tokens: ArrayLike, query: ArrayLike, geometry: CutGeometry) -> Array:
    """Lexical relevance of each block of K tokens to a query, as scores of its tokens.

        score(b) = sum over terms q of the query  ln(1 + (n - n_q + 1/2) / (n_q + 1/2)) f (k1 + 1) / (f + k1)

    where f counts q in block b and n_q of the n blocks hold q. All blocks are of one length, so the normalisation by
    length drops out. Terms are tokens.

    Args:
      tokens: int32[C], the history.
      query: int32[Q].
      geometry: the history.

    Returns:
      float32[C], 0 outside of the blocks.

    References:
      Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009, section 3.
    """
    tokens, query = jnp.asarray(tokens), jnp.asarray(query)
    count, size = geometry.blocks(1), geometry.block_size
    is_first = jnp.argmax(query[:, None] == query[None, :], axis=1) == jnp.arange(query.shape[0])
    blocks = tokens[: count * size].reshape(count, size)
    frequency = jnp.sum(blocks[:, None, :] == query[None, :, None], axis=-1, dtype=jnp.float32)
    holding = jnp.sum(frequency > 0, axis=0, dtype=jnp.float32)
    idf = jnp.log1p((count - holding + 0.5) / (holding + 0.5))
    weight = jnp.where(is_first, idf, 0.0)[None, :]
    scores = jnp.sum(weight * frequency * (BM25_K1 + 1) / (frequency + BM25_K1), axis=1)
    return _of_tokens(scores, geometry)


def lookup(tokens: ArrayLike, geometry: CutGeometry) -> Array:
    """Exact matches of the end of the history further back: the rule that solves single-span recall without learning.

    A token's score is the number of tokens, as far back as the query reaches, in which what comes before it is what
    comes before the cursor. Of two blocks, the one that goes on from the longer match is the better.

    Args:
      tokens: int32[C], the history, whose last `recent_tokens` are the query.
      geometry: the history.

    Returns:
      float32[C], at most the length of the query.

    References:
      Saxena, Prompt Lookup Decoding, 2023 (the same rule, for drafting tokens).
    """
    tokens = jnp.asarray(tokens)
    count, running = jnp.zeros(tokens.shape, jnp.float32), jnp.ones(tokens.shape, bool)
    place = jnp.arange(tokens.shape[0])
    for back in range(1, geometry.recent_tokens + 1):
        running &= (place >= back) & (jnp.roll(tokens, back) == tokens[-back])
        count += running.astype(jnp.float32)
    return count


def attention(
    base: BaseModel, params: Params, tokens: ArrayLike, query: slice, geometry: CutGeometry
) -> tuple[Array, Array]:
    """What the base model itself looks at when it reads in full.

    Args:
      base: the base model.
      params: its parameters.
      tokens: int32[S], the history, or more than that.
      query: the tokens whose attention counts.
      geometry: the history, the first C of the tokens.

    Returns:
      float32[C] attention from the query to each token, mean over layers, heads and the query (as SnapKV scores the
      prompt's keys); float32[C] minus the L2 norm of each token's key, mean over layers and heads.

    References:
      Li et al., SnapKV, arXiv:2404.14469, section 4; Devoto et al., A Simple and Effective L2 Norm-Based Strategy for
      KV Cache Compression, arXiv:2406.11430 (keys of low norm are attended to most).
    """
    tokens = jnp.asarray(tokens)
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    spans = jnp.ones(tokens.shape, jnp.float32)
    embeddings = base.embed(params, tokens)
    weights, norms = base.attention(params, embeddings, places.astype(jnp.float32), spans, places[query])
    return weights.mean(axis=(0, 1, 2))[: geometry.window], -norms.mean(axis=(0, 1))[: geometry.window]


def greedy_oracle(
    models: Models,
    params: dict[str, Params],
    tree: TreeState,
    horizon: Array,
    starts: FocusState,
    *,
    length: int,
    rounds: int,
    config: Config,
) -> FocusState:
    """The best context that a greedy search on the measured loss itself finds: a bound, not a policy.

    It starts from the best of the contexts given. A round measures every single edit of the context alone, ranks
    expansions by what they gain and collapses by what they cost, applies the first 1, 2, 4, ... swaps of that ranking,
    and keeps the best of these contexts if it is better.

    Args:
      models: the models.
      params: parameters of `base`.
      tree: the history.
      horizon: int32[H], the tokens behind it, whose loss is searched.
      starts: states of exactly `length` entries, leading axis.
      length: entries of the context.
      rounds: static number of rounds; 0 takes the best of the starts.
      config: shapes.

    Returns:
      `FocusState`.
    """
    geometry = config.context.geometry
    step = geometry.block_size - 1

    def loss(collapsed: Array, capacity: int) -> Array:
        state = FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))
        context = allocator.to_context(state, geometry, capacity=capacity)
        entries = contexts.materialise(tree, context)
        return nll.token_losses(models.base, params["base"], entries, horizon).mean()

    def one_round(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        collapsed, best = carry
        flips = jnp.eye(collapsed.shape[0], dtype=bool) ^ collapsed[None]
        # Illegal edits are measured with the others; the allocator leaves them out.
        expanded = jax.lax.map(lambda row: loss(row, length + step), flips, batch_size=_EDITS_AT_ONCE)
        scores = jnp.where(collapsed, best - expanded, expanded - best)
        state = FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))
        settings = [FocusConfig(max_edits=2**power) for power in range(_DOUBLINGS)]
        tried = jnp.stack([allocator.swap(state, scores, geometry, settings=one)[0].collapsed for one in settings])
        losses = jax.vmap(lambda row: loss(row, length))(tried)
        winner = jnp.argmin(losses)
        is_better = losses[winner] < best
        return (jnp.where(is_better, tried[winner], collapsed), jnp.minimum(best, losses[winner])), None

    losses = jax.vmap(lambda row: loss(row, length))(starts.collapsed)
    first = jnp.argmin(losses)
    (collapsed, _), _ = jax.lax.scan(one_round, (starts.collapsed[first], losses[first]), length=rounds)
    return FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))


_EDITS_AT_ONCE, _DOUBLINGS = 32, 6


def _of_tokens(block_scores: Array, geometry: CutGeometry) -> Array:
    covered = jnp.repeat(block_scores, geometry.block_size)
    return jnp.zeros(geometry.window, jnp.float32).at[: covered.shape[0]].set(covered)
