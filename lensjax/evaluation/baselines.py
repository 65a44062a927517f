"""Who else could choose a context: the policies that LensNet is measured against, and the best that a search finds.

All make working contexts of one exact length over the same history, and see what LensNet may see: its tokens, the last
of which are the query. Given the horizon as the query, or its loss, they choose in hindsight: a bound, and no policy.
Scorers that rate tokens (`attention`, `bm25`, `lookup`) share one allocator, `by_scores`.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, nodes, rollouts
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from lensjax.models import AttentiveLanguageModel, Params
from lensjax.models.attention import attention_paid

NEXT = 4
"""Blocks after a good one that `and_next` takes for as good."""
BM25_K1 = 1.5
"""How fast a repeated term saturates."""


def by_scores(scores: ArrayLike, length: ArrayLike, geometry: Geometry) -> FocusState:
    """The cut of one length that collapses the lowest-scored blocks, and their parents, first.

    Args:
      scores: float32[T], worth of each token in full, of any size (see `allocator` on those that are not finite); a
        block has the mean of its tokens (`nodes.pool_tokens`), of equal blocks the oldest goes first.
      length: int32[], entries wanted, rounded down to a reachable length; may be traced.
      geometry: the history.

    Returns:
      `FocusState`.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> state = lx.baselines.by_scores(jnp.array([0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]), 6, geometry)
      >>> lx.allocator.to_cut(state, geometry).tolist()
      [1, 1, 0, 0, 1, 1, 0, 0]
    """
    in_full = allocator.from_cut(jnp.zeros(geometry.history, jnp.int32), geometry)
    return allocator.fit(in_full, nodes.pool_tokens(scores, geometry), length, geometry)


def recent_random(
    key: Array, length: int, high_lod_share: ArrayLike, *, draws: int, geometry: Geometry
) -> WorkingContext:
    """Half of the budget for the most recent tokens in full, a random cut of everything before them.

    Args:
      key: PRNG key, consumed.
      length: entries of each context.
      high_lod_share: float32[], see `rollouts.sample_cut`.
      draws: number of contexts.
      geometry: the history.

    Returns:
      `WorkingContext` with leading axis `draws`. Where half the budget leaves too little for the rest, the tail in full
      is the longest that does not.

    Example:
      >>> import functools, jax, lensjax as lx
      >>> geometry = lx.Geometry(history=16, block_size=2, max_lod=1, recent_tokens=2)
      >>> draw = functools.partial(lx.baselines.recent_random, draws=2, geometry=geometry)
      >>> contexts = jax.jit(draw, static_argnums=1)(jax.random.key(0), 12, 0.0)
      >>> contexts.length.tolist(), contexts.lod[:, -6:].tolist()
      ([12, 12], [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    """
    recent = max(length // 2, geometry.recent_tokens)
    while (longer := replace(geometry, recent_tokens=recent)).shortest > length and recent > geometry.recent_tokens:
        recent -= 1
    drawn, _ = rollouts.sample_rollouts(key, length, high_lod_share, rollouts=draws, geometry=longer, capacity=length)
    # Listed anew: with omission a context has as many rows as its own geometry has blocks.
    cuts = jax.vmap(lambda one: contexts.to_cut(one, longer))(drawn)
    return jax.vmap(lambda cut: contexts.from_cut(cut, geometry, capacity=length))(cuts)


def bm25(tokens: ArrayLike, query: ArrayLike, geometry: Geometry) -> Array:
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

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=7, block_size=2, max_lod=1, recent_tokens=1)
      >>> (lx.baselines.bm25([5, 1, 4, 4, 2, 3, 5], [5], geometry) > 0).tolist()  # the first block holds a 5
      [True, True, False, False, False, False, False]
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
    return nodes.of_blocks(scores, geometry)


def lookup(tokens: ArrayLike, geometry: Geometry) -> Array:
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

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=7, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.baselines.lookup([7, 8, 4, 8, 5, 7, 8], geometry).tolist()  # 4 came after 7 8, 5 after an 8 alone
      [0.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0]
    """
    tokens = jnp.asarray(tokens)
    count, running = jnp.zeros(tokens.shape, jnp.float32), jnp.ones(tokens.shape, bool)
    place = jnp.arange(tokens.shape[0])
    for back in range(1, geometry.recent_tokens + 1):
        running &= (place >= back) & (jnp.roll(tokens, back) == tokens[-back])
        count += running.astype(jnp.float32)
    return count


def and_sink(geometry: Geometry) -> Array:
    """The last tokens and the first block: models that others have trained attend to where every text began.

    Args:
      geometry: the history.

    Returns:
      float32[C], for `by_scores`.

    References:
      Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, section 3.2.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2, omit=True)
      >>> state = lx.baselines.by_scores(lx.baselines.and_sink(geometry), 4, geometry)
      >>> lx.allocator.to_cut(state, geometry).tolist()
      [0, 0, 1, 1, 1, 1, 0, 0]
    """
    place = jnp.arange(geometry.history, dtype=jnp.float32)
    return jnp.where(place < geometry.block_size, jnp.inf, place)


def and_next(scores: ArrayLike, length: int, geometry: Geometry) -> Array:
    """Half of the budget for the last tokens, the rest for blocks that score high and for the four that come after.

    What resembles the end of the history stands before what is needed: that is what comes after it.

    Args:
      scores: float32[C], at least 0, worth of each token in full.
      length: entries of the context.
      geometry: the history.

    Returns:
      float32[C], for `by_scores`: a block has the best score of itself and the `NEXT` blocks before it.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=16, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.baselines.and_next(jnp.zeros(16).at[2].set(1.0), 4, geometry).tolist()[:14:2]
      [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0]
    """
    of_blocks = nodes.by_level(nodes.pool_tokens(scores, geometry), geometry)[0]
    shifted = jnp.pad(of_blocks, (NEXT, 0))
    best = jnp.stack([shifted[NEXT - back : len(shifted) - back] for back in range(NEXT + 1)]).max(axis=0)
    is_recent = jnp.arange(geometry.history) >= geometry.history - length // 2
    return jnp.where(is_recent, jnp.inf, nodes.of_blocks(best, geometry))


def attention(
    base: AttentiveLanguageModel, params: Params, tokens: ArrayLike, query: slice, geometry: Geometry
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

    Example:
      >>> import jax, lensjax as lx
      >>> base = lx.BaseConfig(dim=16, heads=2, layers=1)
      >>> models = lx.build_models(base, lx.GistConfig(), lx.LensConfig(), block_size=2, max_lod=1)
      >>> params, geometry = models.base.init(jax.random.key(0)), lx.Geometry(8, 2, 1, recent_tokens=2)
      >>> query, tokens = slice(-2, None), jax.numpy.arange(8)
      >>> look = jax.jit(lambda params: lx.baselines.attention(models.base, params, tokens, query, geometry)[0])
      >>> print(f"{look(params).sum():.3f}")
      1.000
    """
    tokens = jnp.asarray(tokens)
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    paid, norms = attention_paid(base, params, contexts.in_full(base.embed(params, tokens), places), places[query])
    return paid.mean(axis=0)[: geometry.history], -norms[: geometry.history]


def greedy_oracle(
    loss_fn: Callable[[WorkingContext], Array],
    starts: FocusState,
    losses: ArrayLike,
    geometry: Geometry,
    *,
    length: int,
    rounds: int,
) -> tuple[FocusState, Array]:
    """The best context that a greedy search on a loss finds; on the horizon's own loss a bound, not a policy.

    It starts from the best of the contexts given. A round measures every single edit of the context alone, ranks
    expansions by what they gain and collapses by what they cost, applies the first 1, 2, 4, ... swaps of that ranking,
    and keeps the best of these contexts if it is better.

    Args:
      loss_fn: float32[] of a working context.
      starts: states of exactly `length` entries, leading axis.
      losses: float32[starts], what they lose.
      geometry: the history.
      length: entries of the context.
      rounds: static number of rounds; 0 takes the best of the starts.

    Returns:
      `FocusState`, and its loss float32[].

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> starts = jax.tree.map(lambda leaf: leaf[None], lx.allocator.from_cut([0, 0, 1, 1, 0, 0, 0, 0], geometry))
      >>> loss = lambda context: jnp.sum(jnp.where(context.lod == 1, context.start == 2, False), dtype=jnp.float32)
      >>> search = lx.baselines.greedy_oracle
      >>> _, least = search(loss, starts, jax.numpy.ones(1), geometry, length=7, rounds=1)  # a gist at token 2 costs 1
      >>> float(least)
      0.0
    """
    step = geometry.saving

    def loss(collapsed: Array, capacity: int) -> Array:
        state = FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))
        return loss_fn(allocator.to_context(state, geometry, capacity=capacity))

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

    losses = jnp.asarray(losses)
    first = jnp.argmin(losses)
    (collapsed, best), _ = jax.lax.scan(one_round, (starts.collapsed[first], losses[first]), length=rounds)
    return FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32)), best


_EDITS_AT_ONCE, _DOUBLINGS = 32, 6
