"""Trajectories through a stream that is longer than the context: read, forget, read on, and be asked at the end.

A context holds R blocks. It begins with the first R of the stream; in each of S refocus steps the policy drops some
(`context.forgetting`), for good, and as many are read in their place. What is asked stands at the stream's end, so that
only there it shows what should have been kept. A trajectory that has not read all of the stream in S steps is overlong:
it is not asked.

The policy sees the blocks held, each token with its block's gist and its age, and neither what was dropped nor what was
not read yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from lensjax._settings import require
from lensjax.context import forgetting, nodes
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState
from lensjax.context.working import MISSING, Entries, WorkingContext
from lensjax.models import LensPolicy, Models, Params, decision
from lensjax.models.decision import Window
from lensjax.models.interfaces import BaseReader
from lensjax.training import nll

Score = Callable[[WorkingContext, Entries], Array]
"""From what is held to what it is worth: float32[R K], one for each row."""


class Forgetting(Protocol):
    """How a trajectory reads and forgets; `SupoConfig` says it."""

    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def refocus_steps(self) -> int: ...  # noqa: D102
    @property
    def draws(self) -> int: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def reward(self) -> str: ...  # noqa: D102


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """What was held, dropped and measured in S refocus steps over N blocks."""

    held: Array
    """bool[S + 1, N]: before each step, and at the end."""
    read: Array
    """int32[S + 1]: blocks that were read by then."""
    dropped: Array
    """int32[S, M]: what was drawn, N for nothing."""
    nll: Array
    """float32[1]: mean loss of the answer at the end, in nats; with per-step rewards float32[S + 1], at each time."""
    matches: Array
    """bool[H]: whether each token of the answer was the likeliest one at the end."""

    @property
    def taken(self) -> Array:
        """bool[..., S]: steps that there was something left to read for."""
        return self.read[..., :-1] < self.held.shape[-1]

    @property
    def has_ended(self) -> Array:
        """bool[...]: whether all of the stream was read; else it is overlong."""
        return self.read[..., -1] == self.held.shape[-1]


def check(geometry: Geometry, settings: Forgetting) -> None:
    """Checks that a stream can be read to its end.

    Raises:
      ValueError: blocks and question do not make up the history, the stream fits into the context, or no trajectory
        can come to its end.
    """
    size, blocks = geometry.block_size, geometry.blocks(1)
    require(
        blocks * size == geometry.tail and geometry.max_lod == 1,
        f"Geometry.history must be whole blocks of one level before the {geometry.recent_tokens} recent tokens that "
        f"ask, got {geometry.history} tokens in blocks of {size} and max_lod {geometry.max_lod}",
    )
    require(
        settings.window < blocks,
        f"supo.window must be below the {blocks} blocks of the stream, which would be no longer than the context "
        f"otherwise, got {settings.window}",
    )
    most = settings.refocus_steps * settings.draws
    require(
        most >= blocks - settings.window,
        f"supo.refocus_steps times supo.draws must be at least {blocks - settings.window}, the blocks to be dropped "
        f"until the stream is read, got {settings.refocus_steps} times {settings.draws}",
    )


def run(
    models: Models,
    params: dict[str, Params],
    window: Window,
    key: Array | None,
    geometry: Geometry,
    *,
    settings: Forgetting,
    score: Score | None = None,
) -> Trajectory:
    """One trajectory; no gradient passes through it.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      window: the stream, which ends with what is asked, and the answer.
      key: PRNG key, consumed; None drops the blocks of lowest score in each step, as many as there are draws.
      geometry: the stream.
      settings: size of the context, steps and draws.
      score: another policy; None for LensNet.

    Returns:
      `Trajectory`.

    Raises:
      ValueError: by `check`, or LensNet reads what the base model makes of the whole stream.
    """
    check(geometry, settings)
    params = jax.lax.stop_gradient(params)
    tree = stream(models, params, window, geometry)
    score = policy(models.lens, params["lens"]) if score is None else score
    blocks, draws = geometry.blocks(1), settings.draws
    index = jnp.arange(blocks, dtype=jnp.int32)

    def step(before: tuple[Array, Array], key: Array | None) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        held, read = before
        scores, most = _scores(score, tree, held, read, geometry, settings.window), blocks - read
        if key is None:
            kept, dropped = forgetting.lowest(held, scores, most, draws=draws)
        else:
            kept, dropped = forgetting.draw(key, held, scores, most, draws=draws, temperature=settings.temperature)
        after = read + jnp.sum(dropped < blocks, dtype=jnp.int32)
        return (kept | ((index >= read) & (index < after)), after), (held, read, dropped)

    start = index < settings.window, jnp.asarray(settings.window, jnp.int32)
    keys = None if key is None else jax.random.split(key, settings.refocus_steps)
    (held, read), seen = jax.lax.scan(step, start, keys, length=settings.refocus_steps)
    held, read = jnp.concatenate([seen[0], held[None]]), jnp.append(seen[1], read)
    measured = held if settings.reward == "steps" else held[-1:]
    variants = jax.vmap(lambda one: _asked(one, geometry, settings.window))(measured)
    losses, matches = nll.variant_matches(
        models.base, params["base"], tree, variants, window.horizon, _in_full(geometry)
    )
    return Trajectory(held, read, seen[2], nll.mean_nll(losses), matches[-1])


def stream(models: Models, params: dict[str, Params], window: Window, geometry: Geometry) -> TreeState:
    """Embeddings and gists of a stream, each block's of its own tokens alone.

    Raises:
      ValueError: LensNet reads what the base model makes of the whole stream.
    """
    reads = models.lens.reads if isinstance(models.lens, BaseReader) else "nothing"
    require(reads == "nothing", f"lens.reads must be nothing where what was dropped is gone, got {reads}")
    return decision.build_tree(models, params, window.history, geometry)


def policy(lens: LensPolicy, lens_params: Params) -> Score:
    """LensNet."""
    return lambda context, entries: lens.apply(lens_params, jax.lax.stop_gradient(entries))


def log_prob(
    models: Models,
    lens_params: Params,
    tree: TreeState,
    trajectory: Trajectory,
    *,
    geometry: Geometry,
    settings: Forgetting,
) -> tuple[Array, Array]:
    """How probable LensNet finds what a trajectory dropped; differentiable in its parameters.

    Args:
      models: LensNet is called.
      lens_params: its parameters.
      tree: of the `stream`.
      trajectory: of this policy or of another one, drawn.
      geometry: the stream.
      settings: size of the context, and temperature of the draws.

    Returns:
      Log-probability and entropy of each step, float32[S] each: 0 once all is read.
    """
    trajectory, tree = jax.lax.stop_gradient((trajectory, tree))
    score = policy(models.lens, lens_params)

    def one(held: Array, read: Array, dropped: Array) -> tuple[Array, Array]:
        scores = _scores(score, tree, held, read, geometry, settings.window)
        most = geometry.blocks(1) - read
        return forgetting.log_prob(dropped, held, scores, most, temperature=settings.temperature)

    return jax.vmap(one)(trajectory.held[:-1], trajectory.read[:-1], trajectory.dropped)


def _scores(score: Score, tree: TreeState, held: Array, read: Array, geometry: Geometry, window: int) -> Array:
    """What the blocks held are worth, float32[N]; of the others it says nothing."""
    size, full = geometry.block_size, _in_full(geometry)
    context = contexts.from_cut(_cut(held, geometry, question=MISSING), full, capacity=window * size)
    # Age counts from the last token read.
    entries = contexts.materialise(replace(tree, length=read * size), context)
    return nodes.pool_scores(score(context, entries), context, full)


def _asked(held: Array, geometry: Geometry, window: int) -> WorkingContext:
    """What the base model reads at the end: the blocks held, and what is asked."""
    capacity = window * geometry.block_size + geometry.recent_tokens
    return contexts.from_cut(_cut(held, geometry, question=0), _in_full(geometry), capacity=capacity)


def _cut(held: Array, geometry: Geometry, *, question: int) -> Array:
    shown = jnp.where(jnp.repeat(held, geometry.block_size), 0, MISSING)
    return jnp.append(shown, jnp.full(geometry.recent_tokens, question, shown.dtype))


def _in_full(geometry: Geometry) -> Geometry:
    """The same history: every row is read, and none is a map of what is not."""
    return replace(geometry, omit=False, sink_blocks=0)
