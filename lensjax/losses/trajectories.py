"""Which steps of a trajectory are credited, and with what: trajectories of one start, played by one policy, as a group.

As in `losses.advantages` these are constants to the losses that use them: no gradient passes through any of these.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.losses import advantages


def diverging(actions: ArrayLike, where: ArrayLike) -> Array:
    """Steps from the first one on in which not all of a group acted alike: pivotal credit.

        mask_t = 1 for t >= min { u : a_iu != a_ju for some i, j }, else 0

    What all have in common says nothing of why one is worth more than another. It ends for all in the same step: of two
    trajectories that act differently, every third one differs from at least one. Where all act alike to the end, or
    there is a single one, no step counts.

    Args:
      actions: int32[G, S, ...], of G trajectories in S steps from one start; what was drawn, in order.
      where: bool[G], trajectories that count; the others are not compared.

    Returns:
      bool[G, S], False for trajectories that do not count.

    Raises:
      ValueError: actions have no axis of steps, or there is not one flag for each trajectory.

    References:
      Shi et al., R3L, arXiv:2601.03715, pivotal credit assignment: by the abstract an update of the diverging suffix
      alone, by the authors' project page the mask above. There, a trajectory is compared with the one that was retried
      from its pivot; that a group of several drawn alike has one common prefix is the choice made here.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> actions = jnp.array([[3, 5, 5], [3, 4, 5]])  # alike, then another one, then alike in another place
      >>> lx.losses.trajectories.diverging(actions, jnp.ones(2, bool)).tolist()
      [[False, True, True], [False, True, True]]
    """
    actions, where = jax.lax.stop_gradient(jnp.asarray(actions)), jnp.asarray(where)
    if actions.ndim < 2 or where.shape != actions.shape[:1]:
        raise ValueError(
            f"expected actions of shape [G, S, ...] and a flag for each of G trajectories, got {actions.shape} and "
            f"{where.shape}"
        )
    rows = actions.reshape(*actions.shape[:2], -1)
    # All that count are compared with the first that does.
    is_other = jnp.any(rows != rows[jnp.argmax(where)][None], axis=2) & where[:, None]
    has_parted = jnp.cumsum(jnp.any(is_other, axis=0), dtype=jnp.int32) > 0
    return where[:, None] & has_parted[None]


def amplified(advantages: ArrayLike, *, factor: ArrayLike) -> Array:
    """Advantages of which those above 0 weigh more: A where A <= 0, factor A where A > 0.

    Where most of what is tried fails, the few successes still say where to go.

    Args:
      advantages: float32[...].
      factor: float32[], alpha; 1 changes nothing. Its authors take 3.

    Returns:
      float32[...].

    References:
      Shi et al., R3L, arXiv:2601.03715, positive amplification, as the authors' project page writes it. Its further
      case, alpha itself for a trajectory of the largest reward that there is, is left out: a loss has no known best.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> lx.losses.trajectories.amplified(jnp.array([-1.0, 0.5]), factor=3.0).tolist()
      [-1.0, 1.5]
    """
    values = jax.lax.stop_gradient(jnp.asarray(advantages))
    return jnp.where(values > 0, values * jnp.asarray(factor, values.dtype), values)


def shared_advantages(
    rewards: ArrayLike,
    where: ArrayLike,
    taken: ArrayLike,
    *,
    baseline: Literal["mean", "standardised", "leave_one_out"],
) -> Array:
    """The advantage of a whole trajectory, once for each of its steps.

        A_it = A(R_i | R_1 .. R_G)  for the steps t that trajectory i took, else 0

    A is that of `advantages.group_advantages`: a trajectory is one sample, however many steps it took.

    Args:
      rewards: float32[G], one for each trajectory, at its end.
      where: bool[G], trajectories that count: those that came to their end. The overlong ones, of which nobody knows
        what they would have been worth, neither learn nor are a baseline to others.
      taken: bool[G, S], steps that a trajectory took.
      baseline: as for `group_advantages`.

    Returns:
      float32[G, S].

    Raises:
      ValueError: the baseline is unknown.

    References:
      Lu et al., SUPO, arXiv:2510.06727: an advantage relative to the group and a mask of overlong trajectories, of
      which only the abstract and summaries were at hand. That an overlong one is no baseline either is the choice made
      here; masked after its advantage it would be one of reward 0.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> rewards, ended = jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])
      >>> taken = jnp.array([[True, True], [True, False], [True, True]])
      >>> lx.losses.trajectories.shared_advantages(rewards, ended, taken, baseline="mean").tolist()
      [[-1.0, -1.0], [1.0, 0.0], [0.0, 0.0]]
    """
    gained = advantages.group_advantages(rewards, where, baseline=baseline)
    return jnp.where(jnp.asarray(taken), gained[:, None], 0.0)
