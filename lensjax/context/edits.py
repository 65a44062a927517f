"""Sampled edits: a policy over swaps, every choice of which has a known probability.

A swap is drawn out of those that are legal at that moment, or the context is kept as it is:

    p(e, c) ~ exp((s_e - s_c) / temperature),    p(keep) ~ number of legal pairs (e, c)

for the node e to expand and the block c to collapse for it. Where all scores are equal, keeping is as likely as not. As
the temperature falls, the draw becomes the pair of largest difference where that is above 0, and else nothing: what the
allocator does (`focus.swap` without thresholds), but for a gist inside of the very block that would pay for it. It is
made in two choices, e or nothing first and then c, and both are ordinary categorical distributions.

One refocus step draws several swaps from one set of scores. What cools, and what the step itself made, is left alone.
Where it may not keep the context, each draw is a swap, as long as one is legal: the same probabilities, given a swap.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import nodes
from lensjax.context.allocator import FocusState
from lensjax.context.geometry import Geometry

# Far below every logit, and still finite: a gradient through it is 0 and not NaN.
_NEVER = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Swaps:
    """What one refocus step drew, in order; M draws."""

    expanded: Array
    """int32[M]: the node that was expanded, N where nothing was."""
    collapsed: Array
    """int32[M]: the block that was collapsed for it, N where nothing was."""

    @property
    def count(self) -> Array:
        """int32[...]: draws that changed the context."""
        return jnp.sum(self.changes, axis=-1, dtype=jnp.int32)

    @property
    def changes(self) -> Array:
        """bool[..., M]: draws that changed the context."""
        return self.expanded != self.collapsed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActionStats:
    """What a policy makes of the swaps of one refocus step, summed over the draws."""

    log_prob: Array
    """float32[]: of what was drawn."""
    entropy: Array
    """float32[]: of the choices on the way that was taken, in nats."""
    divergence: Array
    """float32[]: KL divergence from the reference policy, likewise; 0 without a reference."""


def draw(
    key: Array,
    state: FocusState,
    scores: ArrayLike,
    geometry: Geometry,
    *,
    draws: int,
    temperature: ArrayLike,
    cooldown: int,
    may_keep: bool = True,
) -> tuple[FocusState, Swaps]:
    """Samples and makes the swaps of one refocus step.

    Args:
      key: PRNG key, consumed.
      state: what is collapsed, and what cools.
      scores: float32[N], of the nodes (`nodes.pool_scores`).
      geometry: the history.
      draws: static number M.
      temperature: float32[], above 0, in units of scores.
      cooldown: refocus steps for which an edited node is left alone.
      may_keep: static; whether a draw may keep the context where a swap is legal.

    Returns:
      The state after the swaps, its cool-down counted on by one step, and what was drawn.
    """
    logits = jnp.asarray(scores) / temperature
    legal = _legal(state, geometry)
    none = logits.shape[0]
    expansion = functools.partial(_expansion_logits, may_keep=may_keep)

    def one(collapsed: Array, key: Array) -> tuple[Array, Swaps]:
        first, second = jax.random.split(key)
        node = jax.random.categorical(first, expansion(collapsed, legal, logits, geometry)).astype(jnp.int32)
        after = collapsed.at[node].set(False, mode="drop")
        block = jax.random.categorical(second, _collapse_logits(after, legal, logits, geometry)).astype(jnp.int32)
        block = jnp.where(node == none, none, block)
        return after.at[block].set(True, mode="drop"), Swaps(node, block)

    collapsed, swaps = jax.lax.scan(one, state.collapsed, jax.random.split(key, draws))
    cooling = jnp.where(collapsed != state.collapsed, cooldown, jnp.maximum(state.cooling - 1, 0))
    return FocusState(collapsed, cooling), swaps


def log_prob(
    swaps: Swaps,
    state: FocusState,
    scores: ArrayLike,
    geometry: Geometry,
    *,
    temperature: ArrayLike,
    reference: ArrayLike | None = None,
    may_keep: bool = True,
) -> ActionStats:
    """How probable a policy finds the swaps of one refocus step; differentiable in the scores.

    Entropy and divergence are exact for each choice, given the choices before it. Their gradients leave out that
    other choices would have led elsewhere, as is usual for policies over sequences.

    Args:
      swaps: what was drawn, by this policy or another one.
      state: before the step.
      scores: float32[N], the policy's.
      geometry: the history.
      temperature: float32[], above 0.
      reference: float32[N], scores of the reference policy, constants; None for none.
      may_keep: static, as for `draw`.

    Returns:
      `ActionStats`.
    """
    logits = jnp.asarray(scores) / temperature
    others = logits if reference is None else jax.lax.stop_gradient(jnp.asarray(reference)) / temperature
    legal = _legal(state, geometry)
    expansion = functools.partial(_expansion_logits, may_keep=may_keep)

    def one(collapsed: Array, swap: Swaps) -> tuple[Array, ActionStats]:
        def both(choice: Any, where: Array) -> tuple[Array, Array]:
            ours, theirs = (choice(where, legal, values, geometry) for values in (logits, others))
            return jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)

        after = collapsed.at[swap.expanded].set(False, mode="drop")
        first, second = (
            _stats(*both(expansion, collapsed), swap.expanded),
            _stats(*both(_collapse_logits, after), swap.collapsed),
        )
        whole = jax.tree.map(lambda a, b: a + jnp.where(swap.changes, b, 0.0), first, second)
        return after.at[swap.collapsed].set(True, mode="drop"), whole

    _, stats = jax.lax.scan(one, state.collapsed, swaps)
    total: ActionStats = jax.tree.map(jnp.sum, stats)
    return total


def _stats(log_probs: Array, reference: Array, choice: Array) -> ActionStats:
    """One categorical choice; masked options have probability 0, and log-probabilities that are finite."""
    probs = jnp.exp(log_probs)
    return ActionStats(
        log_prob=jnp.take(log_probs, choice, mode="clip"),
        entropy=-jnp.sum(probs * log_probs),
        divergence=jnp.sum(probs * (log_probs - reference)),
    )


def _legal(state: FocusState, geometry: Geometry) -> tuple[Array, Array]:
    """bool[N] each: nodes that may be expanded, and blocks that may be collapsed, as the step finds them."""
    is_warm = state.cooling == 0
    blocks = nodes.collapsible(state.collapsed, nodes.eligible(geometry, None), geometry)
    return is_warm & nodes.shown(state.collapsed, geometry), is_warm & blocks


def _expansion_logits(
    collapsed: Array, legal: tuple[Array, Array], logits: Array, geometry: Geometry, *, may_keep: bool
) -> Array:
    """float32[N + 1]: of expanding each node, with all that may be collapsed for it, and of keeping the context."""
    up = legal[0] & nodes.shown(collapsed, geometry)
    down = nodes.collapsible(collapsed, legal[1], geometry)
    # Once a node is expanded, its parent is no longer a block of whole children.
    parent = nodes.table(geometry).parent
    partners = jnp.sum(down, dtype=jnp.int32) - jnp.append(down, False)[parent].astype(jnp.int32)
    rest = _logsumexp_without(jnp.where(down, -logits, _NEVER))[parent]
    up = up & (partners > 0)
    pairs = jnp.sum(jnp.where(up, partners, 0))
    keep = jnp.log(jnp.maximum(pairs, 1).astype(jnp.float32))
    if not may_keep:
        keep = jnp.where(pairs > 0, _NEVER, keep)
    return jnp.append(jnp.where(up, logits + rest, _NEVER), keep)


def _collapse_logits(after: Array, legal: tuple[Array, Array], logits: Array, geometry: Geometry) -> Array:
    """float32[N]: of collapsing each block, once a node is expanded."""
    return jnp.where(nodes.collapsible(after, legal[1], geometry), -logits, _NEVER)


def _logsumexp_without(values: Array) -> Array:
    """float32[N + 1]: log of the sum of all exponentials but one's own; the last is that of all."""
    before = jax.lax.cumlogsumexp(values)
    behind = jax.lax.cumlogsumexp(values, reverse=True)
    never = jnp.full(1, _NEVER, values.dtype)
    without = jnp.logaddexp(jnp.concatenate([never, before[:-1]]), jnp.concatenate([behind[1:], never]))
    return jnp.append(without, before[-1])
