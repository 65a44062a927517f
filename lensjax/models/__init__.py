"""Base language model, GistNet, LensNet and HyperLoRA, as pure functions over parameter dicts."""

from lensjax.models.cache import KVCache
from lensjax.models.functional import (
    BaseModel,
    GistModel,
    HyperLoRAModel,
    LensModel,
    Models,
    Params,
    ValueModel,
    build_models,
)

__all__ = [
    "BaseModel",
    "GistModel",
    "HyperLoRAModel",
    "KVCache",
    "LensModel",
    "Models",
    "Params",
    "ValueModel",
    "build_models",
]
