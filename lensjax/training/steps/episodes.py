"""Episodes of a policy that acts: a cold start, several refocus steps on one sequence, and what each was worth.

    reward of a step = nll(context before it) - nll(context after it) - edit_cost * swaps

`run` rolls an episode out and keeps what was seen and done; `judge` tells how probable a policy finds it, which is what
policy gradients differentiate. Both are for one sequence.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, edits, nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.edits import Judgement, Swaps
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Models, Params
from lensjax.models.decision import build_tree, split
from lensjax.runs.config import Config
from lensjax.training import nll
from lensjax.training.metrics import masked_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Episode:
    """What was seen, done and measured in S refocus steps; the leading axis of all but `losses` is S."""

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
    losses: Array
    """float32[S + 1]: nats per token on the horizon, of the cold start and of the context after each step."""

    def rewards(self, *, edit_cost: ArrayLike) -> Array:
        """float32[S]: fall of the loss in each step, minus the cost of its swaps, in nats per token."""
        spent = edit_cost * self.swaps.count.astype(jnp.float32)
        return self.losses[..., :-1] - self.losses[..., 1:] - spent


def run(
    models: Models, params: dict[str, Params], tokens: Array, key: Array, *, length: int, config: Config
) -> Episode:
    """Rolls out one episode; no gradient passes through it.

    Args:
      models: the models.
      params: parameters of `base`, `gist` and `lens`.
      tokens: int32[T].
      key: PRNG key, consumed.
      length: static number of entries W of every context: none is padding.
      config: shapes; how long an episode is and how it explores (`online`), and the allocator's cool-down.

    Returns:
      `Episode`.
    """
    geometry, settings = config.context.geometry, config.online
    params, window = jax.lax.stop_gradient(params), split(tokens, horizon=config.context.horizon)
    tree = build_tree(models, params, window.history, config)

    def see(state: FocusState) -> tuple[WorkingContext, Entries, Array]:
        context = allocator.to_context(state, geometry, capacity=length)
        entries = contexts.materialise(tree, context)
        losses = nll.token_losses(models.base, params["base"], entries, window.horizon)
        return context, entries, jnp.mean(losses)

    Seen = tuple[FocusState, WorkingContext, Entries]

    def step(seen: Seen, key: Array) -> tuple[Seen, tuple[FocusState, WorkingContext, Entries, Swaps, Array, Array]]:
        state, context, entries = seen
        scores = node_scores(models, params["lens"], entries, context, config)
        after, swaps = edits.draw(
            key,
            state,
            scores,
            geometry,
            draws=settings.draws,
            temperature=settings.temperature,
            cooldown=config.focus.cooldown,
        )
        judged = edits.judge(swaps, state, scores, geometry, temperature=settings.temperature)
        next_context, next_entries, loss = see(after)
        return (after, next_context, next_entries), (state, context, entries, swaps, judged.log_prob, loss)

    start = allocator.uniform(length, geometry)
    context, entries, first = see(start)
    keys = jax.random.split(key, settings.refocus_steps)
    _, (states, seen, read, swaps, log_probs, losses) = jax.lax.scan(step, (start, context, entries), keys)
    return Episode(states, seen, read, swaps, log_probs, jnp.concatenate([first[None], losses]))


def node_scores(
    models: Models, lens_params: Params, entries: Entries, context: WorkingContext, config: Config
) -> Array:
    """The policy's scores of all nodes of a window, from those of a context's entries; float32[N]."""
    scores = models.lens.apply(lens_params, entries)
    return nodes.pool_scores(scores, context, config.context.geometry)


def judge(
    models: Models,
    lens_params: Params,
    episode: Episode,
    *,
    config: Config,
    reference: Params | None = None,
) -> tuple[Judgement, Array]:
    """How probable a policy finds an episode; differentiable in its parameters.

    Args:
      models: the models.
      lens_params: parameters of LensNet.
      episode: of this policy or of another one.
      config: shapes, and the temperature of the draws.
      reference: parameters of the reference policy; None leaves the divergence 0, and its forward pass out.

    Returns:
      `Judgement` of each step, leading axis S, and features of what each step saw, float32[S, F]; no gradient reaches
      LensNet through the features.
    """
    geometry, temperature = config.context.geometry, config.online.temperature
    episode = jax.lax.stop_gradient(episode)

    def one(state: FocusState, context: WorkingContext, entries: Entries, swaps: Swaps) -> tuple[Judgement, Array]:
        scores, hidden = models.lens.apply_with_features(lens_params, entries)
        ours = nodes.pool_scores(scores, context, geometry)
        theirs = None if reference is None else node_scores(models, reference, entries, context, config)
        judged = edits.judge(swaps, state, ours, geometry, temperature=temperature, reference=theirs)
        return judged, jax.lax.stop_gradient(_pooled(hidden, context, config))

    judged, pooled = jax.vmap(one)(episode.states, episode.contexts, episode.entries, episode.swaps)
    steps = episode.log_probs.shape[0]
    left = 1 - jnp.arange(steps, dtype=jnp.float32) / steps
    return judged, jnp.concatenate([pooled, episode.losses[:-1, None], left[:, None]], axis=1)


def feature_count(config: Config) -> int:
    """Numbers that describe what a step of an episode saw [F]."""
    return 2 * config.lens.dim + 2


def _pooled(hidden: Array, context: WorkingContext, config: Config) -> Array:
    """LensNet's features of a context, mean of the query and mean of the rest: float32[2 * dim]."""
    is_tail = context.valid & (context.start >= config.context.history - config.context.recent_tokens)
    is_rest = context.valid & ~is_tail
    return jnp.concatenate([jax.vmap(masked_mean, (1, None))(hidden, where) for where in (is_tail, is_rest)])
