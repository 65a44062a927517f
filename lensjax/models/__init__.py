"""Base language model, GistNet and LensNet, as pure functions over parameter dicts."""

from lensjax.models.cache import KVCache
from lensjax.models.functional import BaseModel, GistModel, LensModel, Models, Params, ValueModel, build_models

__all__ = ["BaseModel", "GistModel", "KVCache", "LensModel", "Models", "Params", "ValueModel", "build_models"]
