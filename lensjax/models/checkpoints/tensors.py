"""From the tensors of a checkpoint to the parameters of a `BaseModel`."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax._settings import require
from lensjax.models.base_lm import BaseConfig, BaseModel
from lensjax.models.interfaces import Params

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Path = tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, its tensors by the names that Hugging Face gives them."""

    source: str
    """What messages call it."""
    config: BaseConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Of each tensor; matrices are [outputs, inputs]."""
    read: Callable[[str], np.ndarray]
    """One tensor, rotary pairs being the two halves of a head."""


def load(checkpoint: Checkpoint, dtype: str) -> Params:
    """Parameters for `BaseModel(checkpoint.config)`, checked as a whole and then read one by one.

    Raises:
      ValueError: a tensor is missing, left over or of another shape.
    """
    leaves, shapes = _accounted(checkpoint)
    params: dict[str, Any] = {}
    for path, names in leaves.items():
        parent = params
        for name in path[:-1]:
            parent = parent.setdefault(name, {})
        parts = [checkpoint.read(name) for name in names]
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        stored = jnp.dtype(dtype) if whole.ndim > 1 else jnp.dtype(jnp.float32)
        # A copy in rows: on a CPU the device may keep the very array that it is given.
        value = np.array(whole.T if path[-1] == "kernel" else whole, stored, order="C")
        assert value.shape == shapes[path]
        parent[path[-1]] = jax.device_put(value)
    return params


def _leaves(config: BaseConfig) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Where each parameter stands, and the tensors that it is made of, one after the other."""
    yield ("embedding", "embedding"), (EMBEDDING,)
    for layer in range(config.layers):
        block, prefix = ("transformer", f"block_{layer}"), f"model.layers.{layer}."
        yield (*block, "attention_norm", "scale"), (f"{prefix}input_layernorm.weight",)
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            own, name = (*block, "attention", ours), f"{prefix}self_attn.{theirs}_proj"
            yield (*own, "kernel"), (f"{name}.weight",)
            if config.qkv_bias and ours != "out":
                yield (*own, "bias"), (f"{name}.bias",)
            if config.qk_norm and ours in ("query", "key"):
                yield (*block, "attention", f"{ours}_norm", "scale"), (f"{prefix}self_attn.{theirs}_norm.weight",)
        before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        yield (*block, "mlp_norm", "scale"), (f"{prefix}{before_mlp}.weight",)
        if config.post_norms:
            yield (*block, "attention_post_norm", "scale"), (f"{prefix}post_attention_layernorm.weight",)
            yield (*block, "mlp_post_norm", "scale"), (f"{prefix}post_feedforward_layernorm.weight",)
        yield (*block, "mlp", "gate_up", "kernel"), (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        yield (*block, "mlp", "down", "kernel"), (f"{prefix}mlp.down_proj.weight",)
    yield ("norm", "scale"), ("model.norm.weight",)
    if not config.tied:
        yield ("head", "kernel"), (HEAD,)


def _accounted(checkpoint: Checkpoint) -> tuple[dict[Path, tuple[str, ...]], dict[Path, tuple[int, ...]]]:
    """Tensors and shape of each parameter, after a check that the tensors are those, all of them and no others."""
    source, config, found = checkpoint.source, checkpoint.config, dict(checkpoint.shapes)
    layers = {match[1] for name in found if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    require(len(layers) == config.layers, f"{source} has {len(layers)} layers, its settings say {config.layers}")
    if config.tied and HEAD in found:
        del found[HEAD]
        same = np.array_equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING))
        require(
            same,
            f"{source} ties its head to the embedding, but {HEAD} differs from {EMBEDDING}: one of the two is wrong, "
            "tie_word_embeddings or the tensor",
        )
    leaves = dict(_leaves(config))
    names = [name for parts in leaves.values() for name in parts]
    missing, extra = [name for name in names if name not in found], sorted(set(found) - set(names))
    require(not missing, f"{source} lacks {_listed(missing)}")
    require(not extra, f"{source} has tensors that its model_type does not use: {_listed(extra)}")
    shapes: dict[Path, tuple[int, ...]] = {}
    tree = jax.eval_shape(lambda: BaseModel(config).init(jax.random.key(0)))
    for path, leaf in jax.tree.leaves_with_path(tree):
        keys = tuple(entry.key for entry in path)
        parts = leaves[keys]
        shape = leaf.shape[::-1] if keys[-1] == "kernel" else leaf.shape
        expected = (shape[0] // len(parts), *shape[1:])
        for name in parts:
            require(
                found[name] == expected,
                f"{source}: {name} must have shape {list(expected)} by its settings, got {list(found[name])}",
            )
        shapes[keys] = leaf.shape
    return leaves, shapes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
