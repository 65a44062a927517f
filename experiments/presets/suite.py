"""Twelve kinds of question over a text, a token a word: pairs, needles, variables, and words that come often.

python -m experiments.train suite
python -m experiments.evaluate runs/suite --suite --budgets 4 8
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
    output_dir="runs/suite",
    steps=0,
    batch_size=16,
    eval_steps=100,
    eval_batches=4,
    save_steps=300,
    base=BaseConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192, copy_heads=1, conv_width=4),
    lens=LensConfig(reads="attention", recency=True),
    # The longest answer, four statements of a chain, has 16 words.
    context=ContextConfig(
        window=272, block_size=4, max_lod=1, omit=True, horizon=16, recent_tokens=8, rollouts=8, local_edits=4
    ),
    focus=FocusConfig(start="recency"),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
    data=DataConfig(task="suite"),
    optimizer=OptimizerConfig(name="muon"),
    pretrain=PretrainConfig(steps=1500, learning_rate=4e-3, batch_size=16, rollout_weight=1.0),
    distill=DistillConfig(steps=300, learning_rate=2e-3),
)
