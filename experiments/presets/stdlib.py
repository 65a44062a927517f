"""Real text: the standard library of this Python, read as bytes, with a base model that gains from older context.

make evaluate-stdlib
"""

from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig

CONFIG = Config(
    output_dir="runs/stdlib",
    steps=300,
    batch_size=8,
    eval_steps=100,
    eval_batches=16,
    save_steps=100,
    base=BaseConfig(dim=128, layers=2, heads=4, kv_heads=2, mlp_dim=320, copy_heads=1, conv_width=4),
    context=ContextConfig(window=512, block_size=4, max_lod=3, horizon=32, recent_tokens=16, rollouts=6),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25, high_lod_share=0.2),
    data=DataConfig(task="stdlib"),
    pretrain=PretrainConfig(steps=1200, batch_size=8, rollout_weight=1.0),
)
