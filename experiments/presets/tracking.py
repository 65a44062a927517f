"""Variable tracking: which of 64 statements answer the question, when the second one needed stands in the first?

python -m experiments.train tracking
"""

from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig

HOPS = 2

CONFIG = Config(
    output_dir="runs/tracking",
    steps=150,
    batch_size=32,
    eval_steps=50,
    eval_batches=4,
    save_steps=100,
    base=BaseConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192, copy_heads=1, conv_width=4),
    # 64 statements, a question of two tokens, and a token for each look-up.
    context=ContextConfig(
        window=64 * 4 + 2 + HOPS,
        block_size=4,
        max_lod=3,
        horizon=HOPS,
        recent_tokens=2,
        rollouts=8,
        local_edits=4,
    ),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25, high_lod_share=0.3),
    data=DataConfig(task="tracking", hops=HOPS),
    pretrain=PretrainConfig(steps=1200, batch_size=16, rollout_weight=1.0, train_gist=False),
)
