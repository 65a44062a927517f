"""The allocator on the rows of a context alone: as `allocator`, for a history of any length.

A context of R rows has at most R places to edit: a gist that is shown can be expanded, and K neighbouring siblings can
be collapsed, at the first of them. Nothing here is as long as the history, so that a refocus step over ten million
tokens takes as long as one over a thousand. What `allocator` does on one flag a node, `edit` does on the rows, with the
same order among equal scores, and gives the same contexts to the bit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import HIGHEST_LOD, Geometry
from lensjax.context.working import WorkingContext


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cooling:
    """The nodes that were edited lately, and are left alone: those of each of the last A refocus steps, newest first.

    A is `settings.cooldown`, E the most edits that one step can make.
    """

    start: Array
    """int32[A, E]: first token of each."""
    lod: Array
    """int32[A, E]: level of each; 0, which no node that is edited has, where there is none."""


class _Edits(NamedTuple):
    """Nodes, int32[E] each, as in `Cooling`."""

    start: Array
    lod: Array


class _Rows(NamedTuple):
    """A context with the scores of its rows, [R] each."""

    start: Array
    lod: Array
    valid: Array
    scores: Array


def nothing_cools(rows: int, geometry: Geometry, *, settings: FocusConfig) -> Cooling:
    """The state before the first refocus step of contexts of a static number of rows R.

    Example:
      >>> import lensjax as lx
      >>> from lensjax.context import places
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> places.nothing_cools(8, geometry, settings=lx.FocusConfig(cooldown=3)).lod.shape
      (3, 15)
    """
    demanded, swaps = _most_edits(rows, geometry, settings)
    none = jnp.zeros((settings.cooldown, demanded + 2 * swaps), jnp.int32)
    return Cooling(none, none)


def _most_edits(rows: int, geometry: Geometry, settings: FocusConfig) -> tuple[int, int]:
    """Edits that a budget can demand of so many rows, K - 1 of which come or go with each; swaps, each of K rows."""
    return (rows - 1) // (geometry.block_size - 1), min(settings.max_edits, rows // geometry.block_size)


def edit(
    context: WorkingContext,
    cooling: Cooling,
    scores: ArrayLike,
    length: ArrayLike,
    geometry: Geometry,
    *,
    settings: FocusConfig,
    tokens: ArrayLike,
    key: Array | None = None,
) -> tuple[WorkingContext, Cooling, Array]:
    """One step of focusing: the edits that the budget demands, then those that the policy asks for (`allocator.edit`).

    Args:
      context: R rows that cover the tokens held, all of them.
      cooling: what was edited lately.
      scores: float32[R], the policy's for the rows; those of padding are ignored.
      length: int32[], entries that the next context must have, rounded down to a reachable length.
      geometry: levels, blocks and tail. Its `history` is where padding starts: every token held stands before it.
      settings: thresholds, edits a step, cool-down, temperature.
      tokens: int32[], tokens held.
      key: PRNG key, consumed; needed where the temperature is above 0. The noise is drawn for rows and not for all
        nodes: its law is that of `allocator`, its numbers are others.

    Returns:
      The next context, of R rows; what cools now; and int32[], the swaps that the policy asked for.

    Raises:
      ValueError: there is a temperature and no key.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> from lensjax.context import places
      >>> geometry, settings = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2), lx.FocusConfig()
      >>> context = lx.from_cut([0, 0, 1, 1, 0, 0, 0, 0], geometry, capacity=8)
      >>> cooling = places.nothing_cools(8, geometry, settings=settings)
      >>> scores = jnp.linspace(-1, 1, 8)
      >>> after, _, swaps = places.edit(context, cooling, scores, 6, geometry, settings=settings, tokens=8)
      >>> after.start.tolist(), after.lod.tolist(), int(swaps)
      ([0, 2, 4, 5, 6, 7, 8, 8], [1, 1, 0, 0, 0, 0, 0, 0], 0)
    """
    rows = _Rows(context.start, context.lod, context.valid, jnp.asarray(scores))
    held = jnp.asarray(tokens, jnp.int32)
    demanded, swaps = _most_edits(rows.start.shape[0], geometry, settings)
    earlier = _Edits(cooling.start.ravel(), cooling.lod.ravel())
    rows, fitted = _fit(rows, earlier, length, held, geometry, most=demanded)
    earlier = _Edits(*(jnp.concatenate(both) for both in zip(earlier, fitted, strict=True)))
    rows, swapped, count = _swap(rows, earlier, held, geometry, settings=settings, most=swaps, key=key)
    now = _Edits(*(jnp.concatenate(both)[None] for both in zip(fitted, swapped, strict=True)))
    start, lod = (
        jnp.concatenate(both)[: settings.cooldown] for both in zip(now, (cooling.start, cooling.lod), strict=True)
    )
    return WorkingContext(rows.start, rows.lod, rows.valid), Cooling(start, lod), count


def _fit(
    rows: _Rows, cooling: _Edits, length: ArrayLike, held: Array, geometry: Geometry, *, most: int
) -> tuple[_Rows, _Edits]:
    """As `allocator.fit`: edits until the context has its length; what they were."""
    blocks = [jnp.maximum(held - geometry.recent_tokens, 0) // span for span in _spans(geometry)[1:]]
    most_target = jnp.maximum(sum(blocks) - geometry.sink_blocks, 0)
    target = jnp.clip(-((jnp.asarray(length, jnp.int32) - held) // geometry.saving), 0, most_target)
    rows = _with_sinks(rows, geometry)
    shown = contexts.entry_count(WorkingContext(rows.start, rows.lod, rows.valid), geometry)
    missing = target - (held - shown) // geometry.saving
    is_long = missing > 0

    Carry = tuple[_Rows, _Edits, Array]

    def is_off(carry: Carry) -> Array:
        return carry[2] < jnp.abs(missing)

    def edit(carry: Carry) -> Carry:
        rows, edits, count = carry
        block_scores = _block_scores(rows, geometry)
        lod = jnp.where(is_long, rows.lod + 1, rows.lod)
        where = jnp.where(is_long, _blocks(rows, held, geometry), rows.valid & (rows.lod > 0))
        is_warm = where & ~_cools(rows.start, lod, cooling)
        where = jnp.where(jnp.any(is_warm), is_warm, where)
        values = jnp.where(is_long, -nodes.ordered(block_scores), nodes.ordered(rows.scores))
        place = _argmax(values, where, rows.lod)
        new = (jnp.take(rows.start, place, mode="clip"), jnp.take(lod, place, mode="clip"))
        edits = _Edits(*(all_.at[count].set(one, mode="drop") for all_, one in zip(edits, new, strict=True)))
        score = jnp.where(is_long, block_scores, rows.scores).at[place].get(mode="clip")
        return _replace(rows, place, is_long, score, geometry), edits, count + 1

    none = jnp.zeros(most, jnp.int32)
    rows, edits, _ = jax.lax.while_loop(is_off, edit, (rows, _Edits(none, none), jnp.zeros((), jnp.int32)))
    return rows, edits


def _with_sinks(rows: _Rows, geometry: Geometry) -> _Rows:
    """The rows with all sinks in full: where the oldest tokens were forgotten, one may still be a gist."""
    for first in range(0, geometry.head, geometry.block_size):
        where = rows.valid & (rows.start == first) & (rows.lod > 0)
        place = _argmax(rows.scores, where, rows.lod)
        rows = _replace(rows, place, jnp.zeros((), bool), rows.scores.at[place].get(mode="clip"), geometry)
    return rows


def _replace(rows: _Rows, place: Array, is_collapse: Array, score: Array, geometry: Geometry) -> _Rows:
    """The rows with the K from `place` on as their parent, or with the gist there as its K children, of one score."""
    size, index = geometry.block_size, jnp.arange(rows.start.shape[0], dtype=jnp.int32)
    moved = jnp.where(is_collapse, index + size - 1, jnp.maximum(index - (size - 1), place))
    source = jnp.where(index <= place, index, moved)
    start = jnp.take(rows.start, source, mode="fill", fill_value=geometry.history)
    lod = jnp.take(rows.lod, source, mode="fill", fill_value=0)
    valid = jnp.take(rows.valid, source, mode="fill", fill_value=False)
    scores = jnp.take(rows.scores, source, mode="clip")
    is_new = (index >= place) & (index < place + jnp.where(is_collapse, 1, size))
    lod = jnp.where(is_new, lod + jnp.where(is_collapse, 1, -1), lod)
    start = jnp.where(is_new, start + (index - place) * _span(lod, geometry), start)
    return _Rows(start, lod, valid, jnp.where(is_new, score, scores))


def _swap(
    rows: _Rows,
    cooling: _Edits,
    held: Array,
    geometry: Geometry,
    *,
    settings: FocusConfig,
    most: int,
    key: Array | None,
) -> tuple[_Rows, _Edits, Array]:
    """As `allocator.swap`: the rows after the swaps, what was edited, and how many swaps there were.

    Only what stands there at first may be edited, so the rows keep their places until all swaps are known.
    """
    none, index = rows.start.shape[0], jnp.arange(rows.start.shape[0], dtype=jnp.int32)
    up_scores, down_scores = nodes.ordered(rows.scores), nodes.ordered(_block_scores(rows, geometry))
    up = rows.valid & (rows.lod > 0) & ~_cools(rows.start, rows.lod, cooling)
    up = up & (up_scores >= settings.expand_threshold)
    down = _blocks(rows, held, geometry) & ~_cools(rows.start, rows.lod + 1, cooling)
    down = down & (down_scores <= settings.collapse_threshold)
    block = _block_of(down, geometry)
    if settings.temperature > 0:
        if key is None:
            raise ValueError(f"swaps at temperature {settings.temperature} are sampled: pass a key")
        noise = settings.temperature * jax.random.gumbel(key, (2, none))
        up_scores, down_scores = up_scores + noise[0], down_scores - noise[1]

    Carry = tuple[Array, Array, Array, Array, Array, Array]

    def is_on(carry: Carry) -> Array:
        *_, count, was_worth = carry
        return was_worth & (count < most)

    def one_swap(carry: Carry) -> Carry:
        up, down, expanded, collapsed, count, _ = carry
        gist = _argmax(up_scores, up, rows.lod)
        # Once the gist is expanded, its own siblings can no longer be collapsed.
        own = block.at[gist].get(mode="fill", fill_value=none)
        down_without = down & (index != own)
        first = _argmax(-down_scores, down_without, rows.lod)
        gain = up_scores.at[gist].get(mode="fill", fill_value=-jnp.inf)
        cost = down_scores.at[first].get(mode="fill", fill_value=jnp.inf)
        is_worth = gain > cost + settings.margin
        return (
            up & (index != gist) & (block != first),
            down_without & (index != first),
            expanded.at[count].set(jnp.where(is_worth, gist, none)),
            collapsed.at[count].set(jnp.where(is_worth, first, none)),
            count + jnp.where(is_worth, 1, 0),
            is_worth,
        )

    nothing = jnp.full(most, none, jnp.int32)
    first_carry = (up, down, nothing, nothing, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    _, _, expanded, collapsed, count, _ = jax.lax.while_loop(is_on, one_swap, first_carry)
    ups = [values.at[expanded].get(mode="fill", fill_value=0) for values in (rows.start, rows.lod)]
    downs = [values.at[collapsed].get(mode="fill", fill_value=0) for values in (rows.start, rows.lod + 1)]
    edits = _Edits(*(jnp.concatenate(both) for both in zip(ups, downs, strict=True)))
    return _rebuilt(rows, expanded, collapsed, block, geometry), edits, count


def _rebuilt(rows: _Rows, expanded: Array, collapsed: Array, block: Array, geometry: Geometry) -> _Rows:
    """The rows after swaps: gists at `expanded` int32[M] as their children, blocks at `collapsed` as their parents."""
    index = jnp.arange(rows.start.shape[0], dtype=jnp.int32)
    nothing = jnp.zeros(index.shape, bool)
    is_up, is_first = (nothing.at[places].set(True, mode="drop") for places in (expanded, collapsed))
    is_inside = is_first.at[block].get(mode="fill", fill_value=False) & ~is_first
    width = jnp.where(is_up, geometry.block_size, jnp.where(rows.valid & ~is_inside, 1, 0))
    end = jnp.cumsum(width)
    source = jnp.searchsorted(end, index, side="right")
    valid = index < end[-1]

    def moved(values: Array, padding: int) -> Array:
        return jnp.where(valid, jnp.take(values, source, mode="clip"), padding)

    lod = moved(jnp.where(is_up, rows.lod - 1, jnp.where(is_first, rows.lod + 1, rows.lod)), 0)
    start = moved(rows.start, geometry.history)
    start = jnp.where(valid, start + (index - moved(end - width, 0)) * _span(lod, geometry), start)
    return _Rows(start, lod, valid, moved(rows.scores, 0))


def drop_oldest(
    context: WorkingContext, cooling: Cooling, tokens: int, geometry: Geometry
) -> tuple[WorkingContext, Cooling]:
    """Both, of a history that has lost its first tokens, a multiple of K**L: all that is left moves to the front.

    Example:
      >>> import lensjax as lx
      >>> from lensjax.context import places
      >>> geometry = lx.Geometry(history=8, block_size=2, max_lod=1, recent_tokens=2)
      >>> context = lx.from_cut([0, 0, 1, 1, 0, 0, 0, 0], geometry, capacity=8)
      >>> cooling = places.nothing_cools(8, geometry, settings=lx.FocusConfig())
      >>> context, _ = places.drop_oldest(context, cooling, 2, geometry)
      >>> context.start.tolist(), context.lod.tolist()
      ([0, 2, 3, 4, 5, 8, 8, 8], [1, 0, 0, 0, 0, 0, 0, 0])
    """
    gone = jnp.sum(context.valid & (context.start < tokens), dtype=jnp.int32)
    index = gone + jnp.arange(context.start.shape[0], dtype=jnp.int32)
    valid = jnp.take(context.valid, index, mode="fill", fill_value=False)
    start = jnp.where(valid, jnp.take(context.start, index, mode="clip") - tokens, geometry.history)
    lod = jnp.where(valid, jnp.take(context.lod, index, mode="clip"), 0)
    is_left = cooling.start >= tokens
    cooling = Cooling(jnp.where(is_left, cooling.start - tokens, 0), jnp.where(is_left, cooling.lod, 0))
    return WorkingContext(start, lod, valid), cooling


def _spans(geometry: Geometry) -> list[int]:
    """Tokens that a node of each level 0..L covers, no more than can be counted."""
    return [min(geometry.block_size**lod, jnp.iinfo(jnp.int32).max) for lod in range(geometry.max_lod + 1)]


def _span(lod: Array, geometry: Geometry) -> Array:
    return jnp.take(jnp.asarray(_spans(geometry), jnp.int32), lod, mode="clip")


def _behind(values: Array, rows: int, padding: int) -> Array:
    """What stands so many rows further on."""
    return jnp.concatenate([values[rows:], jnp.full(min(rows, values.shape[0]), padding, values.dtype)])


def _blocks(rows: _Rows, held: Array, geometry: Geometry) -> Array:
    """bool[R]: rows that are the first of K siblings which may be collapsed into their parent."""
    span, above = _span(rows.lod, geometry), _span(rows.lod + 1, geometry)
    further = geometry.block_size - 1
    # Where a block is not collapsed, no row inside of it is above its children: K - 1 rows on stands the last child,
    # or there is a finer row in between.
    is_whole = (_behind(rows.start, further, -1) == rows.start + further * span) & (
        _behind(rows.lod, further, -1) == rows.lod
    )
    is_first = rows.valid & (rows.lod < geometry.max_lod) & (rows.start % above == 0)
    is_before_tail = above <= held - geometry.recent_tokens - rows.start
    return is_first & is_whole & is_before_tail & (rows.start >= geometry.head)


def _block_scores(rows: _Rows, geometry: Geometry) -> Array:
    """float32[R]: the score of the parent, where a row is the first of K siblings."""
    members = [_behind(rows.scores, offset, 0) for offset in range(geometry.block_size)]
    return nodes.mean_of(jnp.stack(members, axis=1))


def _block_of(first: Array, geometry: Geometry) -> Array:
    """int32[R]: the first row of the block that a row belongs to, among some blocks; R where to none."""
    index = jnp.arange(first.shape[0], dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(first, index, -geometry.block_size))
    return jnp.where(index < before + geometry.block_size, before, first.shape[0])


def _cools(start: Array, lod: Array, cooling: _Edits) -> Array:
    """bool[R]: nodes that are left alone."""
    return jnp.any((start[:, None] == cooling.start[None]) & (lod[:, None] == cooling.lod[None]), axis=1)


def _argmax(values: Array, where: Array, lod: Array) -> Array:
    """Row of the largest value among some, the first of the finest of equals; R if there is none."""
    largest = jnp.max(jnp.where(where, values, -jnp.inf))
    is_best = where & (values == largest)
    return jnp.where(jnp.any(where), jnp.argmin(jnp.where(is_best, lod, HIGHEST_LOD + 1)), values.shape[0])
