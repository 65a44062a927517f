"""A first LensNet on a folder of one's own, in minutes on two cores: `demo` on other text.

    python -m experiments.train notes --data.path ~/notes

Windows quote themselves, so that something old is always needed and can be learned in minutes. Text as it is, whose
needs are rarer, takes the sizes of `stdlib`.
"""

from lensjax.context.allocator import FocusConfig
from lensjax.models.base_lm import BaseConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig
from lensjax.training.teachers import DistillConfig

CONFIG = Config(
    output_dir="runs/notes",
    steps=0,
    batch_size=16,
    eval_steps=50,
    eval_batches=4,
    save_steps=100,
    base=BaseConfig(dim=96, layers=2, heads=4, kv_heads=2, mlp_dim=256, copy_heads=1, conv_width=4),
    lens=LensConfig(reads="attention", recency=True),
    context=ContextConfig(
        window=256, block_size=8, max_lod=1, omit=True, horizon=32, recent_tokens=16, rollouts=4, local_edits=2
    ),
    focus=FocusConfig(start="recency", steps=2, cooldown=4),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
    data=DataConfig(task="text", path="notes", quote=8),
    optimizer=OptimizerConfig(name="muon"),
    pretrain=PretrainConfig(steps=400, learning_rate=4e-3, batch_size=16, rollout_weight=1.0),
    distill=DistillConfig(steps=150, learning_rate=2e-3),
)
