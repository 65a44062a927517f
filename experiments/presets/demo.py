"""The main job in a few minutes on two cores: pretrain on the standard library of this Python, then train LensNet.

make demo
python -m experiments.train demo
"""

from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig

CONFIG = Config(
    output_dir="runs/demo",
    steps=300,
    batch_size=8,
    eval_steps=100,
    eval_batches=8,
    save_steps=100,
    base=BaseConfig(dim=96, layers=2, heads=4, kv_heads=2, mlp_dim=256, copy_heads=1, conv_width=4),
    context=ContextConfig(window=256, block_size=8, max_lod=2, horizon=32, recent_tokens=8, rollouts=4),
    hyper=Hyperparameters(context_start=0.8, context_end=0.5),
    data=DataConfig(task="stdlib"),
    pretrain=PretrainConfig(steps=600, batch_size=16, rollout_weight=1.0),
)
