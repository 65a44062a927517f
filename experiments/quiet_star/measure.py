"""What thoughts are worth on held-out questions: the model's own, none, random ones, and another prompt's.

An answer is right where its most probable token is. Prompts that are easier than the threshold are answered without a
thought in all arms; the answer itself has no part in that decision here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.quiet_star import thoughts
from experiments.quiet_star.bake import Batch
from experiments.quiet_star.config import QuietStarConfig
from experiments.quiet_star.model import ThoughtModel
from experiments.quiet_star.tasks import task_of
from lensjax._numerics import may_be_nan
from lensjax.evaluation import faithfulness
from lensjax.evaluation.faithfulness import Evidence
from lensjax.models import Params

ARMS = ("sampled", "greedy", "random", "foreign")
"""Whose thoughts a prompt is answered with."""

Answers = dict[str, Any]
"""Arrays by name, the prompts in front."""


def answer_batch(params: Params, batch: Batch, key: Array, *, config: QuietStarConfig, model: ThoughtModel) -> Answers:
    """How a batch is answered, with each kind of thoughts and without.

    Args:
      params: of the language model.
      batch: `prompt` int32[B, P] and `answer` int32[B].
      key: PRNG key of the thoughts, consumed.
      config: static.
      model: static.

    Returns:
      `injected` bool[B]; `without`, the answers int32[B], and their `nll_without` float32[B]; for each arm its answers
      int32[B, n], their `nll_*` and `coherence_*`, float32[B, n]; `answer`.
    """
    own_key, random_key = jax.random.split(key)
    prompts, answers, count = batch["prompt"], batch["answer"], config.rl.thoughts
    keys = jax.random.split(own_key, len(prompts))
    own = jax.vmap(lambda prompt, key: thoughts.sample(model, params, prompt, key, count=count))(prompts, keys)
    drawn = {
        "sampled": own,
        "greedy": jax.vmap(lambda prompt: thoughts.greedy(model, params, prompt))(prompts),
        "random": jax.random.randint(random_key, own.shape, 0, task_of(config.task).symbols),
        "foreign": jnp.roll(own, 1, axis=0),
    }

    # All of a prompt's thoughts are scored at once, and parted by arm afterwards.
    ends = np.cumsum([tokens.shape[1] for tokens in drawn.values()])
    whole = jnp.concatenate([drawn[name] for name in ARMS], axis=1)

    def one(prompt: Array, answer: Array, tokens: Array) -> Answers:
        scored = thoughts.score(model, params, prompt, tokens)
        hardness = thoughts.difficulty(scored.without, model.attention(params, prompt))
        injected = hardness > config.rl.threshold
        used = jnp.where(injected, scored.informed, scored.without[None])
        of_thoughts = {
            "": jnp.argmax(used, axis=-1).astype(jnp.int32),
            "nll_": -thoughts.answer_log_prob(used, answer),
            "coherence_": thoughts.coherence(scored.log_probs),
        }
        parted = {prefix: jnp.split(values, ends[:-1]) for prefix, values in of_thoughts.items()}
        return {
            "answer": answer,
            "injected": injected,
            "difficulty": hardness,
            "without": jnp.argmax(scored.without).astype(jnp.int32),
            "nll_without": -thoughts.answer_log_prob(scored.without, answer),
            **{f"{prefix}{name}": values[i] for prefix, values in parted.items() for i, name in enumerate(ARMS)},
        }

    return jax.vmap(one)(prompts, answers, whole)


def report(batches: Sequence[Answers], config: QuietStarConfig) -> dict[str, float]:
    """Accuracies, losses and the check of faithfulness over all answers of a split.

    Args:
      batches: of `answer_batch`, on the host.
      config: thresholds are read.

    Returns:
      Numbers by name.
    """
    answers = {name: np.concatenate([np.asarray(one[name]) for one in batches]) for name in batches[0]}
    right = {name: answers[name] == answers["answer"][:, None] for name in ARMS}
    right_without = answers["without"] == answers["answer"]
    numbers: dict[str, float] = {"accuracy_without": float(right_without.mean())}
    numbers |= {f"accuracy_{name}": float(right[name].mean()) for name in ARMS}
    numbers |= {f"nll_{name}": float(answers[f"nll_{name}"].mean()) for name in ("without", *ARMS)}
    numbers |= {f"coherence_{name}": float(answers[f"coherence_{name}"].mean()) for name in ARMS}
    numbers["injected"] = float(answers["injected"].mean())
    numbers["difficulty"] = float(answers["difficulty"].mean())
    evidence = may_be_nan(_evidence)(answers, right, right_without)
    checks = faithfulness.metrics(evidence, config.faithfulness, prefix="rl/")
    return numbers | {name: float(value) for name, value in checks.items()}


def _evidence(answers: Answers, right: dict[str, np.ndarray], right_without: np.ndarray) -> Evidence:
    """The four measurements.

    What coherence must tell from each other are the own and the foreign thoughts of a prompt: where all of its own are
    right, there is nothing else to tell.
    """
    own, without = answers["sampled"], np.broadcast_to(answers["without"][:, None], answers["sampled"].shape)
    one = jnp.ones((), jnp.int32)
    paths = jax.vmap(lambda a, b: faithfulness.divergence(a[None], one, b[None], one))(
        own.reshape(-1), without.reshape(-1)
    )
    both = ("sampled", "foreign")
    return Evidence(
        divergence=jnp.mean(paths),
        ablation=faithfulness.gain(right["sampled"].reshape(-1), np.repeat(right_without, own.shape[1])),
        correlation=faithfulness.correlation(
            np.concatenate([answers[f"coherence_{name}"].reshape(-1) for name in both]),
            np.concatenate([right[name].reshape(-1) for name in both]),
        ),
        counterfactual=faithfulness.gain(right["sampled"].reshape(-1), right["foreign"].reshape(-1)),
    )
