"""Single-span recall over a longer window, for quality at budgets from 2x to 16x: one block of 127 is the answer.

python experiments/train.py recall_long
"""

from lensjax.config import BaseConfig, Config, ContextConfig, DataConfig, Hyperparameters, LensConfig, PretrainConfig

CONFIG = Config(
    output_dir="runs/recall-long",
    steps=400,
    batch_size=16,
    eval_steps=50,
    eval_batches=8,
    save_steps=100,
    base=BaseConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, mlp_dim=192, copy_heads=1, conv_width=4),
    lens=LensConfig(dim=64, layers=2, heads=4, mlp_dim=192),
    context=ContextConfig(window=512, block_size=4, max_lod=3, horizon=3, recent_tokens=4, rollouts=4),
    hyper=Hyperparameters(context_start=0.5, context_end=0.25, lod2_share=0.2),
    data=DataConfig(task="recall", recall_pool=32),
    pretrain=PretrainConfig(steps=800, batch_size=8),
)
