"""The optimizer of every trainer: AdamW or Muon with norm clipping, its rate and decay passed in as arrays.

Each trainable part (base, gist, lens) has its own state and is clipped by its own norm: with one norm for all, a large
gradient of the token loss would shrink LensNet's steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike

from lensjax.runs.config import OptimizerConfig


def init(config: OptimizerConfig, parts: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state of the trainable parts; it does not depend on rate or decay.

    Raises:
      ValueError: the config says Muon, and no part has a matrix for it.
    """
    labels = jax.tree.leaves({name: _labels(params) for name, params in parts.items()})
    if config.name == "muon" and "muon" not in labels:
        raise ValueError(
            "optimizer.name is muon, which is for the matrices of a transformer, and "
            f"{', '.join(parts)} has none: use adamw"
        )
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
      config: which optimizer, its moments, and clipping.
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
    adam = optax.scale_by_adam(config.b1, config.b2)
    # First, so that what is amplified is clipped with the rest.
    slow = () if config.grokfast == 0 else (_amplify_slow(config.grokfast, config.grokfast_decay),)
    return optax.chain(
        *slow,
        optax.clip_by_global_norm(config.clip_norm),
        adam if config.name == "adamw" else optax.partition({"muon": _muon(), "adam": adam}, _labels),
        optax.add_decayed_weights(weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _muon() -> optax.GradientTransformation:
    """Momentum of 0.95 and five Newton-Schulz steps, as Muon was published.

    References:
      Jordan, Muon: An optimizer for hidden layers in neural networks, 2024; Liu et al., Muon is Scalable for LLM
      Training, arXiv:2502.16982, for the scale.
    """

    def numbers(updates: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)

    return optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
        # To a root mean square of 0.2, which is about that of Adam's updates: one learning rate then serves both.
        optax.stateless_with_tree_map(lambda update, _: 0.2 * max(update.shape) ** 0.5 * update),
    )


def _labels(params: Any) -> Any:
    """Muon for the matrices inside a `transformer`, Adam for the rest, by the path of a leaf.

    Its shape, by which `optax.contrib.muon` chooses, does not tell them apart: embeddings, heads and a convolution's
    taps have two axes too, and their updates should not be orthogonal. What enters and leaves the stack is Adam's, as
    Muon's author advises.
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return "muon" if "transformer" in names and leaf.ndim == 2 else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _amplify_slow(strength: float, decay: float) -> optax.GradientTransformation:
    """Grokfast: m = decay m + (1 - decay) g, and g + strength m goes on.

    The average starts at 0, not at the first gradient as in the authors' code: one batch is not the slow part.

    References:
      Lee et al., Grokfast, arXiv:2405.20233 (Grokfast-EMA).
    """

    def update(grads: Any, slow: Any, params: Any = None) -> tuple[Any, Any]:
        slow = jax.tree.map(lambda mean, grad: decay * mean + (1 - decay) * grad, slow, grads)
        return jax.tree.map(lambda grad, mean: grad + strength * mean, grads, slow), slow

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
