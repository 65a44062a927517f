"""Baking: supervised training on traces, so that there are thoughts to reward.

    L = -mean log pi(trace) - log p(answer | prompt) - log p(conclusion | prompt, trace)

Half of the steps of a trace are wrong, and its conclusion is what follows from the last of them: the model learns how
thoughts look, and to answer by them. The answer without a thought is the right one.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.quiet_star import thoughts
from experiments.quiet_star.config import QuietStarConfig
from experiments.quiet_star.model import ThoughtModel
from lensjax.models import Params
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.steps.update import Learner, gradient_step, init_learner

Batch = dict[str, Array]
"""`prompt` int32[B, P], `trace` int32[B, L], `answer` and `conclusion` int32[B]."""


def init_state(key: Array, *, config: QuietStarConfig, model: ThoughtModel) -> Learner:
    """A learner with fresh parameters of `lm`, which draws nothing while it bakes. `key` is consumed."""
    params = {"lm": model.init(key)}
    return init_learner(key, params, tx=make_optimizer(config.optimizer))


def bake_loss(params: Params, batch: Batch, *, model: ThoughtModel) -> tuple[Array, Metrics]:
    """The loss of a batch of traces and its three parts, nats per token."""

    def one(prompt: Array, answer: Array, trace: Array, conclusion: Array) -> Metrics:
        scored = thoughts.score(model, params, prompt, trace[None])
        return {
            "trace_loss": -jnp.mean(scored.log_probs),
            "answer_loss_without": -thoughts.answer_log_prob(scored.without, answer),
            "answer_loss": -thoughts.answer_log_prob(scored.informed[0], conclusion),
            "gate": scored.share[0],
        }

    report = jax.tree.map(
        jnp.mean, jax.vmap(one)(*(batch[name] for name in ("prompt", "answer", "trace", "conclusion")))
    )
    return report["trace_loss"] + report["answer_loss_without"] + report["answer_loss"], report


def bake_step(state: Learner, batch: Batch, *, config: QuietStarConfig, model: ThoughtModel) -> tuple[Learner, Metrics]:
    """One update on one batch; pure."""
    rate = schedules.learning_rate(
        state.step,
        config.bake.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        steps=config.bake.steps,
    )
    after, seen = gradient_step(
        state,
        lambda params: bake_loss(params["lm"], batch, model=model),
        tx=make_optimizer(config.optimizer),
        rates={"learning_rate": rate, "weight_decay": 0.0},
    )
    return after, seen.aux | {"loss": seen.loss, "grad_norm": optax.tree.norm(seen.grads), "lr": rate}
