"""What a policy decides from: the history before a cursor, its tree, and the scores of its working contexts.

Nothing behind the cursor enters any of this.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.refocus import ScoreFn
from lensjax.context.tree import TreeState
from lensjax.context.working import Entries, WorkingContext
from lensjax.models.interfaces import (
    AttentiveLanguageModel,
    BaseReader,
    LensPolicy,
    Models,
    Params,
    StatefulLanguageModel,
)


class Window(NamedTuple):
    """A training window on both sides of its cursor."""

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


def build_tree(models: Models, params: dict[str, Params], history: ArrayLike, geometry: Geometry) -> TreeState:
    """The tree over one history int32[C], with gists of the models given.

    Raises:
      ValueError: the tokens are not a history of `geometry`: a whole window, say.
    """
    history = jnp.asarray(history)
    if history.shape != (geometry.history,):
        raise ValueError(
            f"a policy sees the {geometry.history} tokens before the cursor and no other: pass "
            f"split(tokens, horizon=...).history, got shape {history.shape}"
        )
    tree = trees.build(
        models.base.embed(params["base"], history),
        lambda children: models.gist.apply(params["gist"], children),
        block_size=geometry.block_size,
        max_lod=geometry.max_lod,
    )
    return with_states(models, params, tree)


QUERIES = (8, 32)
"""Last tokens of the history whose attention a policy may read: the few that ask, and what they belong to."""


def with_states(models: Models, params: dict[str, Params], tree: TreeState) -> TreeState:
    """The tree with what the policy reads of the base model, which reads the history in full for it; else as it is.

    `states` are those of a middle layer; `attention` is what the last tokens look at, of each layer and head the mean
    over the last `QUERIES` tokens: 2 * layers * heads numbers a token.

    Raises:
      ValueError: the base model does not show what the policy reads.
    """
    reads = models.lens.reads if isinstance(models.lens, BaseReader) else "nothing"
    if reads == "nothing":
        return tree
    base, capacity = models.base, tree.capacity
    entries = contexts.in_full(tree.levels[0], jnp.arange(capacity))
    if reads == "states" and isinstance(base, StatefulLanguageModel):
        found = base.states(params["base"], entries)
    elif reads == "attention" and isinstance(base, AttentiveLanguageModel):
        rows = jnp.maximum(tree.length - 1 - jnp.arange(min(max(QUERIES), capacity)), 0)
        weights, _ = base.attention(params["base"], entries, rows)
        by_query = jnp.stack([weights[:, :, :count].mean(axis=2) for count in QUERIES])
        found = by_query.reshape(-1, capacity).T
    else:
        raise ValueError(
            f"lens.reads {reads} needs a base model with a method `{reads}` (see models.interfaces), got "
            f"{type(base).__name__}: set lens.reads to nothing"
        )
    levels = [found]
    for _ in range(tree.max_lod):
        blocks = levels[-1].shape[0] // tree.block_size
        children = levels[-1][: blocks * tree.block_size].reshape(blocks, tree.block_size, found.shape[1])
        levels.append(children.mean(axis=1))
    return replace(tree, states=tuple(levels))


def policy_scores(lens: LensPolicy, params: Params, entries: Entries) -> Array:
    """LensNet's scores of a batch of working contexts; no gradient reaches the entries.

    Args:
      lens: the policy.
      params: its parameters.
      entries: leading axes [...], then W.

    Returns:
      float32[..., W] in [-1, 1], 0 at padding.
    """

    def score(one: Entries) -> Array:
        return lens.apply(params, one)

    for _ in range(entries.valid.ndim - 1):
        score = jax.vmap(score)
    return score(jax.lax.stop_gradient(entries))


def policy(lens: LensPolicy, params: Params, tree: TreeState) -> ScoreFn:
    """LensNet before one history: from a working context of its tree to float32[W], the scores of the entries."""

    def score(context: WorkingContext) -> Array:
        return policy_scores(lens, params, contexts.materialise(tree, context))

    return score
