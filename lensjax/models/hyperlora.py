"""HyperLoRA: weights adapted per task by low-rank deltas, which a hypernetwork predicts from the task's examples.

What is here is pure: contexts, deltas and their sizes, and two losses. The hypernetwork is
`lensjax.models.HyperLoRAModel`. Whose weights are adapted does not matter: `mix` goes behind the output of any layer,
`adapt` changes the matrices of any parameter dict. Functions are for one task; `jax.vmap` them.

Letters: N examples of a task, D width of their features, r rank of a delta.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax._settings import Count, NonNegative, Positive, Width, settings


@settings("hyperlora")
class HyperLoRAConfig:
    """The hypernetwork, how large its deltas may be, and what its losses weigh."""

    rank: Width = 8
    scaling: Positive = 1.0
    """delta W = scaling A B."""
    init: Literal["norm", "std"] = "norm"
    """What `init_scale` means for fresh parameters: the Frobenius norm of delta W, or the standard deviation of the
    last layers' weights, with which the norm grows with the width (212 at 0.1 and width 256)."""
    init_scale: Positive = 0.1
    max_norm: Positive | None = 1.0
    """The largest Frobenius norm of delta W, in norms of an identity of its size; None for no limit."""
    learning_rate_multiplier: Positive = 1.0
    """The hypernetwork's learning rate, in those of the model that it adapts."""
    loo_weight: NonNegative = 0.1
    loo_start: Count = 0
    """Step from which the leave-one-out loss counts."""
    equivariance_weight: NonNegative = 0.02
    equivariance_start: Count = 0
    """Step from which the equivariance loss counts."""


PRESETS = {
    "rlan_stable": HyperLoRAConfig(
        init="std", max_norm=None, learning_rate_multiplier=10.0, loo_weight=0.5, equivariance_weight=0.1
    ),
    "rlan_stable_safe": HyperLoRAConfig(loo_weight=0.2, equivariance_weight=0.02, equivariance_start=300),
}
"""`rlan_stable` has the published defaults, with which deltas start far larger than the weights they change, and can
collapse; `rlan_stable_safe` is what proved safer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Delta:
    """delta W = a b, of rank r; scaling and limit are in the factors."""

    a: Array
    """float32[in, r]."""
    b: Array
    """float32[r, out]."""


Deltas = dict[str, Delta]
"""By the name of the target."""


def mix(outputs: ArrayLike, delta: Delta) -> Array:
    """Mixes the channels of a layer's output.

        y + y delta W

    Args:
      outputs: float32[..., D].
      delta: in = out = D.

    Returns:
      float32[..., D].
    """
    outputs = jnp.asarray(outputs)
    return outputs + outputs @ delta.a @ delta.b


def adapt(params: Mapping[str, Any], deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """Adds deltas to the matrices of any parameter dict.

        W + delta W

    Args:
      params: nested dict; the leaf that a target names is float[in, out], and stays of its type.
      deltas: by path, such as "head/kernel".

    Returns:
      Parameters of the same structure; what no delta names is the same array.

    Raises:
      ValueError: a path leads to no matrix of the delta's size.
    """
    adapted = dict(params)
    for path, delta in deltas.items():
        head, _, rest = path.partition("/")
        child, shape = adapted.get(head), (delta.a.shape[0], delta.b.shape[1])
        if rest and isinstance(child, Mapping):
            adapted[head] = adapt(child, {rest: delta})
        elif not rest and isinstance(child, Array) and child.shape == shape:
            adapted[head] = child + (delta.a @ delta.b).astype(child.dtype)
        else:
            raise ValueError(f"target {path} must lead to a matrix {list(shape)}; there are: {', '.join(adapted)}")
    return adapted


def mean_context(features: ArrayLike, valid: ArrayLike) -> Array:
    """Mean of the valid examples' features, 0 without any.

    Args:
      features: float32[N, D].
      valid: bool[N], False at padding, whose content is ignored.

    Returns:
      float32[D].
    """
    features, valid = jnp.asarray(features), jnp.asarray(valid)
    total = jnp.sum(jnp.where(valid[:, None], features, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)


def leave_one_out_contexts(features: ArrayLike, valid: ArrayLike) -> tuple[Array, Array]:
    """For each example, the mean of all others: what is known of a task when that one is held out.

        context_i = sum over valid j != i of p_j / (n - 1)

    Each sum leaves its example out, instead of subtracting it from the whole, where its rounding would stay behind:
    nothing of example i reaches context i, to the bit.

    Args:
      features: float32[N, D].
      valid: bool[N], False at padding, whose content is ignored.

    Returns:
      float32[N, D], and bool[N]: which of them are to be solved, the valid ones where there are at least two.
    """
    features, valid = jnp.asarray(features), jnp.asarray(valid)
    others = valid[None, :] & ~jnp.eye(valid.shape[0], dtype=bool)
    return jax.vmap(mean_context, in_axes=(None, 0))(features, others), valid & jnp.any(others, axis=1)


def leave_one_out_loss(losses: ArrayLike, held_out: ArrayLike) -> Array:
    """Mean loss of the held-out examples, each solved from the others; 0 where none can be held out.

    Args:
      losses: float32[N], of example i with the deltas of context i.
      held_out: bool[N], of `leave_one_out_contexts`.

    Returns:
      float32[].
    """
    return masked_mean(losses, held_out)


def equivariance_loss(
    deltas: Deltas, transformed: Deltas, *, magnitude_weight: float = 0.3, direction_weight: float = 0.7
) -> Array:
    """Asks the deltas of a transformed task to be those of the task.

        mean over targets of magnitude_weight (|a| - |b|)^2 + direction_weight (1 - cos(a, b))

    with a the task's delta W, which gets no gradient, and b that of the transformed one. Right only for rules that
    commute with the transform; for others see `output_equivariance_loss`. The transform is one of the task's grids,
    encoded again: features that are transformed and then averaged would be equal whatever is learned.

    Args:
      deltas: of the task.
      transformed: of the task with all examples transformed.
      magnitude_weight: of the norms' squared difference.
      direction_weight: of the angle; 0 counts as orthogonal to everything.

    Returns:
      float32[].
    """
    terms = []
    for name, delta in jax.lax.stop_gradient(deltas).items():
        other = transformed[name]
        sizes = norm(delta), norm(other)
        product = sizes[0] * sizes[1]
        cosine = jnp.where(product > 0, inner(delta, other) / jnp.where(product > 0, product, 1.0), 0.0)
        terms.append(magnitude_weight * (sizes[0] - sizes[1]) ** 2 + direction_weight * (1 - cosine))
    return jnp.mean(jnp.stack(terms))


def output_equivariance_loss(logits: ArrayLike, mapped: ArrayLike, where: ArrayLike) -> Array:
    """Asks the prediction for a transformed task, mapped back, to be that for the task: right for every rule.

        mean over cells of KL(p || q)

    Args:
      logits: float32[..., C], of p, the task's prediction, which gets no gradient.
      mapped: float32[..., C], of q, after the inverse transform.
      where: bool[...], cells that count.

    Returns:
      float32[], 0 where none counts.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(jnp.asarray(logits)))
    log_q = jax.nn.log_softmax(jnp.asarray(mapped))
    return masked_mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), where)


def inner(first: Delta, second: Delta) -> Array:
    """Frobenius inner product of two delta W, from products of size r x r; float32[]."""
    return jnp.sum((first.a.T @ second.a) * (first.b @ second.b.T))


def norm(delta: Delta) -> Array:
    """Frobenius norm of delta W; float32[]. Its gradient at 0 is 0."""
    square = inner(delta, delta)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def zeroed(deltas: Deltas) -> Deltas:
    """Deltas of the same shapes that change nothing."""
    return {name: Delta(jnp.zeros_like(delta.a), delta.b) for name, delta in deltas.items()}


def clamp(delta: Delta, max_norm: ArrayLike) -> Delta:
    """Shrinks a delta whose norm is above the limit down to it.

    Args:
      delta: of any size.
      max_norm: float32[], in norms of an identity of its size: sqrt(min(in, out)).

    Returns:
      The delta, or one of the same direction.
    """
    limit = jnp.asarray(max_norm, jnp.float32) * math.sqrt(min(delta.a.shape[0], delta.b.shape[1]))
    return Delta(delta.a * (limit / jnp.maximum(norm(delta), limit)), delta.b)


def difference_norm(deltas: Deltas, others: Deltas) -> Array:
    """Frobenius norm of the difference of two tasks' delta W, mean over targets; float32[]."""

    def stacked(name: str) -> Delta:
        ours, theirs = deltas[name], others[name]
        return Delta(jnp.concatenate([ours.a, -theirs.a], axis=1), jnp.concatenate([ours.b, theirs.b]))

    return jnp.mean(jnp.stack([norm(stacked(name)) for name in deltas]))


def magnitudes(deltas: Deltas) -> dict[str, Array]:
    """Mean norm of delta W over a batch of tasks.

    Args:
      deltas: of B tasks: a is float32[B, in, r], b is float32[B, r, out].

    Returns:
      `lora_magnitude_<target>`.
    """
    return {f"lora_magnitude_{name}": jnp.mean(jax.vmap(norm)(delta)) for name, delta in deltas.items()}


def diversity(deltas: Deltas) -> Array:
    """How far the deltas of a batch's tasks are from their mean: 0 says that nothing is adapted to the task.

        mean over targets of sqrt(mean over tasks of ||delta W - mean delta W||^2)

    Args:
      deltas: of B tasks: a is float32[B, in, r], b is float32[B, r, out].

    Returns:
      float32[].
    """
    spreads = []
    for delta in deltas.values():
        weights = delta.a @ delta.b
        spreads.append(jnp.sqrt(jnp.mean(jnp.sum((weights - jnp.mean(weights, axis=0, keepdims=True)) ** 2, (1, 2)))))
    return jnp.mean(jnp.stack(spreads))
