"""The smallest run that learns to think: its model, its parameters, questions, and what is compiled of it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from experiments.quiet_star import thoughts
from experiments.quiet_star.config import BakeConfig, QuietStarConfig, RLConfig
from experiments.quiet_star.model import ModelConfig
from experiments.quiet_star.tasks import QuestionSource
from experiments.quiet_star.train import build_model
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.training.optim.optimizer import OptimizerConfig
from tests.small import jit

CONFIG = QuietStarConfig(
    batch_size=4,
    model=ModelConfig(dim=8, layers=1, heads=2, mlp_dim=8),
    bake=BakeConfig(steps=4, learning_rate=1e-2),
    rl=RLConfig(episodes=8, warmup_episodes=3, thoughts=3, value_hidden=8, learning_rate=1e-2, whiten=False),
    optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
    stopping=StoppingConfig(),
)
MODEL = build_model(CONFIG)
PROMPT_LENGTH, LENGTH = MODEL.prompt_length, MODEL.thought_length


@functools.cache
def batch(split="train", size=4):
    """Questions of a split."""
    rows = [QuestionSource(CONFIG.task, split, 3)[i] for i in range(size)]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@functools.cache
def baked():
    """Not at its start, where all answers are nearly equal."""
    params = MODEL.init(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)


def drawn(seed=0, count=3):
    """Random thoughts."""
    return jnp.asarray(np.random.default_rng(seed).integers(8, size=(count, LENGTH)), jnp.int32)


score = jit(functools.partial(thoughts.score, MODEL))
score_all = jit(jax.vmap(functools.partial(thoughts.score, MODEL), (None, 0, 0)))


@functools.cache
def compiled(function, **changes):
    """A function of the run with some settings of `rl` changed."""
    config = replace(CONFIG, rl=replace(CONFIG.rl, **changes))
    return jit(functools.partial(function, config=config, model=MODEL))


def largest(tree):
    """The largest absolute value of a tree."""
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
