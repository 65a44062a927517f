"""What all training steps share: parameters that move, those that stay, and one step down a gradient.

A state holds what is trained and nothing else. The other parts are a dict `frozen` beside it, an argument of every
step: it is neither copied nor donated, and no checkpoint of the state repeats it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import require
from lensjax.models import Params
from lensjax.training.optim import optimizer

Aux = TypeVar("Aux")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learner:
    """What moves in every kind of training; the states of single steps add their own."""

    step: Array
    """int32[]: updates done."""
    params: dict[str, Params]
    """Parameters of the parts that are trained, by name, such as `lens`."""
    opt_state: Any
    """Optimizer state of `params`."""
    key: Array
    """PRNG key of the run; step keys are `fold_in(key, step)`."""


State = TypeVar("State", bound=Learner)


@dataclass(frozen=True)
class Gradient(Generic[Aux]):
    """What a gradient step saw."""

    loss: Array
    """float32[]."""
    aux: Aux
    """What the loss returned beside it."""
    grads: dict[str, Params]
    """By part."""


def init_learner(key: Array, params: dict[str, Params], *, tx: optax.GradientTransformation) -> Learner:
    """A learner at step 0, of which `params` are taken as they are: copy what a donated state must not take with it."""
    return Learner(jnp.zeros((), jnp.int32), params, tx.init(params), key)


def split_parts(params: dict[str, Params], trained: Iterable[str]) -> tuple[dict[str, Params], dict[str, Params]]:
    """What a state takes of all parameters, and what it leaves frozen.

    Args:
      params: parameters by part.
      trained: names of those that are trained.

    Returns:
      The trained parts, copied, since a donated state takes its buffers with it; and the others, as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training.steps.update import split_parts
      >>> params = {"base": {"w": jnp.ones(2)}, "lens": {"w": jnp.zeros(2)}}
      >>> trained, frozen = split_parts(params, ["lens"])
      >>> list(trained), trained["lens"]["w"] is params["lens"]["w"], frozen["base"] is params["base"]
      (['lens'], False, True)
    """
    trained = set(trained)
    own = {name: jax.tree.map(jnp.copy, part) for name, part in params.items() if name in trained}
    return own, {name: part for name, part in params.items() if name not in trained}


def all_parts(state: Learner, frozen: dict[str, Params]) -> dict[str, Params]:
    """Parameters of base model, GistNet, LensNet and whatever else there is, trained and frozen.

    Raises:
      ValueError: a part is in both, or one of the three is in neither.
    """
    both, missing = set(state.params) & set(frozen), {"base", "gist", "lens"} - set(state.params) - set(frozen)
    require(not both, f"frozen must not hold {', '.join(sorted(both))}, which the state trains: leave it out there")
    require(not missing, f"frozen must hold {', '.join(sorted(missing))}, which the state does not train")
    return {**frozen, **state.params}


def gradient_step(
    state: State,
    loss_fn: Callable[[dict[str, Params]], tuple[Array, Aux]],
    *,
    tx: optax.GradientTransformation,
    rates: Mapping[str, ArrayLike],
) -> tuple[State, Gradient[Aux]]:
    """One step down the gradient of a loss.

    Args:
      state: a `Learner`, or what adds to one.
      loss_fn: from the state's parameters to the loss float32[] and whatever else is of interest.
      tx: the optimizer, over a dict of the state's parts.
      rates: hyperparameters of this step by name, such as `learning_rate`, for a `tx` that has them injected.

    Returns:
      The state with new parameters and the next step's number, and what the step saw.
    """
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    opt_state = optimizer.set_rates(state.opt_state, **rates)
    # optax raises a float decay to an integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    after = replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return after, Gradient(loss, aux, grads)
