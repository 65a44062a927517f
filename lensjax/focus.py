"""The allocator: from a policy's scores to legal edits of a working context, at a constant budget.

An edit acts on one node of the tree: *expanding* a gist replaces it by its K children (K - 1 entries more), while
*collapsing* a block replaces its K children by their gist (K - 1 fewer), at every level alike. One expansion paid for
by one collapse is a *swap*, and leaves the number of entries as it was, exactly.

A context is kept as one flag a node: is this block collapsed? Blocks are collapsed from below upwards, so the flags say
it all: a token's level of detail is the number of its ancestors that are collapsed. All nodes of the levels 1..L that
lie before the protected tail stand in one array, level 1 first, N in all; of equal scores the first one is taken.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax import context as contexts
from lensjax.config import FocusConfig
from lensjax.context import MISSING, WorkingContext
from lensjax.lengths import CutGeometry
from lensjax.rollouts import collapses_for_length, cut_from_priorities, level_counts

# Above any difference of scores, which lie in [-1, 1]: what cools is edited last where the budget demands an edit.
_COOLING_PENALTY = 4.0
# Multiples of it, modulo 1, are spread evenly however many are taken.
_GOLDEN = (5**0.5 - 1) / 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FocusState:
    """What is collapsed, and what was edited lately."""

    collapsed: Array
    """bool[N]: only blocks all of whose children are collapsed (or tokens) can be."""
    cooling: Array
    """int32[N]: refocus steps until a node may be edited again."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FocusInfo:
    """What the swaps of one refocus step did."""

    expanded: Array
    """bool[N]: nodes that were expanded."""
    collapsed: Array
    """bool[N]: nodes that were collapsed."""
    swaps: Array
    """int32[]: how many there were, one node of each kind in each."""


class Nodes(NamedTuple):
    """Where the N nodes are, as constants."""

    lod: np.ndarray
    """int32[N]."""
    start: np.ndarray
    """int32[N]: first token covered."""
    end: np.ndarray
    """int32[N]: the token after the last one covered."""
    parent: np.ndarray
    """int32[N]: index of the parent, N where that one may not be collapsed."""


@functools.cache
def nodes(geometry: CutGeometry) -> Nodes:
    """The nodes of a window that may be collapsed, level 1 first."""
    counts = [geometry.blocks(lod) for lod in range(1, geometry.max_lod + 1)]
    lod = np.repeat(np.arange(1, geometry.max_lod + 1), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    span = geometry.block_size**lod
    above = np.append(counts[1:], 0)[lod - 1]
    parent = np.cumsum(counts)[lod - 1] + index // geometry.block_size
    parent = np.where(index // geometry.block_size < above, parent, len(lod))
    return Nodes(*(a.astype(np.int32) for a in (lod, index * span, (index + 1) * span, parent)))


def from_cut(cut: ArrayLike, geometry: CutGeometry) -> FocusState:
    """The state that shows a cut int32[T] of the whole window; nothing cools."""
    table = nodes(geometry)
    collapsed = jnp.asarray(cut)[table.start] >= table.lod
    return FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))


def to_cut(state: FocusState, geometry: CutGeometry, *, tokens: ArrayLike | None = None) -> Array:
    """The level at which each token is shown.

    Args:
      state: what is collapsed.
      geometry: the window.
      tokens: int32[], tokens that the window holds so far; None for all of it.

    Returns:
      int32[T], `MISSING` for tokens that are not there yet.
    """
    cut = jnp.zeros(geometry.window, jnp.int32)
    for lod, flags in enumerate(_by_level(state.collapsed, geometry), start=1):
        covered = jnp.repeat(flags, geometry.block_size**lod).astype(jnp.int32)
        cut = cut.at[: covered.shape[0]].add(covered)
    if tokens is None:
        return cut
    return jnp.where(jnp.arange(geometry.window) < tokens, cut, MISSING)


def to_context(
    state: FocusState, geometry: CutGeometry, *, capacity: int, tokens: ArrayLike | None = None
) -> WorkingContext:
    """The working context of a state; `capacity` W is static and at least its length, `tokens` as in `to_cut`."""
    cut = to_cut(state, geometry, tokens=tokens)
    return contexts.from_cut(cut, block_size=geometry.block_size, capacity=capacity)


def uniform(length: ArrayLike, geometry: CutGeometry) -> FocusState:
    """The cold start: a context of one length that knows nothing, its detail spread evenly over the window.

    As few levels as the length allows: all is shown at two neighbouring levels where that works out.

    Args:
      length: int32[], entries wanted, rounded down to a reachable length; may be traced.
      geometry: the window.

    Returns:
      `FocusState`.
    """
    table = nodes(geometry)
    spread = (table.start // geometry.block_size**table.lod) * _GOLDEN % 1.0
    lowest = [jnp.zeros(geometry.blocks(lod), bool) for lod in range(2, geometry.max_lod + 1)]
    counts = level_counts(collapses_for_length(length, geometry), lowest, geometry)
    return from_cut(cut_from_priorities(counts, _by_level(jnp.asarray(spread), geometry), geometry), geometry)


def node_scores(scores: ArrayLike, context: WorkingContext, geometry: CutGeometry) -> Array:
    """A score for every node from those of a context's entries.

    A shown gist has its own; a block has the mean of its members, weighted by the tokens they cover; what is inside a
    shown gist has the gist's.

    Args:
      scores: float32[W], the policy's.
      context: W entries, from the window's first token on.
      geometry: the window.

    Returns:
      float32[N].
    """
    tokens = jnp.arange(geometry.window, dtype=jnp.int32)
    entry = jnp.searchsorted(context.start, tokens, side="right").astype(jnp.int32) - 1
    return pool_tokens(jnp.take(jnp.asarray(scores), entry, mode="clip"), geometry)


def pool_tokens(values: ArrayLike, geometry: CutGeometry) -> Array:
    """Mean over the tokens of each node: float32[T] to float32[N]."""
    level, means = jnp.asarray(values), []
    for lod in range(1, geometry.max_lod + 1):
        blocks = geometry.blocks(lod)
        members = level[: blocks * geometry.block_size].reshape(blocks, geometry.block_size)
        # As a difference from the first: rounding must not tell apart equal scores, or ties would be swapped.
        level = members[:, 0] + (members - members[:, :1]).mean(axis=1)
        means.append(level)
    return jnp.concatenate(means)


def fit(
    state: FocusState,
    scores: ArrayLike,
    length: ArrayLike,
    geometry: CutGeometry,
    *,
    cooldown: ArrayLike = 0,
    tokens: ArrayLike | None = None,
) -> FocusState:
    """Edits a context until it has one length: the lowest-scored blocks collapse, or the highest-scored nodes expand.

    The budget is not negotiable: thresholds play no part here, and what cools is edited only after all else.

    Args:
      state: what is collapsed.
      scores: float32[N] in [-1, 1], see `node_scores`.
      length: int32[], entries wanted, rounded down to a reachable length. Where all that may be collapsed is, the
        context stays longer: check static lengths with `CutGeometry.length`, which raises.
      geometry: the window.
      cooldown: int32[], steps for which edited nodes cool after the step that this begins.
      tokens: int32[], tokens that the window holds so far; None for all of it.

    Returns:
      `FocusState`.
    """
    scores = jnp.asarray(scores)
    eligible = _eligible(geometry, tokens)
    held = jnp.asarray(geometry.window if tokens is None else tokens, jnp.int32)
    step = geometry.block_size - 1
    target = jnp.clip(-((length - held) // step), 0, jnp.sum(eligible, dtype=jnp.int32))
    penalty = jnp.where(state.cooling > 0, _COOLING_PENALTY, 0.0)

    def is_off(collapsed: Array) -> Array:
        return jnp.sum(collapsed, dtype=jnp.int32) != target

    def edit(collapsed: Array) -> Array:
        least = _argmin(scores + penalty, _collapsible(collapsed, eligible, geometry))
        most = _argmax(scores - penalty, _shown(collapsed, geometry))
        is_long = jnp.sum(collapsed, dtype=jnp.int32) < target
        return collapsed.at[jnp.where(is_long, least, most)].set(is_long, mode="drop")

    collapsed = jax.lax.while_loop(is_off, edit, state.collapsed)
    # One step more than asked for: the swaps of the same step come after, and count it down.
    cooling = jnp.where(collapsed != state.collapsed, cooldown + 1, state.cooling)
    return FocusState(collapsed, cooling)


def swap(
    state: FocusState,
    scores: ArrayLike,
    geometry: CutGeometry,
    *,
    settings: FocusConfig,
    tokens: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[FocusState, FocusInfo]:
    """Up to `settings.max_edits` swaps: the gist that most deserves detail for the block that least does.

    A swap takes place where the gist's score is at least `expand_threshold`, the block's at most `collapse_threshold`,
    and the first above the second. What cools, what the step itself made (it has not been scored) and the protected
    tail are left alone.

    Args:
      state: what is collapsed.
      scores: float32[N], see `node_scores`.
      geometry: the window.
      settings: thresholds, edits a step, cool-down. With a `temperature` above 0, both sides are sampled without
        replacement, each from its `top_k` best candidates (all of them if 0), with probability proportional to
        exp(+-score / temperature): Gumbel noise on the scores does that. Thresholds and `top_k` go by the scores
        themselves, whether a swap takes place by the noisy ones.
      tokens: int32[], tokens that the window holds so far; None for all of it.
      key: PRNG key, consumed; needed where the temperature is above 0.

    Returns:
      The state after the swaps, its cool-down counted on by one step, and what was done.

    Raises:
      ValueError: there is a temperature and no key.

    References:
      Kool et al., Stochastic Beams and Where to Find Them, arXiv:1903.06059, section 2.3 (Gumbel top-k).
    """
    scores = jnp.asarray(scores)
    eligible, is_warm = _eligible(geometry, tokens), state.cooling == 0
    up = is_warm & _shown(state.collapsed, geometry) & (scores >= settings.expand_threshold)
    down = is_warm & _collapsible(state.collapsed, eligible, geometry) & (scores <= settings.collapse_threshold)
    order_up = order_down = scores
    if settings.temperature > 0:
        if key is None:
            raise ValueError(f"swaps at temperature {settings.temperature} are sampled: pass a key")
        noise = settings.temperature * jax.random.gumbel(key, (2, *scores.shape))
        up, down = _top(scores, up, settings.top_k), _top(-scores, down, settings.top_k)
        order_up, order_down = scores + noise[0], scores - noise[1]

    def one_swap(collapsed: Array, _: None) -> tuple[Array, Array]:
        node = _argmax(order_up, up & _shown(collapsed, geometry))
        after = collapsed.at[node].set(False, mode="drop")
        # Looked up after the expansion: the parent of what was just expanded can no longer be collapsed.
        block = _argmin(order_down, down & _collapsible(after, eligible, geometry))
        gain = order_up.at[node].get(mode="fill", fill_value=-jnp.inf)
        cost = order_down.at[block].get(mode="fill", fill_value=jnp.inf)
        return jnp.where(gain > cost, after.at[block].set(True, mode="drop"), collapsed), gain > cost

    collapsed, swapped = jax.lax.scan(one_swap, state.collapsed, length=min(settings.max_edits, scores.shape[0]))
    edited = collapsed != state.collapsed
    cooling = jnp.where(edited, settings.cooldown, jnp.maximum(state.cooling - 1, 0))
    info = FocusInfo(edited & ~collapsed, edited & collapsed, jnp.sum(swapped, dtype=jnp.int32))
    return FocusState(collapsed, cooling), info


def refocus(
    state: FocusState,
    scores: ArrayLike,
    context: WorkingContext,
    length: ArrayLike,
    geometry: CutGeometry,
    *,
    settings: FocusConfig,
    tokens: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[FocusState, FocusInfo]:
    """One step of focusing: the edits that the budget demands (`fit`), then those that the policy asks for (`swap`).

    Args:
      state: what is collapsed.
      scores: float32[W] in [-1, 1], the policy's for the entries of `context`.
      context: the working context of `state`.
      length: int32[], entries that the next context must have.
      geometry: the window.
      settings: see `swap`.
      tokens: int32[], tokens that the window holds so far; None for all of it.
      key: PRNG key, consumed; needed where `settings.temperature` is above 0.

    Returns:
      The next state, and what the swaps did.
    """
    pooled = node_scores(scores, context, geometry)
    state = fit(state, pooled, length, geometry, cooldown=settings.cooldown, tokens=tokens)
    return swap(state, pooled, geometry, settings=settings, tokens=tokens, key=key)


def iterate(
    state: FocusState,
    score: Callable[[WorkingContext], Array],
    length: ArrayLike,
    geometry: CutGeometry,
    *,
    steps: int,
    capacity: int,
    settings: FocusConfig,
    key: Array | None = None,
) -> tuple[FocusState, WorkingContext]:
    """Several steps of `refocus` on one window: look, edit, look again.

    Args:
      state: where to start, at any length.
      score: the policy: float32[W] in [-1, 1] for the W entries of a context.
      length: int32[], entries of every context but the first.
      geometry: the window.
      steps: static number of steps.
      capacity: static number of entries W.
      settings: see `swap`.
      key: PRNG key, consumed; needed where `settings.temperature` is above 0.

    Returns:
      The last state, and all contexts in order, the first one included: leading axis `steps` + 1.
    """
    first = to_context(state, geometry, capacity=capacity)

    def step(carry: tuple[FocusState, WorkingContext], index: Array) -> tuple[Any, WorkingContext]:
        state, context = carry
        step_key = None if key is None else jax.random.fold_in(key, index)
        state, _ = refocus(state, score(context), context, length, geometry, settings=settings, key=step_key)
        context = to_context(state, geometry, capacity=capacity)
        return (state, context), context

    (state, _), later = jax.lax.scan(step, (state, first), jnp.arange(steps))
    return state, jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, later)


def drop_oldest(state: FocusState, tokens: int, geometry: CutGeometry) -> FocusState:
    """The state of a window that has lost its first tokens, a multiple of K**L: all nodes move to the front."""

    def moved(values: Array) -> Array:
        levels = []
        for lod, level in enumerate(_by_level(values, geometry), start=1):
            gone = min(tokens // geometry.block_size**lod, level.shape[0])
            levels.append(jnp.concatenate([level[gone:], jnp.zeros_like(level[:gone])]))
        return jnp.concatenate(levels)

    return FocusState(moved(state.collapsed), moved(state.cooling))


def swap_rate(before: WorkingContext, after: WorkingContext, *, window: int) -> Array:
    """Share of a context's entries that the one before it did not hold, float32[]."""
    # Spans of one level start where no other span of that level does: start and level name an entry.
    was = jnp.take(contexts.to_cut(before, window=window), after.start, mode="clip")
    is_new = after.valid & (was != after.lod)
    return jnp.sum(is_new, dtype=jnp.float32) / jnp.maximum(after.length, 1).astype(jnp.float32)


def _by_level(values: Array, geometry: CutGeometry) -> list[Array]:
    """Splits [N] into one array for each level 1..L."""
    sizes = np.cumsum([geometry.blocks(lod) for lod in range(1, geometry.max_lod)])
    return jnp.split(values, sizes)


def _eligible(geometry: CutGeometry, tokens: ArrayLike | None) -> Array:
    """bool[N]: nodes wholly before the protected tail of the tokens held so far."""
    held = geometry.window if tokens is None else tokens
    return jnp.asarray(nodes(geometry).end) <= jnp.asarray(held) - geometry.recent_tokens


def _shown(collapsed: Array, geometry: CutGeometry) -> Array:
    """bool[N]: nodes that are entries of the context."""
    parent_is = collapsed.at[nodes(geometry).parent].get(mode="fill", fill_value=False)
    return collapsed & ~parent_is


def _collapsible(collapsed: Array, eligible: Array, geometry: CutGeometry) -> Array:
    """bool[N]: blocks that are not collapsed and whose K children are all entries of the context."""
    by_level = _by_level(collapsed, geometry)
    ready = [jnp.ones_like(by_level[0])]
    for lod in range(2, geometry.max_lod + 1):
        blocks = geometry.blocks(lod)
        children = by_level[lod - 2][: blocks * geometry.block_size]
        ready.append(jnp.all(children.reshape(blocks, geometry.block_size), axis=1))
    return jnp.concatenate(ready) & ~collapsed & eligible


def _argmax(values: Array, where: Array) -> Array:
    """Index of the largest value among some, the first of equals; N, which no node has, if there is none."""
    return jnp.where(jnp.any(where), jnp.argmax(jnp.where(where, values, -jnp.inf)), values.shape[0])


def _argmin(values: Array, where: Array) -> Array:
    return _argmax(-values, where)


def _top(values: Array, where: Array, count: int) -> Array:
    """The `count` largest among some, ties included; all of them if 0."""
    if count == 0:
        return where
    candidates = jnp.where(where, values, -jnp.inf)
    return where & (candidates >= jax.lax.top_k(candidates, min(count, values.shape[0]))[0][-1])
