"""What a sample is worth to the sets that hold it: sets are scored, not samples."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def set_advantages(rewards: ArrayLike, distances: ArrayLike, where: ArrayLike, *, size: int) -> Array:
    """Advantages of samples under a polychromic objective: how much better the sets are that hold them.

        A_v  = mean of f(S) over the sets S with v  -  mean of f(S) over all sets
        f(S) = mean_{i in S} (r_i - min r) * mean_{i < j in S} d_ij

    over all sets of `size` samples that count. f is a sum over triples (i, j, k), and in how many sets such a triple
    is depends on nothing but how many of them differ: all sets are counted in closed form, none is drawn.

    A sample of low reward that is unlike the good ones may have a positive advantage. Rewards are measured from the
    group's lowest, so that a distance never counts against a set: those of the paper are successes, at least 0.

    Args:
      rewards: float32[N].
      distances: float32[N, N], symmetric, 0 on the diagonal; how unlike two samples are.
      where: bool[N], samples that count.
      size: static number of samples in a set, at least 2.

    Returns:
      float32[N], in the unit of rewards times distances; 0 where not valid, and everywhere unless there is more than
      one set.

    Raises:
      ValueError: the size is below 2, or the distances are not N by N.

    References:
      Hamid et al., Polychromic Objectives for Reinforcement Learning, arXiv:2509.25424: the score of a set is reward
      times diversity, and its samples share its advantage (abstract); that a sample's is the mean over its sets minus
      that over all is how its authors describe it on their page. Theirs are drawn sets and a diversity of the task;
      all sets, the mean distance of pairs, and the origin of the rewards are chosen here.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import sets
      >>> rewards, far = jnp.array([1.0, 1.0, 0.0]), jnp.array([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]])
      >>> # f is 0 of the two that are alike, and 1/2 of the other sets: the mean is 1/3
      >>> [round(float(one), 3) for one in sets.set_advantages(rewards, far, jnp.ones(3, bool), size=2)]
      [-0.083, -0.083, 0.167]
    """
    where = jnp.asarray(where)
    count = where.shape[0]
    if size < 2:
        raise ValueError(f"size must be at least 2, since a set of fewer has no distance, got {size}")
    if jnp.shape(distances) != (count, count):
        raise ValueError(f"distances must be [{count}, {count}], one of each pair, got {list(jnp.shape(distances))}")
    rewards, distances = jax.lax.stop_gradient((jnp.asarray(rewards), jnp.asarray(distances)))
    rewards = jnp.where(where, rewards - jnp.min(jnp.where(where, rewards, jnp.inf)), 0.0)
    distances = jnp.where(where[:, None] & where[None, :], distances, 0.0)

    # Sums over i and j < k of r_i d_jk, by what they have in common with each other and with v.
    reward, reach = jnp.sum(rewards), jnp.sum(distances, axis=1)
    apart = 0.5 * jnp.sum(reach)
    touching = jnp.sum(rewards * reach)
    beside = distances @ rewards
    own, others = rewards, reward - rewards
    one_more = own * reach + beside
    two_more = own * (apart - reach) + (others * reach - beside) + (touching - own * reach - beside)
    three_more = others * (apart - reach) - (touching - own * reach) + beside

    valid = jnp.sum(where, dtype=jnp.float32)

    def chance(more: int, given: int) -> Array:
        """Share of the sets with some samples given that hold `more` others."""
        share = jnp.ones(())
        for step in range(given, given + more):
            share = share * (size - step) / jnp.maximum(valid - step, 1)
        return share

    with_it = chance(1, 1) * one_more + chance(2, 1) * two_more + chance(3, 1) * three_more
    of_all = chance(2, 0) * touching + chance(3, 0) * (reward * apart - touching)
    scale = 2.0 / (size * size * (size - 1))
    return jnp.where(where & (valid > size), scale * (with_it - of_all), 0.0)
