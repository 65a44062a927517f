"""Single-span recall over longer windows: which of 63 blocks does the query begin, at budgets from 2x to 16x?

make evaluate-recall
"""

from lensjax.context.allocator import FocusConfig
from lensjax.models.base_lm import BaseConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig
from lensjax.training.teachers import DistillConfig

CONFIG = Config(
    output_dir="runs/recall-long",
    steps=0,
    batch_size=16,
    eval_steps=50,
    eval_batches=8,
    save_steps=100,
    base=BaseConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192, copy_heads=1, conv_width=4),
    lens=LensConfig(recency=True),
    context=ContextConfig(
        window=256, block_size=4, max_lod=1, omit=True, horizon=2, recent_tokens=2, rollouts=8, local_edits=4
    ),
    focus=FocusConfig(start="recency", steps=2, cooldown=4),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
    data=DataConfig(task="recall", query=2, recall_pool=16),
    pretrain=PretrainConfig(steps=1200, batch_size=8, rollout_weight=1.0),
    distill=DistillConfig(steps=150, learning_rate=1e-3, sharpness=2.0),
)
