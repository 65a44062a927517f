"""The allocator: from a policy's scores to legal edits of a working context, at a constant budget.

An edit acts on one node of the tree: *expanding* a gist replaces it by its K children (K - 1 entries more), while
*collapsing* a block replaces its K children by their gist (K - 1 fewer), at every level alike. One expansion paid for
by one collapse is a *swap*, and leaves the number of entries as it was, exactly.
A context is kept as one flag a node (see `lensjax.context.nodes`); of equal scores the first one is taken.

Only the order of the scores counts, infinities included. A NaN is as -inf: what nothing is known of is worth no detail.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Bound, Count, NonNegative, PositiveInt, Repeats, settings
from lensjax.context import nodes
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.rollouts import collapses_for_length, cut_from_priorities, length_for_collapses, level_counts
from lensjax.context.working import MISSING, WorkingContext


@settings("focus")
class FocusConfig:
    """How the allocator turns scores into edits; no part of training.

    Example:
      >>> import lensjax as lx
      >>> lx.FocusConfig(max_edits=0)
      Traceback (most recent call last):
      ValueError: focus.max_edits must be at least 1, got 0
    """

    start: Literal["uniform", "recency"] = "uniform"
    """The cold start: detail spread evenly over the history, or, with omission, its last tokens."""
    steps: Repeats = 4
    """Refocus steps from a cold start."""
    max_edits: PositiveInt = 64
    """Swaps in one refocus step, at most."""
    expand_threshold: Annotated[float, Bound()] = -1.0
    """Scores below it are not expanded; scores lie in [-1, 1]."""
    collapse_threshold: Annotated[float, Bound()] = 1.0
    """Scores above it are not collapsed."""
    margin: NonNegative = 0.0
    """By how much a swap must promise more than it costs, in units of scores."""
    cooldown: Count = 1
    """Refocus steps for which an edited node is left alone; 0 for none."""
    temperature: NonNegative = 0.0
    """0 takes the best edits; above it they are sampled."""


# Multiples of it, modulo 1, are spread evenly however many are taken.
_GOLDEN = (5**0.5 - 1) / 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FocusState:
    """What is collapsed, and what was edited lately.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.allocator.uniform(6, geometry).collapsed.tolist()  # of the three blocks before the tail
      [False, True, True]
    """

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


def from_cut(cut: ArrayLike, geometry: Geometry) -> FocusState:
    """The state that shows a cut int32[C] of the whole history; nothing cools.

    Example:
      >>> import lensjax as lx
      >>> lx.allocator.from_cut([0, 0, 1, 1, 0, 0, 0, 0], lx.Geometry(8, 2, 1, recent_tokens=2)).collapsed.tolist()
      [False, True, False]
    """
    table = nodes.table(geometry)
    collapsed = jnp.asarray(cut)[table.start] >= table.lod
    return FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))


def to_cut(state: FocusState, geometry: Geometry, *, tokens: ArrayLike | None = None) -> Array:
    """The level at which each token is shown, int32[C]; `MISSING` beyond the `tokens` int32[] held, None for all.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.allocator.to_cut(lx.allocator.uniform(6, geometry), geometry).tolist()
      [0, 0, 1, 1, 1, 1, 0, 0]
    """
    cut = jnp.zeros(geometry.history, jnp.int32)
    for lod, flags in enumerate(nodes.by_level(state.collapsed, geometry), start=1):
        covered = jnp.repeat(flags, geometry.block_size**lod).astype(jnp.int32)
        cut = cut.at[: covered.shape[0]].add(covered)
    if tokens is None:
        return cut
    return jnp.where(jnp.arange(geometry.history) < tokens, cut, MISSING)


def to_context(
    state: FocusState, geometry: Geometry, *, capacity: int, tokens: ArrayLike | None = None
) -> WorkingContext:
    """The working context of a state; `capacity` W is static and at least its length, `tokens` as in `to_cut`.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.allocator.to_context(lx.allocator.uniform(6, geometry), geometry, capacity=6).start.tolist()
      [0, 1, 2, 4, 6, 7]
    """
    cut = to_cut(state, geometry, tokens=tokens)
    return contexts.from_cut(cut, geometry, capacity=capacity)


def uniform(length: ArrayLike, geometry: Geometry) -> FocusState:
    """The cold start: a context of one length that knows nothing, its detail spread evenly over the history.

    As few levels as the length allows: all is shown at two neighbouring levels where that works out. `length` int32[]
    is the entries wanted, rounded down to a reachable length; it may be traced.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> lx.allocator.to_cut(lx.allocator.uniform(7, geometry), geometry).tolist()
      [0, 0, 1, 1, 0, 0, 0, 0]
    """
    table = nodes.table(geometry)
    spread = (table.start // geometry.block_size**table.lod) * _GOLDEN % 1.0
    lowest = [jnp.zeros(geometry.blocks(lod), bool) for lod in range(2, geometry.max_lod + 1)]
    counts = level_counts(collapses_for_length(length, geometry), lowest, geometry)
    return from_cut(cut_from_priorities(counts, nodes.by_level(jnp.asarray(spread), geometry), geometry), geometry)


def start(length: ArrayLike, geometry: Geometry, *, settings: FocusConfig) -> FocusState:
    """The cold start that `settings.start` names, as `uniform`; ValueError where recency is no cut (no omission).

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2, omit=True)
      >>> lx.allocator.start(4, geometry, settings=lx.FocusConfig(start="recency")).collapsed.tolist()
      [True, True, False]
    """
    if settings.start == "uniform":
        return uniform(length, geometry)
    if not geometry.omit:
        raise ValueError("focus.start recency needs context.omit: without it every context covers the whole history")
    shown = length_for_collapses(collapses_for_length(length, geometry), geometry)
    tokens = jnp.arange(geometry.history) - geometry.head
    return from_cut(jnp.where((tokens >= 0) & (tokens < geometry.history - shown), 1, 0), geometry)


def fit(
    state: FocusState,
    scores: ArrayLike,
    length: ArrayLike,
    geometry: Geometry,
    *,
    cooldown: ArrayLike = 0,
    tokens: ArrayLike | None = None,
) -> FocusState:
    """Edits a context until it has one length: the lowest-scored blocks collapse, or the highest-scored nodes expand.

    The budget is not negotiable: thresholds play no part here, and what cools is edited only after all else.

    Args:
      state: what is collapsed.
      scores: float32[N], see `nodes.pool_scores`.
      length: int32[], entries wanted, rounded down to a reachable length. Where all that may be collapsed is, the
        context stays longer: check static lengths with `Geometry.length`, which raises.
      geometry: the history.
      cooldown: int32[], steps for which edited nodes cool after the step that this begins.
      tokens: int32[], tokens that the history holds so far; None for all of it.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> state = lx.allocator.uniform(8, geometry)
      >>> lx.allocator.fit(state, jnp.array([0.5, -0.5, 0.0]), 7, geometry).collapsed.tolist()
      [False, True, False]
    """
    scores = nodes.ordered(scores)
    eligible = nodes.eligible(geometry, tokens)
    held = jnp.asarray(geometry.history if tokens is None else tokens, jnp.int32)
    step = geometry.saving
    target = jnp.clip(-((length - held) // step), 0, jnp.sum(eligible, dtype=jnp.int32))
    is_warm = state.cooling == 0

    def warm_first(where: Array) -> Array:
        return jnp.where(jnp.any(where & is_warm), where & is_warm, where)

    def is_off(collapsed: Array) -> Array:
        return jnp.sum(collapsed, dtype=jnp.int32) != target

    def edit(collapsed: Array) -> Array:
        least = nodes.argmin(scores, warm_first(nodes.collapsible(collapsed, eligible, geometry)))
        most = nodes.argmax(scores, warm_first(nodes.shown(collapsed, geometry)))
        is_long = jnp.sum(collapsed, dtype=jnp.int32) < target
        return collapsed.at[jnp.where(is_long, least, most)].set(is_long, mode="drop")

    # Where the oldest tokens were forgotten, what stands first now is a sink, collapsed or not.
    opened = state.collapsed & (nodes.table(geometry).start >= geometry.head)
    collapsed = jax.lax.while_loop(is_off, edit, opened)
    # One step more than asked for: the swaps of the same step come after, and count it down.
    cooling = jnp.where(collapsed != opened, cooldown + 1, state.cooling)
    return FocusState(collapsed, cooling)


def swap(
    state: FocusState,
    scores: ArrayLike,
    geometry: Geometry,
    *,
    settings: FocusConfig,
    tokens: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[FocusState, FocusInfo]:
    """Up to `settings.max_edits` swaps: the gist that most deserves detail for the block that least does.

    A swap takes place where the gist's score is at least `expand_threshold`, the block's at most `collapse_threshold`,
    and the first above the second by more than `margin`. What cools, what the step itself made (it has not been scored)
    and the protected tail are left alone.

    Args:
      state: what is collapsed.
      scores: float32[N], see `nodes.pool_scores`.
      geometry: the history.
      settings: thresholds, edits a step, cool-down. With a `temperature` above 0, both sides are sampled without
        replacement with probability proportional to exp(+-score / temperature): Gumbel noise on the scores does that.
        Thresholds go by the scores themselves, whether a swap takes place by the noisy ones.
      tokens: int32[], tokens that the history holds so far; None for all of it.
      key: PRNG key, consumed; needed where the temperature is above 0.

    Returns:
      The state after the swaps, its cool-down counted on by one step, and what was done.

    Raises:
      ValueError: there is a temperature and no key.

    References:
      Kool et al., Stochastic Beams and Where to Find Them, arXiv:1903.06059, section 2.3 (Gumbel top-k).

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> state = lx.allocator.from_cut([1, 1, 0, 0, 0, 0, 0, 0], geometry)
      >>> after, info = lx.allocator.swap(state, jnp.array([0.5, -0.5, 0.0]), geometry, settings=lx.FocusConfig())
      >>> after.collapsed.tolist(), int(info.swaps)
      ([False, True, False], 1)
    """
    scores = nodes.ordered(scores)
    eligible, is_warm = nodes.eligible(geometry, tokens), state.cooling == 0
    up = is_warm & nodes.shown(state.collapsed, geometry) & (scores >= settings.expand_threshold)
    down = is_warm & nodes.collapsible(state.collapsed, eligible, geometry) & (scores <= settings.collapse_threshold)
    order_up = order_down = scores
    if settings.temperature > 0:
        if key is None:
            raise ValueError(f"swaps at temperature {settings.temperature} are sampled: pass a key")
        noise = settings.temperature * jax.random.gumbel(key, (2, *scores.shape))
        order_up, order_down = scores + noise[0], scores - noise[1]

    def one_swap(collapsed: Array, _: None) -> tuple[Array, Array]:
        node = nodes.argmax(order_up, up & nodes.shown(collapsed, geometry))
        after = collapsed.at[node].set(False, mode="drop")
        # Looked up after the expansion: the parent of what was just expanded can no longer be collapsed.
        block = nodes.argmin(order_down, down & nodes.collapsible(after, eligible, geometry))
        gain = order_up.at[node].get(mode="fill", fill_value=-jnp.inf)
        cost = order_down.at[block].get(mode="fill", fill_value=jnp.inf)
        is_worth = gain > cost + settings.margin
        return jnp.where(is_worth, after.at[block].set(True, mode="drop"), collapsed), is_worth

    collapsed, swapped = jax.lax.scan(one_swap, state.collapsed, length=min(settings.max_edits, scores.shape[0]))
    edited = collapsed != state.collapsed
    cooling = jnp.where(edited, settings.cooldown, jnp.maximum(state.cooling - 1, 0))
    info = FocusInfo(edited & ~collapsed, edited & collapsed, jnp.sum(swapped, dtype=jnp.int32))
    return FocusState(collapsed, cooling), info


def edit(
    state: FocusState,
    scores: ArrayLike,
    context: WorkingContext,
    length: ArrayLike,
    geometry: Geometry,
    *,
    settings: FocusConfig,
    tokens: ArrayLike | None = None,
    key: Array | None = None,
) -> tuple[FocusState, FocusInfo]:
    """One step of focusing: the edits that the budget demands (`fit`), then those that the policy asks for (`swap`).

    Args:
      scores: float32[W], the policy's for the rows of `context`.
      context: the working context of `state`.
      length: int32[], entries that the next context must have.
      state: this, and the arguments below, as for `swap`.
      geometry: the history.
      settings: thresholds, edits a step, cool-down.
      tokens: int32[], tokens held so far.
      key: PRNG key, consumed.

    Returns:
      The next state, and what the swaps did.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> state = lx.allocator.uniform(7, geometry)
      >>> context, scores = lx.allocator.to_context(state, geometry, capacity=8), jnp.linspace(-1, 1, 8)
      >>> after, _ = lx.allocator.edit(state, scores, context, 6, geometry, settings=lx.FocusConfig())
      >>> lx.allocator.to_cut(after, geometry).tolist()
      [1, 1, 1, 1, 0, 0, 0, 0]
    """
    pooled = nodes.pool_scores(scores, context, geometry)
    state = fit(state, pooled, length, geometry, cooldown=settings.cooldown, tokens=tokens)
    return swap(state, pooled, geometry, settings=settings, tokens=tokens, key=key)


def drop_oldest(state: FocusState, tokens: int, geometry: Geometry) -> FocusState:
    """The state of a history that has lost its first tokens, a multiple of K**L: all nodes move to the front.

    Example:
      >>> import lensjax as lx
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> state = lx.allocator.from_cut([0, 0, 1, 1, 0, 0, 0, 0], geometry)
      >>> lx.allocator.drop_oldest(state, 2, geometry).collapsed.tolist()
      [True, False, False]
    """
    return jax.tree.map(lambda values: nodes.drop_oldest(values, tokens, geometry), state)
