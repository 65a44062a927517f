"""The smallest run on grids at which everything happens: its models, its state, and tasks."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.rlan import meta, rules
from experiments.rlan.config import RlanConfig
from experiments.rlan.model import GridConfig
from experiments.rlan.rules import RulesConfig
from lensjax.models.hyperlora import HyperLoRAConfig
from lensjax.training.optim.optimizer import OptimizerConfig

CONFIG = RlanConfig(
    steps=4,
    batch_size=2,
    grid=GridConfig(dim=8, steps=2),
    rules=RulesConfig(size=4),
    # Deltas that matter from the start.
    hyperlora=HyperLoRAConfig(rank=2, init_scale=4.0, max_norm=None, loo_weight=0.5, equivariance_weight=0.25),
    optimizer=OptimizerConfig(warmup_steps=1),
    equivariance_views=2,
)
MODELS = meta.build_models(CONFIG)
STATE = meta.init_state(jax.random.key(0), config=CONFIG, models=MODELS)


def tasks(count=2, split="train", config=CONFIG.rules):
    """A batch of tasks."""
    rows = [rules.RuleSource(config, split, 5)[i] for i in range(count)]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in ("support", "query")}
