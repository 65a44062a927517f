"""Base language model, GistNet, LensNet and HyperLoRA, as pure functions over parameter dicts."""

from lensjax.models.cache import KVCache
from lensjax.models.functional import (
    BaseModel,
    Functional,
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
    "Functional",
    "GistModel",
    "HyperLoRAModel",
    "KVCache",
    "LensModel",
    "Models",
    "Params",
    "ValueModel",
    "build_models",
]
