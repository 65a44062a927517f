"""Terms that keep the policy's demands balanced and steady, each over the entries of one variant."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

EPS = 1e-6


def budget_balance(scores: ArrayLike, spans: ArrayLike, where: ArrayLike) -> Array:
    """Net demand for detail of one variant.

        (E - C) / (E + C + eps),    E = sum_j span_j relu(s_j),    C = sum_j span_j relu(-s_j)

    Args:
      scores: float32[W], policy scores.
      spans: float32[W], tokens that each entry covers.
      where: bool[W], entries that count: valid and outside the protected tail.

    Returns:
      float32[] in (-1, 1); positive asks for more detail than it gives back, 0 where nothing counts.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, spans, every = jnp.array([0.5, -0.25]), jnp.array([1.0, 8.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.budget_balance(scores, spans, every):.3f}")  # (0.5 - 2) / (0.5 + 2)
      -0.600
    """
    scores, spans = (jnp.where(jnp.asarray(where), jnp.asarray(x), 0.0) for x in (scores, spans))
    expand = jnp.sum(spans * jax.nn.relu(scores))
    collapse = jnp.sum(spans * jax.nn.relu(-scores))
    return (expand - collapse) / (expand + collapse + EPS)


def budget_loss(scores: ArrayLike, spans: ArrayLike, where: ArrayLike) -> Array:
    """Squared `budget_balance` of the same arguments: what is expanded must be paid for; float32[].

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, spans, every = jnp.array([0.5, -0.25]), jnp.array([1.0, 8.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.budget_loss(scores, spans, every):.3f}")
      0.360
    """
    return budget_balance(scores, spans, where) ** 2


def budget_smoothing_loss(scores: ArrayLike, spans: ArrayLike, where: ArrayLike, *, average: ArrayLike) -> Array:
    """Squared deviation of `budget_balance` from its moving average over steps.

    Args:
      scores: float32[W], policy scores.
      spans: float32[W], tokens that each entry covers.
      where: bool[W], entries that count.
      average: float32[], the moving average; no gradient flows into it.

    Returns:
      float32[].

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> scores, spans, every = jnp.array([0.5, -0.25]), jnp.array([1.0, 8.0]), jnp.ones(2, bool)
      >>> print(f"{lx.losses.budget_smoothing_loss(scores, spans, every, average=-0.5):.3f}")
      0.010
    """
    deviation = budget_balance(scores, spans, where) - jax.lax.stop_gradient(jnp.asarray(average))
    return jnp.where(jnp.any(jnp.asarray(where)), deviation**2, 0.0)


def policy_kl(scores: ArrayLike, anchor_scores: ArrayLike, where: ArrayLike, *, temperature: ArrayLike) -> Array:
    """Symmetric KL divergence between two policies on the same entries, mean over entries.

    Each entry is a Bernoulli choice with p = sigmoid(s / temperature); with logits x and y the symmetric divergence
    KL(p||q) + KL(q||p) is (p - q) (x - y), halved here to the mean of the two directions.

    Args:
      scores: float32[W], the current policy.
      anchor_scores: float32[W], the anchor policy on the same entries; no gradient flows into it.
      where: bool[W], entries that count.
      temperature: float32[], above 0.

    Returns:
      float32[], in nats, at least 0.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> every = jnp.ones(2, bool)
      >>> kl = lx.losses.policy_kl(jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0]), every, temperature=1.0)
      >>> print(f"{kl:.3f}")
      0.058
    """
    where = jnp.asarray(where)
    logits = jnp.where(where, jnp.asarray(scores), 0.0) / temperature
    anchor = jax.lax.stop_gradient(jnp.where(where, jnp.asarray(anchor_scores), 0.0) / temperature)
    divergence = 0.5 * (jax.nn.sigmoid(logits) - jax.nn.sigmoid(anchor)) * (logits - anchor)
    return jnp.sum(jnp.where(where, divergence, 0.0)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)
