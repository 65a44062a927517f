"""Objectives over a group: N scored variants of one context, and what each turned out to be worth.

All take `(scores, rewards, where, *, hyperparameters)` and return one float32 scalar, to be minimised.

    scores   float32[N]  h_i, the policy's score of each variant (`preferences.variant_values`); where there is a
                         reference policy, the difference D_i = h_i - h_i^ref
    rewards  float32[N]  r_i, higher is better: -nll, or any other measure
    where    bool[N]     variants that count; the others may hold anything

The scores stand where the papers have log-probabilities. They are compared within the group, so that adding a constant
to all of them changes nothing, but in `a_star_po`, which regresses the scores themselves, in `cpl` with a bias below 1,
in `rpo` and in `grpo`. Where no pair of variants differs in reward, the objectives of preferences (`logistic`, `rpo`,
`hinge`, `ipo`, `cpl`), of better against worse ones (`disco`, `info_nce`), of rankings (`plackett_luce`, `pg_rank`) and
of advantages (`grpo`) are 0 with gradient 0. A NaN among the scores or rewards that count makes any objective NaN.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.losses.advantages import group_advantages
from lensjax.losses.policy import clipped_surrogate, policy_gradient
from lensjax.training.metrics import masked_mean

# Far below every logit, and still finite: a gradient through it is 0 and not NaN.
_NEVER = -1e30


def logistic(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Logistic loss of the difference, over all pairs with a better variant i.

        mean over r_i > r_j of softplus(-beta (D_i - D_j))

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; large is sharp.

    Returns:
      float32[].

    References:
      Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, Eq. 7.
    """
    return _over_preferences(lambda better, worse: jax.nn.softplus(beta * (worse - better)), scores, rewards, where)


def rpo(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike, weight: ArrayLike) -> Array:
    """Logistic loss of the difference that also pulls the better variant up, over all pairs with a better variant i.

        mean over r_i > r_j of softplus(-beta (D_i - D_j)) - weight D_i

    A difference alone can grow while the policy leaves both variants.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; large is sharp.
      weight: float32[], eta, at least 0.

    Returns:
      float32[].

    References:
      Liu et al., Provably Mitigating Overoptimization in RLHF (RPO), arXiv:2405.16436.
    """
    return _over_preferences(
        lambda better, worse: jax.nn.softplus(beta * (worse - better)) - weight * better, scores, rewards, where
    )


def hinge(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Hinge loss of the difference, over all pairs with a better variant i.

        mean over r_i > r_j of max(0, 1 - beta (D_i - D_j))

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; 1 / beta is the margin.

    Returns:
      float32[].

    References:
      Zhao et al., SLiC-HF, arXiv:2305.10425, with the margin at 1 and beta as the scale.
    """
    return _over_preferences(lambda better, worse: jax.nn.relu(1 - beta * (better - worse)), scores, rewards, where)


def ipo(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Squared distance of the difference from a margin, over all pairs with a better variant i.

        mean over r_i > r_j of (D_i - D_j - 1 / (2 beta))^2

    Unlike a logistic loss it does not push a preference that is never contradicted to infinity.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0.

    Returns:
      float32[].

    References:
      Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17.
    """
    margin = 0.5 / jnp.asarray(beta)
    return _over_preferences(lambda better, worse: jnp.square(better - worse - margin), scores, rewards, where)


def cpl(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, alpha: ArrayLike, bias: ArrayLike) -> Array:
    """Contrastive preference learning, over all pairs with a better variant i.

        mean over r_i > r_j of -log(exp(alpha D_i) / (exp(alpha D_i) + exp(bias alpha D_j)))

    Args:
      scores: float32[N]; the paper has no reference policy, whose scores are then 0.
      rewards: float32[N].
      where: bool[N].
      alpha: float32[], above 0, temperature of the regret.
      bias: float32[], lambda in (0, 1]: below 1 it weighs the worse variant less, which is conservative.

    Returns:
      float32[].

    References:
      Hejna et al., Contrastive Preference Learning, arXiv:2310.13639 (the conservative form).
    """
    return _over_preferences(
        lambda better, worse: jax.nn.softplus(alpha * (bias * worse - better)), scores, rewards, where
    )


def copg(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Contrastive policy gradient: differences of scores regressed on differences of rewards, over all pairs.

        mean over i < j of 1/2 [(r_i - r_j) - beta (D_i - D_j)]^2

    which is the group's variance (unbiased) of r - beta D. Its minimum is the optimum of the KL-regularised problem
    from whatever data, without importance weights.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N], in the unit of beta.
      where: bool[N].
      beta: float32[], above 0, strength of the KL term.

    Returns:
      float32[].

    References:
      Flet-Berliac et al., Contrastive Policy Gradient, arXiv:2406.19185.
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    rest = rewards - beta * scores
    count = jnp.sum(where, dtype=jnp.float32)
    squares = jnp.sum(jnp.where(where, jnp.square(rest - masked_mean(rest, where)), 0.0))
    return squares / jnp.maximum(count - 1, 1)


def a_star_po(
    scores: ArrayLike,
    rewards: ArrayLike,
    where: ArrayLike,
    *,
    beta: ArrayLike,
    value: ArrayLike | None = None,
) -> Array:
    """Scores regressed on the advantage under the optimal policy of the KL-regularised problem.

        mean (beta D_i - (r_i - V*))^2,    V* = beta log mean exp(r / beta) over samples of the reference policy

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N], in the unit of beta.
      where: bool[N].
      beta: float32[], above 0, strength of the KL term.
      value: float32[], V*, found beforehand; None where the reference policy drew this group, for V* of the group.

    Returns:
      float32[].

    References:
      Brantley et al., A*-PO, arXiv:2505.20686 (here one beta for both of its stages).
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    value = beta * _log_mean_exp(rewards / beta, where) if value is None else value
    return masked_mean(jnp.square(beta * scores - (rewards - value)), where)


def info_nca(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, alpha: ArrayLike, beta: ArrayLike) -> Array:
    """Cross-entropy between what the rewards and what the scores say of the whole group.

        -sum_i softmax(r / alpha)_i log softmax(beta D)_i

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      alpha: float32[], above 0, temperature of the rewards, in their unit.
      beta: float32[], above 0.

    Returns:
      float32[].

    References:
      Chen et al., Noise Contrastive Alignment, arXiv:2402.05369.
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    wanted = jnp.exp(_log_softmax(rewards / jnp.asarray(alpha), where))
    return -jnp.sum(jnp.where(where, wanted * _log_softmax(jnp.asarray(beta) * scores, where), 0.0))


def plackett_luce(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> Array:
    """Negative log-likelihood of the order by rewards, the best first (ListMLE), a variant.

        -1/n sum_i log [exp(beta D_i) / (exp(beta D_i) + sum_{r_j < r_i} exp(beta D_j))]

    Without ties it is that of Plackett and Luce, which draws each variant out of those that are left. Variants of equal
    rewards are not ordered: each of them is drawn from itself and all that are worth less, so that they do not compete,
    and a group of ties is 0. The sources leave ties open, or put them in an order, which teaches to prefer the earlier.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0.

    Returns:
      float32[].

    References:
      Xia et al., Listwise Approach to Learning to Rank (2008); for preferences, Rafailov et al., arXiv:2305.18290,
      appendix A.3.
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    logits = jnp.asarray(beta) * scores
    is_less = where[None, :] & (rewards[None, :] < rewards[:, None])
    # With the variant itself no row is empty.
    rivals = jnp.where(is_less | jnp.eye(logits.shape[0], dtype=bool), logits[None, :], _NEVER)
    losses = jax.nn.logsumexp(rivals, axis=1) - logits
    return _or_nan(masked_mean(losses, where), scores, rewards)


def pg_rank(
    scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, beta: ArrayLike, key: Array, samples: int
) -> Array:
    """Policy gradient of the expected utility of a ranking that the scores draw.

        -mean_s (M(sigma_s) - mean_{t != s} M(sigma_t)) log pi(sigma_s),    sigma_s ~ Plackett-Luce(beta D)

    M is the normalised discounted cumulative gain, with the rewards above the group's lowest as gains:

        M(sigma) = DCG(sigma) / DCG(order by rewards),    DCG(sigma) = sum_k (r_sigma(k) - min r) / log2(k + 1)

    The gradient is an unbiased estimate of that of -E[M]; the value says nothing.

    Args:
      scores: float32[N]; the paper has no reference policy, whose scores are then 0.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0; large draws the order by scores.
      key: PRNG key of the rankings, consumed.
      samples: static number of rankings, at least 2: each is the others' baseline.

    Returns:
      float32[].

    Raises:
      ValueError: there are fewer than two samples.

    References:
      Gao et al., Policy-Gradient Training of Language Models for Ranking (PG-RANK), arXiv:2310.04407.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, since each ranking is the others' baseline, got {samples}")
    scores, rewards, where = _cleared(scores, rewards, where)
    logits = jnp.asarray(beta) * scores
    gains = jnp.where(where, rewards - jnp.min(jnp.where(where, rewards, jnp.inf)), 0.0)
    discounts = 1 / jnp.log2(jnp.arange(2, gains.shape[0] + 2, dtype=jnp.float32))
    most = jnp.sum(discounts * jnp.sort(gains, descending=True))

    def ranking(key: Array) -> tuple[Array, Array]:
        # Logits with Gumbel noise come in the order that Plackett-Luce draws.
        noisy = jax.lax.stop_gradient(logits) + jax.random.gumbel(key, logits.shape)
        order = jnp.argsort(jnp.where(where, -noisy, jnp.inf))
        utility = jnp.sum(discounts * gains[order]) / jnp.where(most > 0, most, 1.0)
        return jnp.sum(_choices(logits, order, where)), utility

    log_probs, utilities = jax.vmap(ranking)(jax.random.split(key, samples))
    every = jnp.ones(samples, bool)
    return policy_gradient(log_probs, group_advantages(utilities, every, baseline="leave_one_out"), every)


def grpo(
    scores: ArrayLike,
    rewards: ArrayLike,
    where: ArrayLike,
    *,
    beta: ArrayLike,
    clip: ArrayLike,
    baseline: Literal["standardised", "mean", "leave_one_out"],
) -> Array:
    """Clipped surrogate of a ratio to the reference policy, with the group as baseline (GRPO, Dr.GRPO, RLOO).

        -mean_i min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i),    rho_i = exp(beta D_i)

    Here the reference policy is also the one that is taken to have drawn the group, and the KL term of the paper is
    that of the whole objective.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      beta: float32[], above 0: nats of log-probability that a unit of score stands for.
      clip: float32[], epsilon in (0, 1).
      baseline: A_i as of `advantages.group_advantages`: GRPO, Dr.GRPO and RLOO, in this order.

    Returns:
      float32[].

    References:
      Shao et al., GRPO, arXiv:2402.03300; Liu et al., Dr.GRPO, arXiv:2503.20783; Ahmadian et al., RLOO,
      arXiv:2402.14740.
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    advantages = group_advantages(rewards, where, baseline=baseline)
    old = jnp.zeros_like(scores)
    return clipped_surrogate(jnp.asarray(beta) * scores, advantages, where, old_log_probs=old, clip=clip)


def disco(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, tau: ArrayLike) -> Array:
    """Discriminative objective: better variants above the hardest of the worse ones.

        -mean_i [D_i - tau log mean_j exp(D_j / tau)],    i nearer in reward to the best, j to the worst

    The paper's constraint on the KL divergence is `losses.policy_kl` beside it.

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N]; the paper's are 0 or 1.
      where: bool[N].
      tau: float32[], above 0; small looks at the hardest of the worse alone.

    Returns:
      float32[]; 0 unless both kinds are there.

    References:
      Li et al., DisCO, arXiv:2505.12366.
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    positive, negative = _better_and_worse(rewards, where)
    found = tau * _log_mean_exp(scores / tau, negative) - masked_mean(scores, positive)
    return _or_nan(jnp.where(jnp.any(positive), found, 0.0), scores, rewards)


def info_nce(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike, *, tau: ArrayLike) -> Array:
    """Each better variant against the whole group (InfoNCE with several positives).

        -mean_i log(exp(D_i / tau) / sum_a exp(D_a / tau)),    i nearer in reward to the best than to the worst

    Args:
      scores: float32[N], relative to the reference policy's.
      rewards: float32[N].
      where: bool[N].
      tau: float32[], above 0; small looks at the hardest negatives alone (Wang and Liu, arXiv:2012.09740).

    Returns:
      float32[]; 0 where all are worth the same.

    References:
      Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362, Eq. 2.
    """
    scores, rewards, where = _cleared(scores, rewards, where)
    positive, _ = _better_and_worse(rewards, where)
    return _or_nan(masked_mean(-_log_softmax(scores / tau, where), positive), scores, rewards)


def _cleared(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike) -> tuple[Array, Array, Array]:
    """The same arrays, with 0 at variants that do not count: what stands there reaches neither loss nor gradient."""
    where = jnp.asarray(where)
    return jnp.where(where, scores, 0.0), jnp.where(where, jax.lax.stop_gradient(rewards), 0.0), where


def _or_nan(loss: Array, scores: Array, rewards: Array) -> Array:
    """The loss; NaN where a score or reward that counts is not finite, since comparisons would leave it out unseen."""
    return jnp.where(jnp.all(jnp.isfinite(scores) & jnp.isfinite(rewards)), loss, jnp.nan)


def _choices(logits: Array, order: Array, where: Array) -> Array:
    """Log-probability of each choice of an order, each out of what is left: float32[N] in that order.

    What does not count must come last: it weighs nothing in the sums of the others, and its own choices are 0.
    """
    valid = where[order]
    logits = jnp.where(valid, logits[order], _NEVER)
    return jnp.where(valid, logits - jax.lax.cumlogsumexp(logits, reverse=True), 0.0)


def _over_preferences(
    loss: Callable[[Array, Array], Array], scores: ArrayLike, rewards: ArrayLike, where: ArrayLike
) -> Array:
    """Mean of `loss(better score, worse score)` over the pairs of different rewards."""
    scores, rewards, where = _cleared(scores, rewards, where)
    won = where[:, None] & where[None, :] & (rewards[:, None] > rewards[None, :])
    return _or_nan(masked_mean(loss(scores[:, None], scores[None, :]), won), scores, rewards)


def _better_and_worse(rewards: Array, where: Array) -> tuple[Array, Array]:
    """Which variants are worth more than the middle between the best and the worst, and which are not.

    Neither kind is empty unless all are worth the same: then all are of the second one.
    """
    best = jnp.max(jnp.where(where, rewards, -jnp.inf))
    worst = jnp.min(jnp.where(where, rewards, jnp.inf))
    positive = where & (rewards > worst + 0.5 * (best - worst))
    return positive, where & ~positive


def _log_softmax(logits: Array, where: Array) -> Array:
    return jax.nn.log_softmax(jnp.where(where, logits, _NEVER))


def _log_mean_exp(logits: Array, where: Array) -> Array:
    """log mean exp over what counts; 0 where nothing does."""
    count = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)
    total = jax.nn.logsumexp(jnp.where(where, logits, _NEVER)) - jnp.log(count)
    return jnp.where(jnp.any(where), total, 0.0)
