"""What reads entries: base language model, GistNet, LensNet and HyperLoRA, as pure functions over parameter dicts."""

from lensjax.models.base_lm import BaseModel
from lensjax.models.build import build_models
from lensjax.models.functional import Functional
from lensjax.models.gistnet import GistModel
from lensjax.models.interfaces import (
    AttentiveLanguageModel,
    FeaturePolicy,
    GistEncoder,
    LanguageModel,
    LensPolicy,
    Models,
    Params,
    StreamingLanguageModel,
)
from lensjax.models.lensnet import LensModel
from lensjax.models.nn.cache import KVCache
from lensjax.models.nn.hypernet import HyperLoRAModel
from lensjax.models.nn.value import ValueModel

__all__ = [
    "AttentiveLanguageModel",
    "BaseModel",
    "FeaturePolicy",
    "Functional",
    "GistEncoder",
    "GistModel",
    "HyperLoRAModel",
    "KVCache",
    "LanguageModel",
    "LensModel",
    "LensPolicy",
    "Models",
    "Params",
    "StreamingLanguageModel",
    "ValueModel",
    "build_models",
]
