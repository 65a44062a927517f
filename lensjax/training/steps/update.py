"""What all training steps share: parameters that move, and one step down a gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

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
    """Parameters by part, such as `base`, `gist` and `lens`."""
    opt_state: Any
    """Optimizer state of the trainable parts."""
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
    """By trainable part."""


def init_learner(
    key: Array, params: dict[str, Params], *, tx: optax.GradientTransformation, trainable: Sequence[str]
) -> Learner:
    """A learner at step 0, of which `params` are taken as they are: copy what a donated state must not take with it."""
    opt_state = tx.init({name: params[name] for name in trainable})
    return Learner(jnp.zeros((), jnp.int32), params, opt_state, key)


def gradient_step(
    state: State,
    loss_fn: Callable[[dict[str, Params]], tuple[Array, Aux]],
    *,
    tx: optax.GradientTransformation,
    trainable: Sequence[str],
    rates: Mapping[str, ArrayLike],
) -> tuple[State, Gradient[Aux]]:
    """One step down the gradient of a loss.

    Args:
      state: a `Learner`, or what adds to one.
      loss_fn: from all parameters to the loss float32[] and whatever else is of interest.
      tx: the optimizer, over a dict of the trainable parts.
      trainable: parts that move.
      rates: hyperparameters of this step by name, such as `learning_rate`, for a `tx` that has them injected.

    Returns:
      The state with new parameters and the next step's number, and what the step saw.
    """
    parts = {name: state.params[name] for name in trainable}

    def loss_of(parts: dict[str, Params]) -> tuple[Array, Aux]:
        return loss_fn({**state.params, **parts})

    (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(parts)
    opt_state = optimizer.set_rates(state.opt_state, **rates)
    # optax raises a float decay to an integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, opt_state, parts)
        parts = optax.apply_updates(parts, updates)
    after = replace(state, step=state.step + 1, params={**state.params, **parts}, opt_state=opt_state)
    return after, Gradient(loss, aux, grads)
