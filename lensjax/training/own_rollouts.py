"""Rollouts some of which the policy itself draws, and how probable each is for it beside what drew it.

A sequence's rollouts are one random cut and what M swaps make of it. A swap is drawn out of the legal ones, by the
policy at a temperature or each alike (`context.edits`, none of whose draws keeps the context). Both know how probable
what was drawn is, and so does their mixture, which is what the rollouts of a sequence come from:

    mu(a) = share pi(a) + (1 - share) u(a),    rho(a) = pi(a) / mu(a) <= 1 / share

for the swaps a in their order, the policy pi, the uniform draw u, and the policy's share of the draws. No gradient
passes through any of this.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator, edits, nodes
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusState
from lensjax.context.edits import Swaps
from lensjax.context.geometry import Geometry
from lensjax.context.refocus import ScoreFn
from lensjax.context.rollouts import collapses_for_length, sample_cut
from lensjax.context.working import WorkingContext


def draw(
    key: Array,
    score_fn: ScoreFn,
    length: ArrayLike,
    high_lod_share: ArrayLike,
    *,
    rollouts: int,
    own: int,
    draws: int,
    temperature: ArrayLike,
    geometry: Geometry,
    capacity: int,
) -> tuple[WorkingContext, Array]:
    """Draws one random working context, and N - 1 that a few swaps make of it, the last ones by the policy.

    Args:
      key: PRNG key, consumed.
      score_fn: the policy; it looks at the first context once.
      length: int32[], entries of every context; may be traced.
      high_lod_share: float32[], of the first one; see `rollouts.sample_cut`.
      rollouts: N, static.
      own: static, how many the policy draws, from 1 to N - 1.
      draws: static number of swaps M; fewer where no more are legal.
      temperature: float32[], above 0, of the policy's draws, in units of scores.
      geometry: the history.
      capacity: static number of entries W, at least the length.

    Returns:
      A `WorkingContext` with a leading axis N, and float32[N]: `log_ratios` of the swaps, 0 for the first context.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.training import own_rollouts
      >>> shape = {"geometry": lx.Geometry(history=16, block_size=2, max_lod=1, recent_tokens=2), "capacity": 12}
      >>> score = lambda context: jnp.sign(context.start - 4).astype(jnp.float32)  # late blocks deserve more detail
      >>> draw = functools.partial(own_rollouts.draw, score_fn=score, rollouts=3, own=1, draws=1, temperature=0.1)
      >>> drawn, ratio = jax.jit(lambda key: draw(key, length=12, high_lod_share=0.0, **shape))(jax.random.key(0))
      >>> drawn.length.tolist(), bool(jnp.exp(ratio).max() <= 2.001)  # at most 1 / share
      ([12, 12, 12], True)
    """
    cut_key, swap_key = jax.random.split(key)
    first = sample_cut(cut_key, collapses_for_length(length, geometry), high_lod_share, geometry)
    centre = allocator.from_cut(first, geometry)
    seen = contexts.from_cut(first, geometry, capacity=capacity)
    scores = jax.lax.stop_gradient(nodes.pool_scores(score_fn(seen), seen, geometry))
    is_own = jnp.arange(rollouts - 1) >= rollouts - 1 - own

    def swapped(key: Array, by: Array) -> tuple[FocusState, Swaps]:
        return edits.draw(key, centre, by, geometry, draws=draws, temperature=temperature, cooldown=0, may_keep=False)

    keys = jax.random.split(swap_key, rollouts - 1)
    states, swaps = jax.vmap(swapped)(keys, jnp.where(is_own[:, None], scores, 0.0))
    cuts = jnp.concatenate([first[None], jax.vmap(lambda state: allocator.to_cut(state, geometry))(states)])
    ratios = log_ratios(swaps, centre, scores, geometry, share=own / (rollouts - 1), temperature=temperature)
    to_context = jax.vmap(lambda cut: contexts.from_cut(cut, geometry, capacity=capacity))
    return to_context(cuts), jnp.append(0.0, ratios)


def log_ratios(
    swaps: Swaps, state: FocusState, scores: ArrayLike, geometry: Geometry, *, share: float, temperature: ArrayLike
) -> Array:
    """How much rather the policy draws swaps than the mixture does that drew them: log rho.

    For n draws of which the policy's are a fixed share, and any f of a draw, the mean of rho f over them has the mean
    of f over the policy's draws as its expectation, exactly: this is the balance heuristic. A cut that several orders
    of swaps lead to has the ratio of the order that was drawn, which changes no expectation. The policy is the one
    that never keeps a context; the cut that it starts from is the sampler's.

    Args:
      swaps: of the draws, leading axis n.
      state: what they start from.
      scores: float32[N], the policy's.
      geometry: the history.
      share: static share of the draws that are the policy's, in (0, 1].
      temperature: float32[], above 0, of the policy's draws.

    Returns:
      float32[n], at most -log(share); 0 where all draws are the policy's.

    References:
      Veach and Guibas, Optimally Combining Sampling Techniques (1995), for the balance heuristic; Hesterberg, Weighted
      Average Importance Sampling and Defensive Mixture Distributions (1995), for the bound.
    """

    def log_prob(scores: Array) -> Array:
        of = functools.partial(edits.log_prob, geometry=geometry, temperature=temperature, may_keep=False)
        return jax.vmap(lambda swap: of(swap, state, scores).log_prob)(swaps)

    scores = jax.lax.stop_gradient(jnp.asarray(scores))
    ours = log_prob(scores)
    if share == 1:
        return jnp.zeros_like(ours)
    alike = log_prob(jnp.zeros_like(scores))
    return ours - jnp.logaddexp(math.log(share) + ours, math.log1p(-share) + alike)
