"""What a policy may look at, and the context it makes of that: the one way from a history to a decision.

A window of T tokens has a **cursor** at C: the history [0, C) before it, the horizon [C, T) behind it. Policies see the
tree over the history and nothing else; the horizon's tokens are read afterwards, and score what was decided. Training,
evaluation, sweeps, episodes and sessions all decide by the functions of this file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import allocator
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.tree import TreeState
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Models, Params
from lensjax.runs.config import Config


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """A window of tokens, cut at the cursor; leading axes are those of the tokens."""

    history: Array
    """int32[C]: what policies choose from."""
    horizon: Array
    """int32[H]: what their choice is scored on; nothing that decides may depend on it."""


def split(tokens: ArrayLike, *, horizon: int) -> Window:
    """Cuts a window at its cursor.

    Args:
      tokens: int32[..., T].
      horizon: tokens behind the cursor H, from 1 to T - 1.

    Returns:
      `Window`.

    Raises:
      ValueError: the horizon leaves no history, or is empty.
    """
    tokens = jnp.asarray(tokens)
    count = tokens.shape[-1]
    if not 1 <= horizon < count:
        raise ValueError(f"horizon must be at least 1 and leave a history of the {count} tokens, got {horizon}")
    return Window(tokens[..., : count - horizon], tokens[..., count - horizon :])


def build_tree(models: Models, params: dict[str, Params], history: ArrayLike, config: Config) -> TreeState:
    """The tree over one history int32[C], with gists of the models given.

    Raises:
      ValueError: the tokens are not a history of `config.context`: a whole window, say.
    """
    history, shape = jnp.asarray(history), config.context
    if history.shape != (shape.history,):
        raise ValueError(
            f"a policy sees the {shape.history} tokens before the cursor and no other (context.window "
            f"{shape.window} - context.horizon {shape.horizon}): pass split(tokens).history, got {history.shape}"
        )
    return trees.build(
        models.base.embed(params["base"], history),
        lambda children: models.gist.apply(params["gist"], children),
        block_size=shape.block_size,
        max_lod=shape.max_lod,
    )


def policy_scores(models: Models, lens_params: Params, entries: Entries) -> Array:
    """LensNet's scores of a batch of working contexts; no gradient reaches the entries.

    Args:
      models: the models.
      lens_params: parameters of LensNet.
      entries: leading axes [...], then W.

    Returns:
      float32[..., W] in (-1, 1), 0 at padding.
    """

    def score(one: Entries) -> Array:
        return models.lens.apply(lens_params, one)

    for _ in range(entries.valid.ndim - 1):
        score = jax.vmap(score)
    return score(jax.lax.stop_gradient(entries))


def policy(models: Models, lens_params: Params, tree: TreeState) -> Callable[[WorkingContext], Array]:
    """LensNet before one history: from a working context of its tree to float32[W], the scores of the entries."""
    return lambda context: policy_scores(models, lens_params, contexts.materialise(tree, context))


def policy_contexts(
    models: Models,
    lens_params: Params,
    tree: TreeState,
    length: ArrayLike,
    *,
    config: Config,
    capacity: int,
    key: Array | None = None,
) -> WorkingContext:
    """What LensNet makes of a cold start: `focus.uniform`, and the contexts after each refocus step.

    Args:
      models: the models.
      lens_params: parameters of LensNet.
      tree: one history.
      length: int32[], entries of every context; may be traced.
      config: shapes, and how the allocator acts.
      capacity: static number of entries W, at least the length.
      key: PRNG key, consumed; needed where `config.focus.temperature` is above 0.

    Returns:
      `WorkingContext` with leading axis `config.focus.steps` + 1.
    """
    geometry, settings = config.context.geometry, config.focus
    _, made = allocator.iterate(
        allocator.uniform(length, geometry),
        policy(models, lens_params, tree),
        length,
        geometry,
        steps=settings.steps,
        capacity=capacity,
        settings=settings,
        key=key,
    )
    return made
