"""Baking: supervised training on traces, so that there are thoughts to reward.

    L = -mean log pi(trace) - log p(answer | prompt) - log p(conclusion | prompt, trace)

Half of the steps of a trace are wrong, and its conclusion is what follows from the last of them: the model learns how
thoughts look, and to answer by them. The answer without a thought is the right one.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.quiet_star import thoughts
from experiments.quiet_star.config import QuietStarConfig
from experiments.quiet_star.model import ThoughtModel
from lensjax.models import Params
from lensjax.training.metrics import Metrics
from lensjax.training.optim import optimizer, schedules

Batch = dict[str, Array]
"""`prompt` int32[B, P], `trace` int32[B, L], `answer` and `conclusion` int32[B]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BakeState:
    """Everything that moves during baking."""

    step: Array
    """int32[]: updates done."""
    params: dict[str, Params]
    """Parameters of `lm`."""
    opt_state: Any


def init_state(key: Array, *, config: QuietStarConfig, model: ThoughtModel) -> BakeState:
    """A state with fresh parameters. `key` is consumed."""
    params = {"lm": model.init(key)}
    return BakeState(jnp.zeros((), jnp.int32), params, optimizer.init(config.optimizer, params))


def bake_loss(params: Params, batch: Batch, *, model: ThoughtModel) -> tuple[Array, Metrics]:
    """The loss of a batch of traces and its three parts, nats per token."""

    def one(prompt: Array, answer: Array, trace: Array, conclusion: Array) -> Metrics:
        judged = thoughts.judge(model, params, prompt, trace[None])
        return {
            "trace_loss": -jnp.mean(judged.log_probs),
            "answer_loss_without": -thoughts.answer_log_prob(judged.without, answer),
            "answer_loss": -thoughts.answer_log_prob(judged.informed[0], conclusion),
            "gate": judged.share[0],
        }

    report = jax.tree.map(
        jnp.mean, jax.vmap(one)(*(batch[name] for name in ("prompt", "answer", "trace", "conclusion")))
    )
    return report["trace_loss"] + report["answer_loss_without"] + report["answer_loss"], report


def bake_step(
    state: BakeState, batch: Batch, *, config: QuietStarConfig, model: ThoughtModel
) -> tuple[BakeState, Metrics]:
    """One update on one batch; pure."""
    loss_fn = functools.partial(bake_loss, batch=batch, model=model)
    (loss, report), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params["lm"])
    rate = schedules.learning_rate(
        state.step,
        config.bake.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        steps=config.bake.steps,
    )
    params, opt_state = optimizer.update(
        config.optimizer, {"lm": grads}, state.opt_state, state.params, learning_rate=rate, weight_decay=0.0
    )
    report |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": rate}
    return BakeState(state.step + 1, params, opt_state), report
