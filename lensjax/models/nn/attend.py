"""The one door to attention: XLA's own, and two fused kernels that never hold the weights.

    xla      any device and dtype, and what the others are held against
    cudnn    NVIDIA's flash attention (Ampere or newer), in bfloat16 or float16
    splash   a Pallas kernel on a TPU

A fused kernel reads whole sequences whose length is a multiple of `TILE`, and no mask of all pairs. So it takes every
attention of all entries to all, or to all before; a few rows of a sequence, or of a cache, are XLA's in any case.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import backend
from jax.typing import DTypeLike

from lensjax._settings import require

Kernel = Literal["xla", "cudnn", "splash"]
Setting = Literal["auto", "xla", "cudnn", "splash"]

TILE = 128
"""Entries come to a fused kernel in multiples of it. cuDNN refuses odd lengths in its backward pass, and its gradients
have been NaN where 64 entries were left over."""
_BLOCKS = (512, 384, 256, TILE)
"""Sizes of the blocks of splash attention, the best first."""
_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)
# Smaller blocks of queries would keep a GPU waiting, more of them the compiler.
_MIN_BLOCK, _MAX_BLOCKS = 128, 8


@dataclass(frozen=True)
class Choice:
    """What attention is computed by on this machine."""

    kernel: Kernel
    reason: str = ""
    """Why it is not the fused kernel that such a device has."""

    def __str__(self) -> str:
        return f"attention {self.kernel}" + (f" ({self.reason})" if self.reason else "")


def choose(attention: Setting, *, dtype: DTypeLike, widths: Mapping[str, int]) -> Choice:
    """What computes attention here: `auto` takes the fused kernel of the device where that serves, else XLA.

    Args:
      attention: the setting.
      dtype: of queries, keys and values.
      widths: widths of the attention heads, by the name of what sets them.

    Returns:
      `Choice`.

    Raises:
      ValueError: a kernel is asked for that cannot serve; says why.

    Example:
      >>> from lensjax.models.nn.attend import choose
      >>> str(choose("auto", dtype="bfloat16", widths={"base.head_dim": 64}))  # on a CPU
      'attention xla'
    """
    platform = _platform()
    if attention == "auto":
        fused: Mapping[str, Kernel] = {"cuda": "cudnn", "tpu": "splash"}
        kernel = fused.get(platform, "xla")
        reason = _refusal(kernel, platform, dtype, widths)
        return Choice(kernel) if reason is None else Choice("xla", reason)
    reason = _refusal(attention, platform, dtype, widths)
    require(reason is None, f"attention must be auto or xla where {reason}, got {attention}")
    return Choice(attention)


def tile(platform: str) -> int:
    """What a context's entries are padded to a multiple of: the rows that a device multiplies at once.

    On a GPU XLA puts the transposition of [heads, S, width] to [S, heads * width] into the product that follows. Over
    contexts of S entries side by side that is a product of tiles of 16 rows or more, which the compiler of JAX 0.10
    cannot cut where S is no multiple of 16 ("Couldn't find output tile sizes").
    """
    return 1 if platform == "cpu" else 16


def _platform() -> str:
    """The kind of device that JAX computes on: cpu, cuda, rocm, tpu."""
    found = backend.get_backend()
    if found.platform != "gpu":
        return str(found.platform)
    return "cuda" if "cuda" in found.platform_version else "rocm"


def _refusal(kernel: Kernel, platform: str, dtype: DTypeLike, widths: Mapping[str, int]) -> str | None:
    """Why a kernel cannot serve here; None where it can."""
    if kernel == "xla":
        return None
    home = {"cudnn": "cuda", "splash": "tpu"}[kernel]
    if platform != home:
        return f"{kernel} needs {home}, and this JAX computes on {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{kernel} reads bfloat16, and dtype is {jnp.dtype(dtype)}"
    odd = next((f"{name} is {width}" for name, width in widths.items() if width % 8), None)
    if odd is not None:
        return f"{kernel} needs heads of a multiple of 8, and {odd}"
    if kernel == "splash":
        count = jax.device_count()
        return None if count == 1 else f"splash runs on one device, and {count} share a batch"
    return _refusal_of_cudnn(dtype, widths)


def _refusal_of_cudnn(dtype: DTypeLike, widths: Mapping[str, int]) -> str | None:
    capability = str(jax.local_devices()[0].compute_capability)
    if int(capability.partition(".")[0]) < 8:
        return f"cudnn needs compute capability 8.0, and this device has {capability}"
    try:  # tracing alone: JAX asks which cuDNN there is, and whether that has these heads
        for width in widths.values():
            heads = jax.ShapeDtypeStruct((TILE, 1, width), dtype)
            jax.eval_shape(lambda q: jax.vjp(lambda q: _cudnn(q, q, q, causal=True, valid=None), q)[0], heads)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"cudnn cannot serve ({str(error).partition(chr(10))[0]})"
    return None


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    rows: Array | None = None,
    valid: Array | None = None,
    near: Array | None = None,
    kernel: Kernel = "xla",
) -> Array:
    """Mixes values by how queries and keys agree.

        mixed[r, h] = sum_s softmax_s(q[r, h] . k[s, g] / sqrt(d)) v[s, g],   g = h // (heads / kv_heads)

    Args:
      query: [R, heads, d].
      key: [S, kv_heads, d].
      value: [S, kv_heads, d].
      causal: whether query r sees only the entries up to `rows[r]`.
      rows: int32[R], which entries ask; None where all do, R = S.
      valid: bool[S], the entries that are seen where attention is not causal; None for all. Where none is valid the
        result is finite and means nothing.
      near: bool[R, S], where attention is causal, which of the earlier entries each query sees; None for all.
      kernel: what computes it. With `rows` or `near` it is XLA.

    Returns:
      [R, heads * d].
    """
    # JAX's implementation mixes bfloat16 with float32 (its softmax), which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        if kernel == "xla" or rows is not None or near is not None:
            mixed = _xla(query, key, value, causal=causal, rows=rows, valid=valid, near=near)
        else:
            fused = _cudnn if kernel == "cudnn" else _splash
            mixed = fused(query, key, value, causal=causal, valid=valid)
    return mixed.reshape(query.shape[0], -1)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    rows: Array | None,
    valid: Array | None,
    near: Array | None,
) -> Array:
    if causal and rows is None:
        return _xla_to_earlier(query, key, value, near)
    seen = None if valid is None else valid[None, :]
    if causal and rows is not None:
        seen = up_to(rows, key.shape[0], near)
    return _dot(query, key, value, seen)


def _xla_to_earlier(query: Array, key: Array, value: Array, near: Array | None) -> Array:
    """Causal attention of every entry, a block of queries at a time: no later key is multiplied, only to be masked.

    That is half of the products, and a block's logits stay in a processor's cache.
    """
    length, parts = query.shape[0], []
    size = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    for start in range(0, length, size):
        end = min(start + size, length)
        earlier = up_to(jnp.arange(start, end), end, None if near is None else near[start:end, :end])
        parts.append(_dot(query[start:end], key[:end], value[:end], earlier))
    return jnp.concatenate(parts)


def _dot(query: Array, key: Array, value: Array, seen: Array | None) -> Array:
    """Attention [R, heads, d] to what bool[R, S] or [1, S] says is seen.

    Heads come first, the queries of a group side by side, so that small arrays are transposed and not the weights; and
    what is divided by the sum of the weights is their product with the values, which is smaller than they are.
    """
    (count, heads, width), kv_heads = query.shape, key.shape[1]
    grouped = query.reshape(count, kv_heads, -1, width).transpose(1, 2, 0, 3)
    logits = jnp.einsum(
        "gqd,gsd->gqs",
        grouped.reshape(kv_heads, -1, width),
        key.swapaxes(0, 1),
        preferred_element_type=jnp.float32,
    ).reshape(*grouped.shape[:3], -1)
    logits = logits * width**-0.5
    if seen is not None:
        # Finite, so that what sees nothing is the mean of all.
        logits = jnp.where(seen[None, None], logits, _NEVER)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "gqs,gsd->gqd",
        weights.reshape(kv_heads, -1, weights.shape[-1]).astype(value.dtype),
        value.swapaxes(0, 1),
        preferred_element_type=jnp.float32,
    ).reshape(grouped.shape)
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return mixed.transpose(2, 0, 1, 3).reshape(count, heads, width).astype(value.dtype)


def up_to(rows: Array, length: int, near: Array | None = None) -> Array:
    """bool[R, S]: whether each of `rows` may see each of S entries in causal order, or of those that are near."""
    earlier = jnp.arange(length)[None, :] <= rows[:, None]
    return earlier if near is None else earlier & near


def _cudnn(query: Array, key: Array, value: Array, *, causal: bool, valid: Array | None) -> Array:
    """cuDNN's kernel, told by lengths alone what is seen.

    Causal padding comes last, where no entry sees it. Otherwise the entries that are seen come first: in which order
    they stand does not matter to attention.
    """
    count = query.shape[0]
    lengths: dict[str, Any] = {}
    if not causal and (valid is not None or count % TILE):
        seen = jnp.asarray(count, jnp.int32)
        if valid is not None:
            key, value = _first(valid, key, value)
            seen = jnp.maximum(valid.sum(dtype=jnp.int32), 1)
        # Never true. Under `vmap` JAX wants lengths that are mapped wherever the queries are.
        seen = seen + (query[0, 0, 0] > jnp.inf).astype(jnp.int32)
        whole = seen * 0 + _padded_length(count)
        lengths = {"query_seq_lengths": whole[None], "key_value_seq_lengths": seen[None]}
    query, key, value = (_pad(heads) for heads in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal, **lengths, implementation="cudnn")
    return mixed[:count]


def _first(valid: Array, *entries: Array) -> list[Array]:
    """Entries in another order: those that are valid, and then the others."""
    order = jnp.argsort(~valid, stable=True)
    return [each.at[order].get(unique_indices=True, mode="promise_in_bounds") for each in entries]


def _splash(query: Array, key: Array, value: Array, *, causal: bool, valid: Array | None) -> Array:
    """Splash attention: what is not valid, or padding, belongs to another segment than the queries do."""
    # Pallas takes a second to import, and few machines have a TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    count, heads, width = query.shape
    length = _padded_length(count)
    segments: Any = None
    if not causal and (valid is not None or length > count):
        seen = jnp.ones(count, bool) if valid is None else valid.at[0].set(valid[0] | ~valid.any())
        segments = splash.SegmentIds(q=jnp.ones(length, jnp.int32), kv=_pad(seen.astype(jnp.int32)))
    kind = masks.CausalMask if causal else masks.FullMask
    block = next(size for size in _BLOCKS if length % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([kind((length, length))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    scaled = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    turned = (_pad(each).swapaxes(0, 1) for each in (scaled, key, value))
    return kernel(*turned, segment_ids=segments).swapaxes(0, 1)[:count]


def _padded_length(count: int) -> int:
    return -(-count // TILE) * TILE


def _pad(entries: Array) -> Array:
    """The entries [S, ...] and zeros behind them, up to a multiple of `TILE`."""
    count = entries.shape[0]
    return jnp.pad(entries, [(0, _padded_length(count) - count)] + [(0, 0)] * (entries.ndim - 1))
