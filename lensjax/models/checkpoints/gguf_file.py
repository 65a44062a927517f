"""GGUF files (extra `gguf`): one file with settings, tokenizer and weights, most often quantised."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from lensjax._settings import require
from lensjax.models.base_lm import BaseConfig
from lensjax.models.checkpoints.tensors import Checkpoint
from lensjax.models.nn.rope import NO_SCALING, RopeScaling

# Whether the rows of queries and keys are those of interleaved rotary pairs, and what else an architecture has.
FAMILIES = {
    "llama": {"interleaved": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Namespaces of keys that change nothing that a model computes of given tokens.
NEUTRAL = ("GGUF.", "general.", "tokenizer.", "quantize.")
ROPE_FACTORS = "rope_freqs.weight"


def read_config(path: Path) -> BaseConfig:
    """Settings of a file's model.

    Raises:
      ValueError: the file is not whole, or a key is unknown, missing, or has a value that means another function.
      ImportError: the extra `gguf` is not installed.
    """
    return _config(path, _reader(path))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a file; weights are read, and dequantised, one tensor at a time.

    Raises:
      ValueError: as `read_config`; or a tensor has a type that is not read.
      ImportError: the extra `gguf` is not installed.
    """
    reader = _reader(path)
    config, tensors = _config(path, reader), {_name(tensor.name): tensor for tensor in reader.tensors}
    tensors.pop(ROPE_FACTORS, None)
    for tensor in tensors.values():
        require(
            tensor.tensor_type.name in TYPES,
            f"{path}: {tensor.name} must be one of {', '.join(TYPES)}, got {tensor.tensor_type.name}",
        )
    interleaved = bool(FAMILIES[_architecture(path, reader)].get("interleaved"))

    def read(name: str) -> np.ndarray:
        from gguf import dequantize

        weight = dequantize(tensors[name].data, tensors[name].tensor_type)
        return _halves(weight, config.head_width) if interleaved and re.search(r"\.[qk]_proj\.", name) else weight

    shapes = {name: tuple(int(length) for length in tensor.shape[::-1]) for name, tensor in tensors.items()}
    return Checkpoint(str(path), config, shapes, read)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files need gguf: pip install 'lensjax[gguf]'") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, TypeError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({error}): fetch it again") from error


def _architecture(path: Path, reader: Any) -> str:
    found = reader.fields.get("general.architecture")
    kind = found.contents() if found else None
    require(kind in FAMILIES, f"{path}: general.architecture must be one of {', '.join(FAMILIES)}, got {kind!r}")
    return str(kind)


def _config(path: Path, reader: Any) -> BaseConfig:
    kind = _architecture(path, reader)
    left = {name: field for name, field in reader.fields.items() if not name.startswith(NEUTRAL)}

    def number(key: str, default: float | None = None) -> float:
        field = left.pop(f"{kind}.{key}", None)
        value = field.contents() if field else default
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        require(fine, f"{path}: {kind}.{key} must be one number above 0, got {value!r}")
        return float(value or 0)

    dim, heads = int(number("embedding_length")), int(number("attention.head_count"))
    width = int(number("attention.key_length", dim // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        found = int(number(key, width))
        require(found == width, f"{path}: {kind}.{key} must be the width of a head, {width}, got {found}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0
    rows = int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else tokens
    vocabulary = int(number("vocab_size", rows))
    require(
        tokens <= vocabulary,
        f"{path} has {tokens} tokens, but says {kind}.vocab_size {vocabulary}: the two are of different models",
    )
    theta = number("rope.freq_base", 10_000.0)
    number("context_length", 1)
    extra = {key: value for key, value in FAMILIES[kind].items() if key != "interleaved"}
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "dim": dim,
        "layers": int(number("block_count")),
        "heads": heads,
        "kv_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": None if width * heads == dim else width,
        "mlp_dim": int(number("feed_forward_length")),
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "conv_width": 0,
        "tied": "output.weight" not in tensors,
        "rope_theta": theta,
        "rope_scaling": _scaling(path, tensors.get(ROPE_FACTORS), width, theta),
        **extra,
    }
    require(not left, f"{path}: {', '.join(sorted(left))}: not known, and may change what the model computes")
    try:
        return BaseConfig(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _scaling(path: Path, tensor: Any, width: int, theta: float) -> RopeScaling:
    """The settings behind the factors that frequencies are divided by: those of Llama 3, with any largest factor."""
    if tensor is None:
        return NO_SCALING
    found = np.asarray(tensor.data, np.float32).reshape(-1)
    scaling = RopeScaling("llama3", factor=max(1.0, float(np.nanmax(found))))
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    expected = frequencies / scaling(frequencies)
    require(
        found.shape == expected.shape and np.allclose(found, expected, rtol=1e-3),
        f"{path}: {ROPE_FACTORS} is not that of Llama 3 (low 1, high 4, original length 8192)",
    )
    return scaling


def _name(name: str) -> str:
    """What Hugging Face calls a tensor; a name that is not known stays as it is."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in PARTS:
        return f"model.layers.{match[1]}.{PARTS[match[2]]}.{match[3]}"
    return NAMES.get(name, name)


def _halves(weight: np.ndarray, width: int) -> np.ndarray:
    """Rows of queries or keys, from neighbouring rotary pairs to pairs of the two halves of a head."""
    heads = weight.reshape(-1, width // 2, 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)
