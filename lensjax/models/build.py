"""The models of this library, from their settings."""

from typing import Literal

import jax

from lensjax.models.base_lm import BaseConfig, BaseModel
from lensjax.models.decision import QUERIES
from lensjax.models.gistnet import GistConfig, GistModel
from lensjax.models.interfaces import Models
from lensjax.models.lensnet import LensConfig, LensModel
from lensjax.models.nn.attend import Choice, Setting, choose, tile


def build_models(
    base: BaseConfig,
    gist: GistConfig,
    lens: LensConfig,
    *,
    block_size: int,
    max_lod: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Setting = "auto",
) -> Models:
    """Builds the models of this library; call it once, outside `jax.jit`.

    Args:
      base: the language model.
      gist: GistNet.
      lens: LensNet.
      block_size: children per gist K.
      max_lod: highest level L.
      dtype: compute type; parameters, softmax and losses stay in float32.
      attention: what computes it in base model and LensNet; `auto` is the fused kernel of the device that JAX computes
        on, where it serves, else XLA.

    Returns:
      `Models`.

    Raises:
      ValueError: `base.dim` is no multiple of `gist.heads`, or `attention` cannot serve here.

    Example:
      >>> import lensjax as lx
      >>> models = lx.build_models(lx.BaseConfig(), lx.GistConfig(), lx.LensConfig(), block_size=8, max_lod=2)
      >>> models.base.dim, models.base.vocab_size
      (64, 256)
    """
    if base.dim % gist.heads:
        raise ValueError(f"base.dim must be a multiple of gist.heads {gist.heads}, got {base.dim}")
    kernel = choose_attention(base, lens, dtype=dtype, attention=attention).kernel
    rows = tile(jax.default_backend())
    return Models(
        base=BaseModel(base, dtype, kernel, rows),
        gist=GistModel(gist, base.dim, block_size, dtype),
        lens=LensModel(lens, base.dim, max_lod, dtype, _state_dim(base, lens), kernel, rows),
    )


def choose_attention(
    base: BaseConfig, lens: LensConfig, *, dtype: Literal["float32", "bfloat16"], attention: Setting
) -> Choice:
    """What computes attention in the models that `build_models` makes of the same settings, and why.

    Raises:
      ValueError: it cannot serve here.
    """
    widths = {"the width of the base model's": base.head_width, "that of LensNet's": lens.dim // lens.heads}
    return choose(attention, dtype=dtype, widths=widths)


def _state_dim(base: BaseConfig, lens: LensConfig) -> int:
    """Numbers that LensNet reads of the base model for each block."""
    return {"nothing": 0, "states": base.dim, "attention": len(QUERIES) * base.layers * base.heads}[lens.reads]
