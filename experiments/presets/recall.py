"""Single-span recall: the query begins one of seven earlier blocks again, so what is worth expanding is known.

    python -m experiments.train recall

`make recall` runs it for three seeds and both kinds of targets on one base model.
"""

from lensjax.context.allocator import FocusConfig
from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig

CONFIG = Config(
    output_dir="runs/recall-single",
    steps=300,
    batch_size=32,
    logging_steps=10,
    eval_steps=50,
    eval_batches=16,
    save_steps=100,
    base=BaseConfig(dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192),
    context=ContextConfig(window=64, block_size=8, max_lod=1, horizon=6, recent_tokens=2, rollouts=6, local_edits=1),
    # What was opened stays open: a second look takes the answer for less than it took the gist for.
    focus=FocusConfig(cooldown=4),
    hyper=Hyperparameters(context_start=0.6, context_end=0.4),
    data=DataConfig(task="recall", query=2),
    pretrain=PretrainConfig(steps=800, batch_size=32),
)
