"""The optimizer of every trainer: AdamW or Muon with norm clipping, its rate and decay passed in as arrays.

Each trainable part (base, gist, lens) has its own state and is clipped by its own norm: with one norm for all, a large
gradient of the token loss would shrink LensNet's steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike

from lensjax._settings import Count, NonNegative, Positive, settings

B1, B2 = 0.9, 0.99
"""Decays of Adam's moments."""
SLOW_DECAY = 0.98
"""Decay of the moving average that Grokfast amplifies (its alpha)."""


@settings("optimizer")
class OptimizerConfig:
    """How gradients become steps; the learning rate and the weight decay are hyperparameters.

    Example:
      >>> import lensjax as lx
      >>> lx.OptimizerConfig(warmup_steps=-1)
      Traceback (most recent call last):
      ValueError: optimizer.warmup_steps must be at least 0, got -1
    """

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the matrices inside the transformers; all else stays with AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Count = 20
    curriculum_steps: Count | None = None
    """Steps over which the context length anneals; None: half of the run."""
    clip_norm: Positive = 1.0
    """Longest gradient of a part; a large number, such as 1e9, clips none."""
    grokfast: NonNegative = 0.0
    """What the slow part of the gradients is amplified by (lambda of Grokfast); 0 leaves it out."""


def make_optimizer(
    config: OptimizerConfig,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a configuration, over a dict of parts such as `{"lens": params}`.

    Each part has its own state and is clipped by its own norm. Learning rate and weight decay are data of the state
    (`optax.inject_hyperparams`): `set_rates` changes them, and one `vmap` runs many.

    Args:
      config: which optimizer, its moments, and clipping.
      learning_rate: until `set_rates` says otherwise.
      weight_decay: applied to matrices only; likewise.
      multipliers: learning rates of parts in those of the others, by part.

    Returns:
      An optax transformation. Its `init` raises ValueError where the config says Muon and no part has a matrix for it.

    Example:
      >>> import jax.numpy as jnp, lensjax as lx
      >>> tx = lx.make_optimizer(lx.OptimizerConfig(), learning_rate=0.5)
      >>> state = tx.init({"lens": {"w": jnp.ones(2)}})
      >>> float(state.hyperparams["learning_rate"])
      0.5
    """

    def make(learning_rate: ArrayLike, weight_decay: ArrayLike) -> optax.GradientTransformation:
        def of_part(name: str) -> optax.GradientTransformation:
            rate = learning_rate * multipliers[name] if multipliers and name in multipliers else learning_rate
            return _transformation(config, rate, weight_decay)

        return _each_part(of_part)

    injected = optax.inject_hyperparams(make)(learning_rate=learning_rate, weight_decay=weight_decay)

    def init(parts: dict[str, Any]) -> Any:
        labels = jax.tree.leaves({name: _labels(params) for name, params in parts.items()})
        if config.name == "muon" and "muon" not in labels:
            raise ValueError(
                "optimizer.name is muon, which is for the matrices of a transformer, and "
                f"{', '.join(parts)} has none: use adamw"
            )
        return injected.init(parts)

    return optax.GradientTransformation(init, injected.update)


def set_rates(opt_state: Any, **rates: ArrayLike) -> Any:
    """Sets injected hyperparameters of an optimizer's state; a state that has none of that name stays as it is."""
    if not hasattr(opt_state, "hyperparams"):
        return opt_state
    named = {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items() if name in opt_state.hyperparams}
    return opt_state._replace(hyperparams={**opt_state.hyperparams, **named})


def _each_part(of_part: Callable[[str], optax.GradientTransformation]) -> optax.GradientTransformation:
    """A transformation of each part by itself."""

    def init(parts: dict[str, Any]) -> dict[str, Any]:
        return {name: of_part(name).init(params) for name, params in parts.items()}

    def update(
        grads: dict[str, Any], state: dict[str, Any], parts: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        updates, after = {}, {}
        for name, grad in grads.items():
            updates[name], after[name] = of_part(name).update(grad, state[name], None if parts is None else parts[name])
        return updates, after

    return optax.GradientTransformation(init, update)


def _transformation(
    config: OptimizerConfig, learning_rate: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(B1, B2)
    # First, so that what is amplified is clipped with the rest.
    slow = () if config.grokfast == 0 else (_amplify_slow(config.grokfast, SLOW_DECAY),)
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
