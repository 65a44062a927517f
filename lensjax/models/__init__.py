"""Base language model, GistNet, LensNet and HyperLoRA, as pure functions over parameter dicts."""

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
from lensjax.models.nn.cache import KVCache

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
