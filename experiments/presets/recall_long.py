"""Single-span recall over longer windows: which of 63 blocks does the query begin, at budgets from 2x to 16x?

    make evaluate-recall

LensNet is trained twice. On windows of 64 tokens first, where few spans differ between two variants and a preference
says which of them mattered: that is where it learns to recognise what the query asks for. Then on windows of 256, from
there on (`start_from`), with rollouts that differ from each other by a few swaps. GistNet stays the mean of a block, in
which LensNet can recognise a token.
"""

from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig

CONFIG = Config(
    output_dir="runs/recall-long",
    steps=300,
    batch_size=32,
    eval_steps=50,
    eval_batches=4,
    save_steps=100,
    base=BaseConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192, copy_heads=1, conv_width=4),
    context=ContextConfig(window=256, block_size=4, max_lod=3, horizon=2, recent_tokens=2, rollouts=8, local_edits=4),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25, high_lod_share=0.3),
    data=DataConfig(task="recall", query=2, recall_pool=16),
    pretrain=PretrainConfig(steps=1200, batch_size=8, rollout_weight=1.0, train_gist=False),
)
