"""What all objectives over variants do to scores and rewards: masks, and sums in logarithms."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# Far below every logit, and still finite: a gradient through it is 0 and not NaN.
NEVER = -1e30


def cleared(scores: ArrayLike, rewards: ArrayLike, where: ArrayLike) -> tuple[Array, Array, Array]:
    """The same arrays, with 0 at variants that do not count: what stands there reaches neither loss nor gradient."""
    where = jnp.asarray(where)
    return jnp.where(where, scores, 0.0), jnp.where(where, jax.lax.stop_gradient(rewards), 0.0), where


def or_nan(loss: Array, scores: Array, rewards: Array) -> Array:
    """The loss; NaN where a score or reward that counts is not finite, since comparisons would leave it out unseen."""
    return jnp.where(jnp.all(jnp.isfinite(scores) & jnp.isfinite(rewards)), loss, jnp.nan)


def log_softmax(logits: Array, where: Array) -> Array:
    """Log-probabilities among what counts."""
    return jax.nn.log_softmax(jnp.where(where, logits, NEVER))


def log_mean_exp(logits: Array, where: Array) -> Array:
    """The logarithm of the mean exponential of what counts; 0 where nothing does."""
    count = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)
    total = jax.nn.logsumexp(jnp.where(where, logits, NEVER)) - jnp.log(count)
    return jnp.where(jnp.any(where), total, 0.0)
