"""Hugging Face folders: `config.json`, and safetensors (extra `hf`)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lensjax._settings import require
from lensjax.models.base_lm import BaseConfig
from lensjax.models.checkpoints.files import INDEX, read_json, weight_files, weight_map
from lensjax.models.checkpoints.tensors import Checkpoint
from lensjax.models.nn.rope import NO_SCALING, RopeScaling

DTYPES = ("F32", "F16", "BF16")

# Keys that are read below, and keys that change nothing that a model computes of given tokens.
READ = {
    *("architectures", "head_dim", "hidden_size", "intermediate_size", "layer_types", "model_type"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
    *("rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size"),
}
NEUTRAL = {
    *("_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range"),
    *("max_position_embeddings", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp"),
    *("return_dict", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_version", "use_cache"),
}
ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPE_KINDS = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH)}


@dataclass(frozen=True)
class Family:
    """What one `model_type` computes beyond the sizes in its `config.json`."""

    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its `BaseConfig`, the same for all of the family."""
    tied: bool = False
    """Whether the head is tied where nothing is said of it."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Key and value of the activation."""
    theta: float | None = None
    """Base of the rotary frequencies where nothing is said of it, as files of before version 5 may."""
    norm_offset: float = 0.0
    """What is added to the weights of norms."""
    local: bool = False
    """Whether some layers see a window alone."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of its own, with the values that leave its function as it is here."""
    required: tuple[str, ...] = ()
    """Keys without which it means something that is not here."""
    unused: tuple[str, ...] = ()
    """Keys of its own that change nothing while those in `fixed` hold."""


_COMMON = {"quantization_config": (None,), "is_decoder": (True, False)}
_GROUPED = ("num_key_value_heads",)
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        theta=10_000.0,
        fixed={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "is_llama_config": (True,),
            "rope_interleaved": (False,),
        },
    ),
    "mistral": Family("MistralForCausalLM", fixed={"sliding_window": (None,)}, required=("sliding_window", *_GROUPED)),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        settings={"qkv_bias": True},
        fixed={"use_sliding_window": (False,), "use_mrope": (False,)},
        required=_GROUPED,
        unused=("sliding_window", "max_window_layers"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        settings={"qk_norm": True},
        fixed={"use_sliding_window": (False,), "attention_bias": (False,)},
        required=(*_GROUPED, "head_dim"),
        unused=("sliding_window", "max_window_layers"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        settings={"qk_norm": True, "post_norms": True, "scale_embedding": True, "activation": "gelu_tanh"},
        tied=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        theta=1_000_000.0,
        norm_offset=1.0,
        local=True,
        fixed={
            "attention_bias": (False,),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        required=(*_GROUPED, "head_dim", "hidden_activation", "query_pre_attn_scalar", "sliding_window"),
        unused=("cache_implementation", "_sliding_window_pattern"),
    ),
}
LOCAL = {"query_pre_attn_scalar", "rope_local_base_freq", "sliding_window", "sliding_window_pattern"}
"""Keys of a family with local layers, which are read below."""
LOCAL_THETA, GLOBAL_EVERY = 10_000.0, 6
"""What such a family has where nothing is said of it."""


def read_config(path: Path) -> BaseConfig:
    """Settings of a folder's model, from its `config.json`.

    Raises:
      ValueError: a key is unknown, missing, or has a value that means another function.
    """
    source, raw, family = _known(path)
    dim, heads = _whole(source, raw, "hidden_size"), _whole(source, raw, "num_attention_heads")
    head_dim = None if raw.get("head_dim") is None else _whole(source, raw, "head_dim")
    layers = _whole(source, raw, "num_hidden_layers")
    grouped = raw.get("num_key_value_heads") is not None
    try:
        return BaseConfig(
            vocab_size=_whole(source, raw, "vocab_size"),
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=_whole(source, raw, "num_key_value_heads") if grouped else heads,
            head_dim=None if head_dim is None or head_dim * heads == dim else head_dim,
            mlp_dim=_whole(source, raw, "intermediate_size"),
            norm_eps=_number(source, raw, "rms_norm_eps"),
            conv_width=0,
            tied=_flag(source, raw, "tie_word_embeddings", family.tied),
            **_positions(source, raw, family, layers),
            **family.settings,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if str(source) not in str(error) else str(error)) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the weights of a folder; only their names, types and shapes are read yet.

    Raises:
      ValueError: `config.json` is none that is covered, a file is absent or broken, a tensor has another type, or
        there are more tokens than rows of the embedding.
      ImportError: the extra `hf` is not installed.
    """
    config = read_config(path)
    change = _norms(path, config)
    _check_tokens(path, config)
    files = weight_files(path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("checkpoints in a folder need safetensors: pip install 'lensjax[hf]'") from error
    where: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            opened = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): fetch it again") from error
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            require(name not in where, f"{path} has {name} in two files, one of them {file.name}")
            entry = opened.get_slice(name)
            require(
                entry.get_dtype() in DTYPES,
                f"{file}: {name} must be one of {', '.join(DTYPES)}, got {entry.get_dtype()}: quantised weights are "
                "read from GGUF files alone",
            )
            where[name], shapes[name] = opened, tuple(entry.get_shape())
    if files[0].name != "model.safetensors":
        absent = sorted(set(weight_map(path)) - set(shapes))
        require(not absent, f"{path / INDEX} names {', '.join(absent[:4])}, which its files do not hold")

    def read(name: str) -> np.ndarray:
        return change(name, where[name].get_tensor(name))

    return Checkpoint(str(path), config, shapes, read)


def _known(path: Path) -> tuple[Path, Mapping[str, Any], Family]:
    """The settings of a folder: their file, what it holds, and of which family they are."""
    source = path / "config.json"
    raw = read_json(source)
    kind = raw.get("model_type")
    require(
        isinstance(kind, str) and kind in FAMILIES,
        f"{source}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}",
    )
    _check_keys(source, raw, str(kind), FAMILIES[str(kind)])
    return source, raw, FAMILIES[str(kind)]


def _norms(path: Path, config: BaseConfig) -> Callable[[str, np.ndarray], np.ndarray]:
    """What a tensor of a name becomes: a norm's weight the whole factor, which for queries holds their scale, too."""
    source, raw, family = _known(path)
    scale = 1.0
    if "query_pre_attn_scalar" in raw:
        scale = math.sqrt(config.head_width / _number(source, raw, "query_pre_attn_scalar"))

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        if not name.endswith("norm.weight"):
            return tensor
        # Rotations and products with keys are linear in what the norm of queries gives.
        whole = np.asarray(tensor, np.float32) + np.float32(family.norm_offset)
        return whole * np.float32(scale) if name.endswith("q_norm.weight") else whole

    return change


def _check_keys(source: Path, raw: Mapping[str, Any], kind: str, family: Family) -> None:
    activation, value = family.activation
    fixed = {**_COMMON, activation: (value,), **family.fixed}
    known = READ | NEUTRAL | set(fixed) | set(family.unused) | (LOCAL if family.local else set())
    unknown = sorted(set(raw) - known)
    require(
        not unknown,
        f"{source}: {', '.join(unknown)}: not known for model_type {kind}, and may change what the model computes",
    )
    for key in family.required:
        require(key in raw, f"{source}: {key} is missing, and model_type {kind} needs it")
    for key, allowed in fixed.items():
        if key in raw:
            value = raw[key]
            fine = any(value is one or (isinstance(one, str) and value == one) for one in allowed)
            choices = " or ".join("null" if one is None else str(one).lower() for one in allowed)
            require(fine, f"{source}: {key} must be {choices}, got {value!r}: anything else is another function")
    architectures = raw.get("architectures") or [family.architecture]
    require(
        architectures == [family.architecture],
        f"{source}: architectures must be [{family.architecture!r}], got {architectures!r}",
    )


def _positions(source: Path, raw: Mapping[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """Rotary positions, and which layers are local."""
    newer = raw.get("rope_parameters")
    older = ("rope_theta", "rope_scaling", *(["rope_local_base_freq"] if family.local else []))
    clash = [key for key in older if newer is not None and raw.get(key) is not None]
    require(not clash, f"{source}: {', '.join(clash)} beside rope_parameters; keep one of them")
    every = _global_every(source, raw, family, layers)
    if not family.local:
        theta, scaling = _rope(source, raw, family, "rope_parameters", newer)
        return {"rope_theta": theta, "rope_scaling": scaling}
    whole, part = "rope_parameters.full_attention", "rope_parameters.sliding_attention"
    local = LOCAL_THETA
    if newer is None:
        theta, scaling = _rope(source, raw, family, whole, None)
        local = _number(source, raw, "rope_local_base_freq", default=LOCAL_THETA)
    else:
        kinds = {"full_attention", "sliding_attention"}
        require(
            isinstance(newer, dict) and set(newer) == kinds,
            f"{source}: rope_parameters must hold {' and '.join(sorted(kinds))}, got {newer!r}",
        )
        theta, scaling = _rope(source, raw, family, whole, newer["full_attention"])
        local, unscaled = _rope(source, raw, family, part, newer["sliding_attention"])
        require(unscaled == NO_SCALING, f"{source}: {part}.rope_type must be default: local layers are not scaled")
    found = {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local, "global_every": every}
    return found | {"window": None if every == 1 else _whole(source, raw, "sliding_window")}


def _global_every(source: Path, raw: Mapping[str, Any], family: Family, layers: int) -> int:
    """Which layers see all that came before: every so many-th one."""
    kinds = raw.get("layer_types")
    every = 1
    if family.local and kinds is None:
        every = _whole(source, {"sliding_window_pattern": GLOBAL_EVERY, **raw}, "sliding_window_pattern")
    elif family.local and isinstance(kinds, list):
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else layers + 1
    if kinds is not None:
        fits = isinstance(kinds, list) and len(kinds) == layers and kinds == _kinds(layers, every)
        rule = "full_attention in every so many-th" if family.local else "full_attention in each"
        require(fits, f"{source}: layer_types must be {rule} of {layers} layers, got {kinds!r}")
    return every


def _kinds(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(1, layers + 1)]


def _rope(source: Path, raw: Mapping[str, Any], family: Family, name: str, newer: Any) -> tuple[float, RopeScaling]:
    """Base of the rotary frequencies, and how they are scaled: as `newer` says, which has a name, or else as before."""
    where, settings, owner = (f"{name}.", newer, newer)
    if newer is None:
        where, settings, owner = "rope_scaling.", raw.get("rope_scaling") or {}, raw
    require(isinstance(settings, dict), f"{source}: {where[:-1]} must be an object, got {settings!r}")
    kind = settings.get("rope_type", settings.get("type", "default"))
    require(
        isinstance(kind, str) and kind in ROPE_KINDS,
        f"{source}: {where}rope_type must be one of {', '.join(ROPE_KINDS)}, got {kind!r}",
    )
    default = family.theta if newer is None else None
    theta = _number(source, owner, "rope_theta", where if newer is not None else "", default)
    unknown = sorted(set(settings) - {"rope_type", "type", "rope_theta", *ROPE_KINDS[kind]})
    require(not unknown, f"{source}: {where}{unknown[0] if unknown else ''} is not known for rope_type {kind}")
    if kind == "default":
        return theta, NO_SCALING
    return theta, RopeScaling(
        "llama3",
        factor=_number(source, settings, "factor", where),
        low=_number(source, settings, "low_freq_factor", where),
        high=_number(source, settings, "high_freq_factor", where),
        original_length=_whole(source, settings, ORIGINAL_LENGTH, where),
    )


def _check_tokens(path: Path, config: BaseConfig) -> None:
    """Refuses a tokenizer with more tokens than the embedding has rows; padded embeddings have more rows."""
    source = path / "tokenizer.json"
    if not source.exists():
        return
    raw = read_json(source)
    vocabulary = (raw.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token.get("id") for token in raw.get("added_tokens") or []]
    require(all(isinstance(one, int) for one in ids), f"{source} has tokens without a number")
    most = max(ids, default=-1)
    require(
        most < config.vocab_size,
        f"{source} has a token of number {most}, but config.json says vocab_size {config.vocab_size}: the two are of "
        "different models",
    )


def _whole(source: Path, raw: Mapping[str, Any], key: str, where: str = "") -> int:
    value = raw.get(key)
    require(
        isinstance(value, int) and not isinstance(value, bool) and value > 0,
        f"{source}: {where}{key} must be a whole number above 0, got {value!r}",
    )
    return int(value or 0)


def _number(source: Path, raw: Mapping[str, Any], key: str, where: str = "", default: float | None = None) -> float:
    value = raw.get(key, default)
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    require(fine, f"{source}: {where}{key} must be a number above 0, got {value!r}")
    return float(value or 0)


def _flag(source: Path, raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key, default)
    require(isinstance(value, bool), f"{source}: {key} must be true or false, got {value!r}")
    return bool(value)
