"""Shapes of training steps that are measured, compiled and reckoned with."""

from typing import Literal

from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig

Shape = Literal["small", "medium", "large", "smollm2"]


def _shape(
    base: BaseConfig, context: ContextConfig, *, batch_size: int, share: float, dtype: Literal["float32", "bfloat16"]
) -> Config:
    """Frozen base model, live LensNet loss, KL on."""
    return Config(
        batch_size=batch_size,
        dtype=dtype,
        base=base,
        context=context,
        hyper=Hyperparameters(context_start=share, context_end=share, kl_weight=0.1),
        optimizer=OptimizerConfig(warmup_steps=0),
    )


SHAPES = {
    "small": _shape(
        BaseConfig(dim=128, layers=4, heads=4, kv_heads=2, mlp_dim=384),
        ContextConfig(window=512, block_size=8, horizon=32, recent_tokens=8, rollouts=8),
        batch_size=4,
        share=0.5,
        dtype="float32",
    ),
    "medium": _shape(
        BaseConfig(dim=256, layers=6, heads=8, kv_heads=4, mlp_dim=768),
        ContextConfig(window=1024, block_size=32, horizon=32, recent_tokens=8, rollouts=4),
        batch_size=2,
        share=0.75,
        dtype="float32",
    ),
    "large": _shape(
        BaseConfig(vocab_size=32_768, dim=768, layers=12, heads=12, kv_heads=12, mlp_dim=2048),
        ContextConfig(window=2048, block_size=32, horizon=64, recent_tokens=8, rollouts=4),
        batch_size=8,
        share=0.5,
        dtype="bfloat16",
    ),
    # SmolLM2-135M, whose parameters a checkpoint brings.
    "smollm2": _shape(
        BaseConfig(
            vocab_size=49_152,
            dim=576,
            layers=30,
            heads=9,
            kv_heads=3,
            mlp_dim=1536,
            copy_heads=0,
            conv_width=0,
            rope_theta=100_000.0,
            norm_eps=1e-5,
        ),
        ContextConfig(window=2048, block_size=32, horizon=64, recent_tokens=8, rollouts=4),
        batch_size=8,
        share=0.5,
        dtype="bfloat16",
    ),
}
"""Two for a CPU, and two for an accelerator."""
