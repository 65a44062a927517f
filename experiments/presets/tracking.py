"""Variable tracking: which of 64 statements answer the question, when the second one needed stands in the first?

python -m experiments.train tracking
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

HOPS = 2

CONFIG = Config(
    output_dir="runs/tracking",
    steps=0,
    batch_size=16,
    eval_steps=100,
    eval_batches=8,
    save_steps=200,
    base=BaseConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192, copy_heads=1, conv_width=4),
    lens=LensConfig(reads="attention", recency=True),
    # 64 statements, a question of two tokens, and a token for each look-up.
    context=ContextConfig(
        window=64 * 4 + 2 + HOPS,
        block_size=4,
        max_lod=1,
        omit=True,
        horizon=HOPS,
        recent_tokens=2,
        rollouts=8,
        local_edits=4,
    ),
    focus=FocusConfig(start="recency"),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
    data=DataConfig(task="tracking", hops=HOPS),
    pretrain=PretrainConfig(steps=1500, batch_size=16, rollout_weight=1.0),
    distill=DistillConfig(steps=600, looks=4, learning_rate=2e-3),
)
