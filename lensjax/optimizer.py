"""The optimizer of every trainer: AdamW with norm clipping, its rate and decay passed in as arrays.

Each trainable part (base, gist, lens) has its own state and is clipped by its own norm: with one norm for all, a large
gradient of the token loss would shrink LensNet's steps.
"""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from lensjax.config import OptimizerConfig


def init(config: OptimizerConfig, parts: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state of the trainable parts; it does not depend on rate or decay."""
    transformation = _transformation(config, 0.0, 0.0)
    return {name: transformation.init(params) for name, params in parts.items()}


def update(
    config: OptimizerConfig,
    grads: dict[str, Any],
    opt_state: dict[str, Any],
    parts: dict[str, Any],
    *,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One step.

    Args:
      config: moments and clipping.
      grads: gradients of each part.
      opt_state: from `init` or the step before.
      parts: parameters of each trainable part.
      learning_rate: float32[], may be traced.
      weight_decay: float32[], applied to matrices only; may be traced.

    Returns:
      The new parameters and the new optimizer state.
    """
    transformation = _transformation(config, learning_rate, weight_decay)
    params, state = {}, {}
    # optax raises a float decay to an integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        for name, part in parts.items():
            updates, state[name] = transformation.update(grads[name], opt_state[name], part)
            params[name] = optax.apply_updates(part, updates)
    return params, state


def _transformation(
    config: OptimizerConfig, learning_rate: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
