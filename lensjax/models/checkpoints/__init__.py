"""Language models that others have trained, from their files: a Hugging Face folder, or one GGUF file.

A checkpoint is accounted for whole: every tensor and its shape, and every key that says what is computed. What is not
known is refused by name, before anything is put on a device; a model that is nearly right gives no error later.
Nothing is fetched: a path is one on this machine.

    models, params = load_language_model("models/SmolLM2-135M")

Covered are Llama 2 and 3, and what is built like them (SmolLM2, TinyLlama), Mistral without a sliding window, Qwen2,
Qwen3 and the text models of Gemma 3. A folder needs the extra `hf`, a GGUF file the extra `gguf`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from lensjax._settings import require
from lensjax.models.base_lm import BaseConfig, BaseModel
from lensjax.models.checkpoints import gguf_file, huggingface
from lensjax.models.checkpoints.files import is_gguf, weight_files
from lensjax.models.checkpoints.files import sha256 as sha256
from lensjax.models.checkpoints.tensors import Checkpoint, load
from lensjax.models.interfaces import Params
from lensjax.models.nn.attend import choose, tile

__all__ = ["load_language_model", "load_params", "read_config", "sha256", "weight_files"]

Dtype = Literal["float32", "bfloat16"]


def read_config(path: str | Path) -> BaseConfig:
    """Settings of a checkpoint's model; no weights are read.

    Args:
      path: a Hugging Face folder, or a GGUF file.

    Returns:
      `BaseConfig`.

    Raises:
      ValueError: there is no checkpoint, or its function is not that of a `BaseModel`; the message names the key.
      ImportError: the extra `gguf` is not installed.

    Example:
      >>> import json, pathlib, tempfile
      >>> from lensjax.models.checkpoints import read_config
      >>> keys = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
      >>> keys |= {"num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (pathlib.Path(folder) / "config.json").write_text(json.dumps(keys))
      ...     config = read_config(folder)
      >>> config.dim, config.kv_heads, config.norm_eps, config.tied
      (32, 4, 1e-05, False)
    """
    path = Path(path)
    return gguf_file.read_config(path) if is_gguf(path) else huggingface.read_config(path)


def load_params(path: str | Path, config: BaseConfig, dtype: Dtype = "float32") -> Params:
    """Parameters of a checkpoint for `BaseModel(config)`, tensor by tensor onto the device.

    Args:
      path: a Hugging Face folder, or a GGUF file; quantised tensors are dequantised.
      config: of `read_config`; `gaussian_rope` may be changed.
      dtype: of the matrices; vectors (norms, biases) are float32.

    Returns:
      Parameters of a `BaseModel`.

    Raises:
      ValueError: there is no checkpoint, it does not fit `config`, or a tensor is missing, left over, of another shape
        or of another type.
      ImportError: the extra `hf` or `gguf` is not installed.
    """
    require(dtype in ("float32", "bfloat16"), f"dtype must be one of float32, bfloat16, got {dtype!r}")
    checkpoint = _open(Path(path))
    _require_equal(path, dataclasses.replace(config, gaussian_rope=False), checkpoint.config)
    return load(checkpoint, dtype)


def load_language_model(path: str | Path, dtype: Dtype = "float32") -> tuple[BaseModel, Params]:
    """A checkpoint as a model and its parameters.

    Args:
      path: a Hugging Face folder, or a GGUF file.
      dtype: of matrices and of their products; everything else is float32.

    Returns:
      The model, and its parameters on the device.

    Raises:
      ValueError: as `load_params`.
      ImportError: the extra `hf` or `gguf` is not installed.
    """
    require(dtype in ("float32", "bfloat16"), f"dtype must be one of float32, bfloat16, got {dtype!r}")
    checkpoint = _open(Path(path))
    params = load(checkpoint, dtype)
    kernel = choose("auto", dtype=dtype, widths={"the width of its heads": checkpoint.config.head_width}).kernel
    return BaseModel(checkpoint.config, dtype, kernel, tile(jax.default_backend())), params


def _open(path: Path) -> Checkpoint:
    return gguf_file.open_checkpoint(path) if is_gguf(path) else huggingface.open_checkpoint(path)


def _require_equal(path: str | Path, config: BaseConfig, own: BaseConfig) -> None:
    names = [item.name for item in dataclasses.fields(own)]
    other = [name for name in names if getattr(config, name) != getattr(own, name)]
    differences = ", ".join(f"base.{name} {getattr(config, name)} instead of {getattr(own, name)}" for name in other)
    require(not other, f"{path} is another model: {differences}. Take the settings from read_config")
