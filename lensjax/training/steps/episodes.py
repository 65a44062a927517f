"""Episodes of a policy that acts: a cold start, several refocus steps on one sequence, and what each was worth.

    reward of a step = nll(context before it) - nll(context after it) - edit_cost * swaps

`run` rolls an episode out and keeps what was seen and done; `log_prob` tells how probable a policy finds it, which is
what policy gradients differentiate. Both are for one sequence.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.context import allocator, edits, nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.edits import ActionStats, Swaps
from lensjax.context.geometry import Geometry
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Models, Params
from lensjax.models.decision import Window, build_tree
from lensjax.models.interfaces import features_of
from lensjax.training import nll


class Exploration(Protocol):
    """How an episode explores; `OnlineConfig` says it."""

    @property
    def refocus_steps(self) -> int: ...  # noqa: D102
    @property
    def draws(self) -> int: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Episode:
    """What was seen, done and measured in S refocus steps; the leading axis of all but `nll` is S."""

    states: FocusState
    """What was collapsed before each step."""
    contexts: WorkingContext
    """The working context that each step saw."""
    entries: Entries
    """What models read of it."""
    swaps: Swaps
    """What was drawn."""
    log_probs: Array
    """float32[S]: of what was drawn, for the policy that drew it."""
    nll: Array
    """float32[S + 1]: nats per token on the horizon, as rewarded; of the cold start and the context after each step."""

    def rewards(self, *, edit_cost: ArrayLike) -> Array:
        """float32[S]: fall of the loss in each step, minus the cost of its swaps, in nats per token."""
        spent = edit_cost * self.swaps.count.astype(jnp.float32)
        return self.nll[..., :-1] - self.nll[..., 1:] - spent


def run(
    models: Models,
    params: dict[str, Params],
    window: Window,
    key: Array,
    geometry: Geometry,
    *,
    length: int,
    focus: FocusConfig,
    settings: Exploration,
    weights: Array | None = None,
) -> Episode:
    """Rolls out one episode; no gradient passes through it.

    Args:
      models: all three are called.
      params: parameters of `base`, `gist` and `lens`.
      window: history and horizon.
      key: PRNG key, consumed.
      geometry: the history.
      length: static number of entries W of every context: none is padding.
      focus: read are the cold start and the cool-down.
      settings: how long an episode is and how it explores.
      weights: float32[H] that sum to 1, of the tokens of the horizon in the reward; None weighs all alike.

    Returns:
      `Episode`.
    """
    params = jax.lax.stop_gradient(params)
    tree = build_tree(models, params, window.history, geometry)

    def see(state: FocusState) -> tuple[WorkingContext, Entries, Array]:
        context = allocator.to_context(state, geometry, capacity=length)
        entries = contexts.materialise(tree, context)
        read = contexts.materialise(tree, contexts.read(context, geometry))
        measured = nll.token_nll(models.base, params["base"], read, window.horizon)
        return context, entries, nll.mean_nll(measured, weights)

    Seen = tuple[FocusState, WorkingContext, Entries]

    def step(seen: Seen, key: Array) -> tuple[Seen, tuple[FocusState, WorkingContext, Entries, Swaps, Array, Array]]:
        state, context, entries = seen
        scores = node_scores(models, params["lens"], entries, context, geometry)
        after, swaps = edits.draw(
            key,
            state,
            scores,
            geometry,
            draws=settings.draws,
            temperature=settings.temperature,
            cooldown=focus.cooldown,
        )
        stats = edits.log_prob(swaps, state, scores, geometry, temperature=settings.temperature)
        next_context, next_entries, loss = see(after)
        return (after, next_context, next_entries), (state, context, entries, swaps, stats.log_prob, loss)

    start = allocator.start(length, geometry, settings=focus)
    context, entries, first = see(start)
    keys = jax.random.split(key, settings.refocus_steps)
    _, (states, seen, read, swaps, log_probs, later) = jax.lax.scan(step, (start, context, entries), keys)
    return Episode(states, seen, read, swaps, log_probs, jnp.concatenate([first[None], later]))


def node_scores(
    models: Models, lens_params: Params, entries: Entries, context: WorkingContext, geometry: Geometry
) -> Array:
    """The policy's scores of all nodes of a window, from those of a context's entries; float32[N]."""
    scores = models.lens.apply(lens_params, entries)
    return nodes.pool_scores(scores, context, geometry)


def log_prob(
    models: Models,
    lens_params: Params,
    episode: Episode,
    *,
    geometry: Geometry,
    settings: Exploration,
    reference: Params | None = None,
) -> tuple[ActionStats, Array]:
    """How probable a policy finds an episode; differentiable in its parameters.

    Args:
      models: all three are called.
      lens_params: parameters of LensNet.
      episode: of this policy or of another one.
      geometry: the history.
      settings: read is the temperature of the draws.
      reference: parameters of the reference policy; None leaves the divergence 0, and its forward pass out.

    Returns:
      `ActionStats` of each step, leading axis S, and features of what each step saw, float32[S, F]; no gradient reaches
      LensNet through the features.
    """
    temperature, lens = settings.temperature, features_of(models.lens)
    episode = jax.lax.stop_gradient(episode)

    def one(state: FocusState, context: WorkingContext, entries: Entries, swaps: Swaps) -> tuple[ActionStats, Array]:
        scores, hidden = lens.apply_with_features(lens_params, entries)
        ours = nodes.pool_scores(scores, context, geometry)
        theirs = None if reference is None else node_scores(models, reference, entries, context, geometry)
        stats = edits.log_prob(swaps, state, ours, geometry, temperature=temperature, reference=theirs)
        return stats, jax.lax.stop_gradient(_pooled(hidden, context, geometry))

    stats, pooled = jax.vmap(one)(episode.states, episode.contexts, episode.entries, episode.swaps)
    steps = episode.log_probs.shape[0]
    left = 1 - jnp.arange(steps, dtype=jnp.float32) / steps
    return stats, jnp.concatenate([pooled, episode.nll[:-1, None], left[:, None]], axis=1)


def feature_count(models: Models) -> int:
    """Numbers that describe what a step of an episode saw [F]."""
    return 2 * features_of(models.lens).feature_dim + 2


def _pooled(hidden: Array, context: WorkingContext, geometry: Geometry) -> Array:
    """LensNet's features of a context, mean of the query and mean of the rest: float32[2 * dim]."""
    is_tail = context.valid & (context.start >= geometry.tail)
    is_rest = context.valid & ~is_tail
    return jnp.concatenate([jax.vmap(masked_mean, (1, None))(hidden, where) for where in (is_tail, is_rest)])
