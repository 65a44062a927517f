"""The optimizer of every trainer: AdamW with global-norm clipping, its rate and decay passed in as arrays."""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from lensjax.config import OptimizerConfig


def init(config: OptimizerConfig, params: Any) -> Any:
    """Optimizer state for a tree of trainable parameters; it does not depend on rate or decay."""
    return _transformation(config, 0.0, 0.0).init(params)


def update(
    config: OptimizerConfig,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike,
) -> tuple[Any, Any]:
    """One step.

    Args:
      config: moments and clipping.
      grads: gradients, a tree like `params`.
      opt_state: from `init` or the step before.
      params: trainable parameters.
      learning_rate: float32[], may be traced.
      weight_decay: float32[], applied to matrices only; may be traced.

    Returns:
      The new parameters and the new optimizer state.
    """
    # optax raises a float decay to an integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        transformation = _transformation(config, learning_rate, weight_decay)
        updates, opt_state = transformation.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


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
