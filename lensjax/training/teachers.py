"""Teachers: what each token of a history is worth in full, said by someone who has read the horizon.

Targets may know the horizon; what LensNet reads never does. A teacher gives float32[C] for one window, and
`nodes.pool_tokens` makes of it the worth of every node that can be collapsed.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Count, Positive, Repeats, settings
from lensjax.context import nodes
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.models import AttentiveLanguageModel, LanguageModel, Params
from lensjax.models.attention import attention_paid
from lensjax.models.decision import Window
from lensjax.models.functional import checked
from lensjax.training import nll


@settings("distill")
class DistillConfig:
    """LensNet's first stage: it learns what a teacher in hindsight knows.

    Example:
      >>> from lensjax.training.teachers import DistillConfig
      >>> DistillConfig(temperature=0.0)
      Traceback (most recent call last):
      ValueError: distill.temperature must be above 0, got 0.0
    """

    steps: Count = 0
    """Training steps on what the teacher says; 0 leaves them out."""
    teacher: Literal["attention", "gradient"] = "attention"
    """What the horizon attends to, or what the gradient of its loss says of each block."""
    temperature: Positive = 0.5
    """Scores before tanh, divided by it, are the logits of what deserves detail."""
    looks: Repeats = 1
    """Looks of its own at which LensNet is taught, the cold start first; later ones may undo what these have chosen."""
    sharpness: Positive = 1.0
    """Power of the teacher's worths: above 1 what little attention every block gets counts for less."""
    learning_rate: Positive = 1e-3


def worth(
    base: LanguageModel,
    params: Params,
    window: Window,
    geometry: Geometry,
    *,
    teacher: Literal["attention", "gradient"],
    weights: ArrayLike | None = None,
) -> Array:
    """What each token of a history is worth in full, by the teacher that is named.

    Args:
      base: the base model.
      params: its parameters.
      window: history and horizon.
      geometry: the history.
      teacher: as in `DistillConfig`.
      weights: float32[H] of sum 1, how much each token of the horizon counts; None for all alike.

    Returns:
      float32[C], in the unit of `future_attention` or of `gate_gradients`.

    Raises:
      ValueError: the teacher is attention, and the base model shows none; or a shape does not fit.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> from lensjax.models.decision import split
      >>> from lensjax.training import teachers
      >>> window, geometry = split(jnp.arange(9), horizon=1), lx.Geometry(8, 2, 1, recent_tokens=2)
      >>> teachers.worth(object(), {}, window, geometry, teacher="attention")
      Traceback (most recent call last):
      ValueError: distill.teacher is attention, which the base model must show by a method `attention`, and object has
      none: set distill.teacher to gradient
    """
    if teacher == "gradient":
        return gate_gradients(base, params, window, geometry, weights=weights)
    if not isinstance(base, AttentiveLanguageModel):
        raise ValueError(
            "distill.teacher is attention, which the base model must show by a method `attention`, and "
            f"{type(base).__name__} has none: set distill.teacher to gradient"
        )
    return future_attention(base, params, window, weights=weights)


def future_attention(
    base: AttentiveLanguageModel,
    params: Params,
    window: Window,
    *,
    weights: ArrayLike | None = None,
    heads: Literal["mean", "max"] = "max",
) -> Array:
    """What the horizon will look at: attention, in full, of the rows that predict it.

        worth_i = sum_t w_t  max over layers and heads of attention(t - 1, i)        t in [C, C + H), i < C

    Not the mean over layers and heads, unless asked for: most look everywhere, and the one that does not says where.

    Args:
      base: the base model.
      params: its parameters.
      window: history and horizon.
      weights: float32[H] of sum 1, how much each token of the horizon counts, say key tokens alone; None for all alike.
      heads: what is taken over layers and heads.

    Returns:
      float32[C], in [0, 1].

    Raises:
      ValueError: there is not one weight for each token of the horizon.

    References:
      Li et al., SnapKV, arXiv:2404.14469, section 4, with what comes after the history in place of its end.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.models.decision import split
      >>> from lensjax.training.teachers import future_attention
      >>> config = lx.BaseConfig(dim=16, heads=2, layers=1)
      >>> base = lx.build_models(config, lx.GistConfig(), lx.LensConfig(), block_size=2, max_lod=1).base
      >>> look = jax.jit(lambda params, tokens: future_attention(base, params, split(tokens, horizon=2)))
      >>> found = look(base.init(jax.random.key(0)), jnp.arange(8))
      >>> found.shape, bool(found.max() <= 1)
      ((6,), True)
    """
    count = window.history.shape[0]
    full = contexts.in_full(base.embed(params, window.history), jnp.arange(count))
    # The reading of `key_tokens.token_gain`: compiled together with it, the layers are computed once.
    read = nll.reading(base, params, full, window.horizon)
    paid, _ = attention_paid(base, params, read.entries, read.rows, heads=heads)
    return jnp.sum(_weights(weights, window)[:, None] * paid, axis=0)[:count]


def gate_gradients(
    base: LanguageModel,
    params: Params,
    window: Window,
    geometry: Geometry,
    *,
    weights: ArrayLike | None = None,
    points: int = 4,
) -> Array:
    """What the horizon's loss says of a gate on each block that may be collapsed, integrated from shut to open.

        worth_b = - integral over a from 0 to 1 of  d nll(g) / d g_b  at g = (a, ..., a)
        x_i(g)  = m + g_b (x_i - m)     for each token i of block b, with m the mean embedding of the history

    At open gates alone a model with RMSNorm hides a block whose embeddings point away from m: it does not see how long
    they are. Integrated, the worths of all blocks sum to the loss with every gate shut minus that in full.

    Args:
      base: the base model, of which `embed` and `logits` are called.
      params: its parameters.
      window: history and horizon.
      geometry: the history.
      weights: float32[H] of sum 1, how much each token of the horizon counts; None for all alike.
      points: static number of values of the gates, by the midpoint rule: each costs one forward and one backward pass.

    Returns:
      float32[C], at each token the worth of its block in nats per token of the horizon, so that pooling gives it back;
      0 outside of the blocks. Negative where a block does harm.

    Raises:
      ValueError: a shape does not fit, or there is no point.

    References:
      Sundararajan et al., Axiomatic Attribution for Deep Networks, arXiv:1703.01365, section 3, from the mean
      embedding as the baseline; their sum, which takes right ends, is here one over midpoints.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.models.decision import Window
      >>> from lensjax.training.teachers import gate_gradients
      >>> class SaysTheThird:  # whatever token 2 of the history is comes next
      ...     def embed(self, params, tokens):
      ...         return jax.nn.one_hot(tokens, 4)
      ...     def logits(self, params, entries, rows):
      ...         return jnp.tile(5 * entries.embeddings[2], (len(rows), 1))
      >>> window = Window(history=jnp.array([0, 1, 3, 2, 1, 0]), horizon=jnp.array([3, 3]))
      >>> geometry = lx.Geometry(history=6, block_size=2, max_lod=1, recent_tokens=2)
      >>> (gate_gradients(SaysTheThird(), {}, window, geometry) > 0).tolist()
      [False, False, True, True, False, False]
    """
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    history = checked("window.history", window.history, geometry.history)
    counts = _weights(weights, window)
    embeddings = base.embed(params, history)
    mean = embeddings.mean(axis=0, keepdims=True)

    def loss(gates: Array) -> Array:
        gate = 1 + nodes.of_blocks(gates - 1, geometry)
        shown = contexts.in_full(mean + gate[:, None] * (embeddings - mean), jnp.arange(geometry.history))
        return jnp.sum(counts * nll.token_nll(base, params, shown, window.horizon))

    def gradient(opening: Array) -> Array:
        return jax.grad(loss)(jnp.full(geometry.blocks(1), opening))

    openings = (jnp.arange(points, dtype=jnp.float32) + 0.5) / points
    # One after the other: as much memory as one pass.
    return nodes.of_blocks(-jax.lax.map(gradient, openings).mean(axis=0), geometry)


def _weights(weights: ArrayLike | None, window: Window) -> Array:
    count = window.horizon.shape[0]
    return jnp.full(count, 1 / count, jnp.float32) if weights is None else checked("weights", weights, count)
