"""What a policy decides from: the history before a cursor, its tree, and the scores of its working contexts.

Nothing behind the cursor enters any of this.
"""

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
from lensjax.models.interfaces import LensPolicy, Models, Params, StatefulLanguageModel, StateReader


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
    embeddings = models.base.embed(params["base"], history)
    stateful = stateful_base(models)
    in_full = contexts.in_full(embeddings, jnp.arange(geometry.history))
    states = None if stateful is None else stateful.states(params["base"], in_full)
    return trees.build(
        embeddings,
        lambda children: models.gist.apply(params["gist"], children),
        block_size=geometry.block_size,
        max_lod=geometry.max_lod,
        states=states,
    )


def stateful_base(models: Models) -> StatefulLanguageModel | None:
    """The base model, where the policy reads its states.

    Raises:
      ValueError: it does, and the base model shows none.
    """
    if not (isinstance(models.lens, StateReader) and models.lens.reads_states):
        return None
    if not isinstance(models.base, StatefulLanguageModel):
        raise ValueError(
            "lens.states needs a base model that shows its states (a method `states`, see models.interfaces), got "
            f"{type(models.base).__name__}: set lens.states to False"
        )
    return models.base


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
