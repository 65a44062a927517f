"""The preset `smol` for a GPU or TPU: windows of 4,096 tokens, larger batches, more steps, the base model in bfloat16.

make smol                                  takes it where JAX finds such a device
python -m experiments.train smol_large
"""

from dataclasses import replace

from experiments.presets import smol

CONFIG = replace(
    smol.CONFIG,
    output_dir="runs/smol_large",
    checkpoint=replace(smol.CONFIG.checkpoint, dtype="bfloat16"),
    dtype="bfloat16",
    batch_size=16,
    eval_steps=200,
    eval_batches=4,
    save_steps=200,
    logging_steps=10,
    context=replace(smol.CONFIG.context, window=4096 + 32),
    distill=replace(smol.CONFIG.distill, steps=1000),
)
