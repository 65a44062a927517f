"""What a context of fixed size gives up for what it reads: whole blocks, one after the other, and for good.

A context holds some of the blocks of a stream in full and knows nothing of the others: neither gist nor map is left of
what was dropped. In one refocus step it makes M draws, each of which drops a block or nothing:

    p(b) ~ exp(-s_b / temperature),    p(nothing) ~ n exp(-mean s / temperature)

for the n blocks held. Where all scores are equal, nothing is as likely as not, and nowhere is it likelier: a policy can
hesitate, but it cannot stand still. As the temperature falls, the draw becomes the block of lowest score.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean

# Far below every logit, and still finite: a gradient through it is 0 and not NaN.
_NEVER = -1e30


def draw(
    key: Array, held: ArrayLike, scores: ArrayLike, most: ArrayLike, *, draws: int, temperature: ArrayLike
) -> tuple[Array, Array]:
    """Samples what one refocus step drops.

    Args:
      key: PRNG key, consumed.
      held: bool[N], blocks of the context.
      scores: float32[N], what they are worth; those of others are ignored.
      most: int32[], blocks that may be dropped at most, such as those that are still to be read.
      draws: static number M.
      temperature: float32[], above 0, in units of scores.

    Returns:
      What is held after it, bool[N], and the block of each draw, int32[M], N where it dropped nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lensjax.context import forgetting
      >>> held, scores = jnp.array([True, True, True, False]), jnp.array([0.5, -0.5, 0.5, -9.0])
      >>> after, dropped = forgetting.draw(jax.random.key(0), held, scores, 1, draws=2, temperature=1e-3)
      >>> after.tolist(), dropped.tolist()
      ([True, False, True, False], [1, 4])
    """
    values = jnp.asarray(scores) / temperature

    def one(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        held, left = carry
        block = jax.random.categorical(key, _logits(held, values, left)).astype(jnp.int32)
        return _dropped(held, left, block), block

    start = jnp.asarray(held), jnp.asarray(most, jnp.int32)
    (after, _), dropped = jax.lax.scan(one, start, jax.random.split(key, draws))
    return after, dropped


def lowest(held: ArrayLike, scores: ArrayLike, most: ArrayLike, *, draws: int) -> tuple[Array, Array]:
    """Drops the blocks of lowest score, as many as it may: the first of equals first. As `draw` without a draw.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.context import forgetting
      >>> held, scores = jnp.array([True, True, True, False]), jnp.array([0.5, 0.25, 0.75, -9.0])
      >>> after, dropped = forgetting.lowest(held, scores, 1, draws=2)
      >>> after.tolist(), dropped.tolist()
      ([True, False, True, False], [1, 4])
    """
    held = jnp.asarray(held)
    none = held.shape[0]
    order = jnp.argsort(jnp.where(held, jnp.asarray(scores), jnp.inf))[:draws].astype(jnp.int32)
    is_dropped = (jnp.arange(draws) < jnp.minimum(most, jnp.sum(held, dtype=jnp.int32)))[: order.shape[0]]
    dropped = jnp.pad(jnp.where(is_dropped, order, none), (0, draws - order.shape[0]), constant_values=none)
    return held.at[dropped].set(False, mode="drop"), dropped


def log_prob(
    dropped: ArrayLike, held: ArrayLike, scores: ArrayLike, most: ArrayLike, *, temperature: ArrayLike
) -> tuple[Array, Array]:
    """How probable a policy finds what one refocus step dropped; differentiable in the scores.

    Args:
      dropped: int32[M], by this policy or another one.
      held: bool[N], before the step.
      scores: float32[N], the policy's.
      most: int32[], as for `draw`.
      temperature: float32[], above 0.

    Returns:
      Log-probability float32[], and the entropy in nats of the draws on the way that was taken, float32[].
    """
    values = jnp.asarray(scores) / temperature

    def one(carry: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        held, left = carry
        log_probs = jax.nn.log_softmax(_logits(held, values, left))
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs)
        return _dropped(held, left, block), (log_probs[block], entropy)

    start = jnp.asarray(held), jnp.asarray(most, jnp.int32)
    _, (log_probs, entropies) = jax.lax.scan(one, start, jnp.asarray(dropped))
    return jnp.sum(log_probs), jnp.sum(entropies)


def _dropped(held: Array, left: Array, block: Array) -> tuple[Array, Array]:
    """What is held, and how many more may be dropped, after one draw."""
    return held.at[block].set(False, mode="drop"), left - (block < held.shape[0]).astype(jnp.int32)


def _logits(held: Array, values: Array, left: Array) -> Array:
    """float32[N + 1]: of dropping each block, and of dropping nothing."""
    count = jnp.maximum(jnp.sum(held, dtype=jnp.float32), 1)
    nothing = jnp.log(count) - masked_mean(values, held)
    return jnp.append(jnp.where(held & (left > 0), -values, _NEVER), nothing)
