"""What an action was worth beside what was expected: over the steps of an episode, or within a group of samples.

Advantages are constants to the losses that use them (`losses.policy`): no gradient passes through any of these.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean, masked_std


def generalised_advantages(
    rewards: ArrayLike, values: ArrayLike, continues: ArrayLike, *, discount: ArrayLike, trace_decay: ArrayLike
) -> Array:
    """Generalised advantage estimation over the steps of an episode.

        delta_t = r_t + discount c_t V_{t+1} - V_t
        A_t     = delta_t + discount trace_decay c_t A_{t+1},    A_S = 0

    With a discount of 0 it is the reward minus the baseline; A_t + V_t is the value's regression target.

    Args:
      rewards: float32[S], of the steps.
      values: float32[S + 1], expected before each step, and after the last one.
      continues: bool[S] or float32[S], c_t: 0 where the episode ended with that step.
      discount: float32[], gamma in [0, 1].
      trace_decay: float32[], lambda in [0, 1]: 0 trusts the values, 1 the rewards.

    Returns:
      float32[S].

    Raises:
      ValueError: there is not one value more than rewards.

    References:
      Schulman et al., Generalized Advantage Estimation, arXiv:1506.02438, Eq. 16.
    """
    rewards, values, continues = (jax.lax.stop_gradient(jnp.asarray(x)) for x in (rewards, values, continues))
    steps = rewards.shape[0]
    if values.shape[0] != steps + 1:
        raise ValueError(f"expected values of {steps + 1} states for {steps} rewards, got {values.shape[0]}")
    discounts = jnp.asarray(discount, jnp.float32) * continues.astype(jnp.float32)
    deltas = rewards + discounts * values[1:] - values[:-1]

    def step(later: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, kept = inputs
        advantage = delta + trace_decay * kept * later
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros((), deltas.dtype), (deltas, discounts), reverse=True)
    return advantages


def group_advantages(
    rewards: ArrayLike, where: ArrayLike, *, baseline: Literal["mean", "standardised", "leave_one_out"]
) -> Array:
    """Advantages of n samples of one context, each the others' baseline.

        mean            r_i - mean r                         (Dr.GRPO)
        standardised    (r_i - mean r) / std r               (GRPO; 0 where all are worth the same)
        leave_one_out   r_i - mean_{j != i} r_j              (RLOO), n / (n - 1) times the first

    Args:
      rewards: float32[N].
      where: bool[N], samples that count.
      baseline: which of them.

    Returns:
      float32[N], 0 where not valid.

    Raises:
      ValueError: the baseline is unknown.

    References:
      Shao et al., DeepSeekMath (GRPO), arXiv:2402.03300; Liu et al., Dr.GRPO, arXiv:2503.20783; Ahmadian et al., Back
      to Basics (RLOO), arXiv:2402.14740.
    """
    where = jnp.asarray(where)
    rewards = jnp.where(where, jax.lax.stop_gradient(rewards), 0.0)
    centred = jnp.where(where, rewards - masked_mean(rewards, where), 0.0)
    if baseline == "mean":
        return centred
    if baseline == "standardised":
        std = masked_std(rewards, where)
        # Below this the differences are rounding.
        is_flat = std <= 1e-6 * jnp.max(jnp.abs(rewards), initial=0.0)
        return jnp.where(is_flat, 0.0, centred / jnp.where(is_flat, 1.0, std))
    if baseline != "leave_one_out":
        raise ValueError(f"baseline must be mean, standardised or leave_one_out, got {baseline!r}")
    count = jnp.sum(where, dtype=jnp.float32)
    return centred * count / jnp.maximum(count - 1, 1)


def blended_advantages(rewards: ArrayLike, where: ArrayLike, *, sharpness: ArrayLike, threshold: ArrayLike) -> Array:
    """Advantages within groups that go over to advantages between groups where a group agrees.

        A_gi = w_g local_gi + (1 - w_g) global_g,    w_g = sigmoid(sharpness (H_g - threshold))

    local: the reward standardised over its group; global: the group's mean reward standardised over the batch. H is the
    entropy, in bits, of the rewards in the group. Equal rewards are one outcome: round continuous ones beforehand. A
    group of ties, whose local advantages are all 0, then still counts for what it is beside the others.

    Args:
      rewards: float32[B, N].
      where: bool[B, N], samples that count.
      sharpness: float32[], at least 0; 0 is one half of each everywhere.
      threshold: float32[], bits of entropy at which both count alike.

    Returns:
      float32[B, N], 0 where not valid.

    References:
      COPO, arXiv:2508.04138. The weight is that of its authors' code, whose entropy is that of the final answers; that
      code's options to shrink the global reward by the entropy and to leave ties to it alone are left out.
    """
    rewards, where = jax.lax.stop_gradient(jnp.asarray(rewards)), jnp.asarray(where)
    local = jax.vmap(lambda row, valid: group_advantages(row, valid, baseline="standardised"))(rewards, where)
    means = jax.vmap(masked_mean)(rewards, where)
    between = group_advantages(means, jnp.any(where, axis=1), baseline="standardised")
    is_same = (rewards[:, :, None] == rewards[:, None, :]) & where[:, :, None] & where[:, None, :]
    count = jnp.sum(where, axis=1, dtype=jnp.float32)[:, None]
    # Each sample's outcome in the group, as a share: its mean logarithm is minus the entropy.
    share = jnp.sum(is_same, axis=2, dtype=jnp.float32) / jnp.maximum(count, 1)
    entropy = -jax.vmap(masked_mean)(jnp.log2(jnp.where(where, share, 1.0)), where)[:, None]
    weight = jax.nn.sigmoid(jnp.asarray(sharpness) * (entropy - jnp.asarray(threshold)))
    return jnp.where(where, weight * local + (1 - weight) * between[:, None], 0.0)


def optimal_baseline(rewards: ArrayLike, square_norms: ArrayLike, where: ArrayLike) -> Array:
    """The baseline by which a policy gradient varies least.

        b* = sum_i |grad log pi_i|^2 r_i / sum_i |grad log pi_i|^2

    Args:
      rewards: float32[N].
      square_norms: float32[N], squared norms of each sample's score function, at least 0.
      where: bool[N], samples that count.

    Returns:
      float32[]; the mean reward where all norms are 0.

    References:
      OBLR-PO, arXiv:2511.23310; Greensmith et al., Variance Reduction Techniques for Gradient Estimates (2004).
    """
    where = jnp.asarray(where)
    rewards, norms = (jnp.where(where, jax.lax.stop_gradient(x), 0.0) for x in (rewards, square_norms))
    total = jnp.sum(norms)
    weighted = jnp.sum(norms * rewards) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, weighted, masked_mean(rewards, where))


def importance_weights(log_probs: ArrayLike, behaviour_log_probs: ArrayLike, *, most: ArrayLike) -> Array:
    """Truncated ratios pi(a) / mu(a) of samples that another policy drew.

    Args:
      log_probs: float32[...], of the policy.
      behaviour_log_probs: float32[...], of the policy that drew them.
      most: float32[], above 0: larger ratios are cut to it, which trades variance for bias.

    Returns:
      float32[...].

    References:
      Ionides, Truncated Importance Sampling (2008).
    """
    log_ratio = jax.lax.stop_gradient(jnp.asarray(log_probs) - jnp.asarray(behaviour_log_probs))
    return jnp.exp(jnp.minimum(log_ratio, jnp.log(jnp.asarray(most))))


def most_varied(values: ArrayLike, where: ArrayLike, *, count: int) -> Array:
    """The subset of some size whose values vary most: down-sampling of a group (D3S, first stage).

    Such a subset takes its members from both ends of the sorted values, so that `count` + 1 are tried and not all.

    Args:
      values: float32[N], advantages or rewards.
      where: bool[N], samples that count.
      count: static size of the subset.

    Returns:
      bool[N]: `count` samples, or all that count where they are fewer.

    Raises:
      ValueError: the count is not between 1 and N.

    References:
      D3S, arXiv:2509.22115; Xu et al., PODS, arXiv:2504.13818.
    """
    values, where = jax.lax.stop_gradient(jnp.asarray(values)), jnp.asarray(where)
    size = values.shape[0]
    if not 1 <= count <= size:
        raise ValueError(f"count must be between 1 and the {size} samples of the group, got {count}")
    rank = jnp.argsort(jnp.argsort(jnp.where(where, values, jnp.inf)))
    valid = jnp.sum(where, dtype=jnp.int32)

    def chosen(low: Array) -> Array:
        return where & ((rank < low) | (rank >= valid - (count - low)))

    subsets = jax.vmap(chosen)(jnp.arange(count + 1))
    spread = jax.vmap(lambda subset: masked_std(jnp.where(where, values, 0.0), subset))(subsets)
    return subsets[jnp.argmax(spread)]


def most_informative(advantages: ArrayLike, entropies: ArrayLike, where: ArrayLike, *, share: ArrayLike) -> Array:
    """The actions from which most is learned: large advantage, undecided policy (D3S, second stage).

    The top share by |A_i| H_i. The schedule of the paper, few at first and more later, is `schedules.linear`.

    Args:
      advantages: float32[N], of the actions.
      entropies: float32[N], of the policy at each of them.
      where: bool[N], actions that count.
      share: float32[], in (0, 1]: how many of them are kept, rounded up.

    Returns:
      bool[N]. Where a value is NaN it is True: it is for the loss to say so.

    References:
      D3S, arXiv:2509.22115.
    """
    where = jnp.asarray(where)
    weight = jax.lax.stop_gradient(jnp.abs(jnp.asarray(advantages)) * jnp.asarray(entropies))
    rank = jnp.argsort(jnp.argsort(jnp.where(where, -weight, jnp.inf)))
    # A share times a count that should be whole may come out a rounding error above it.
    kept = jnp.ceil(jnp.asarray(share) * jnp.sum(where, dtype=jnp.float32) - 1e-4)
    return where & ((rank < kept.astype(jnp.int32)) | jnp.isnan(weight))
