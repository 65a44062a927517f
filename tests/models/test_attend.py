"""Attention by each kernel: what cuDNN and splash are given is what XLA's own computes.

cuDNN does not run here. Its arguments do: XLA's implementation takes the very same ones. Splash runs in the interpreter
of Pallas. That both are in the compiled step is shown by `tests/training/test_lowering.py`.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.models import BaseModel, build_models
from lensjax.models.base_lm import BaseConfig
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.models.nn import attend
from tests import lowered
from tests.models.example_models import (
    BASE,
    LENS,
    ROWS,
    assert_close,
    base_inputs,
    gradients,
    lens_inputs,
    lens_model,
    trained,
)
from tests.small import jit

DOT = jax.nn.dot_product_attention
FORMS = {"causal": (True, False), "some are valid": (False, True), "all": (False, False)}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """Hands what is meant for cuDNN to XLA, and holds it to what cuDNN can do; gives the lengths it was called with."""
    lengths = []

    def dot(query: Any, key: Any, value: Any, *, implementation: str | None = None, **options: Any) -> jax.Array:
        if implementation == "cudnn":
            assert query.shape[0] % 128 == key.shape[0] % 128 == 0 and "mask" not in options and "bias" not in options
            assert len({name for name in options if name.endswith("seq_lengths")}) in (0, 2)
            lengths.append((query.shape[0], key.shape[0]))
        return DOT(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot)
    return lengths


@pytest.fixture
def splash_interpreted(monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))


def heads(length: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Queries of 4 heads, keys and values of 2, for 2 x 2 sequences, and which entries are valid: some in between."""
    random = np.random.default_rng(length)
    shapes = [(2, 2, length, count, 16) for count in (4, 2, 2)]
    valid = random.random((2, 2, length)) < 0.7
    return (*(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes), jnp.asarray(valid))


def mixed_and_gradients(kernel: attend.Kernel, form: tuple[bool, bool], *inputs: jax.Array) -> list[np.ndarray]:
    """What comes out, and the gradients of queries, keys and values, over sequences of a batch of variants."""
    causal, masked = form

    def one(query, key, value, valid):
        mix = functools.partial(attend.attend, causal=causal, valid=valid if masked else None, kernel=kernel)
        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(jnp.cos(jnp.arange(mixed.size, dtype=mixed.dtype)).reshape(mixed.shape))

    with jax.numpy_dtype_promotion("standard"):  # JAX's gradient in bfloat16
        return [np.asarray(array, np.float32) for array in jit(jax.vmap(jax.vmap(one)))(*inputs)]


def assert_same(kernel: attend.Kernel, form: tuple[bool, bool], *inputs: jax.Array, tolerance: float = 1e-5) -> None:
    ours, theirs = (mixed_and_gradients(name, form, *inputs) for name in (kernel, "xla"))
    for one, other in zip(ours, theirs, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


@forms
@pytest.mark.parametrize(("length", "dtype"), [(9, jnp.float32), (192, jnp.float32), (9, jnp.bfloat16)])
def test_xla_is_attention(form, length, dtype):
    """By JAX's own implementation, with a mask of all pairs."""
    (causal, masked), (*qkv, valid) = form, heads(length, dtype)

    def mixed_and_gradients(mix):
        mixed, pull = jax.vjp(mix, *(array[0, 0] for array in qkv))
        return mixed, *pull(jnp.cos(jnp.arange(mixed.size, dtype=dtype)).reshape(mixed.shape))

    def plainly(query, key, value):
        mask = valid[0, 0][None, None, :] if masked else None
        return DOT(query, key, value, mask=mask, is_causal=causal).reshape(length, -1)

    ours = functools.partial(attend.attend, causal=causal, valid=valid[0, 0] if masked else None)
    with jax.numpy_dtype_promotion("standard"):
        found = jit(lambda: (mixed_and_gradients(ours), mixed_and_gradients(plainly)))()
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for one, other in zip(*found, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype("f"), other.astype("f"), atol=tolerance, rtol=tolerance)


@forms
@pytest.mark.parametrize("length", [9, 192])
def test_what_cudnn_is_given_is_attention(cudnn_by_xla, form, length):
    assert_same("cudnn", form, *heads(length))
    assert set(cudnn_by_xla) == {(-(-length // 128) * 128,) * 2}


@pytest.mark.slow
@forms
@pytest.mark.parametrize("length", [9, 192])
def test_splash_is_attention(splash_interpreted, form, length):
    assert_same("splash", form, *heads(length))


@pytest.mark.parametrize("kernel", ["cudnn", pytest.param("splash", marks=pytest.mark.slow)])
def test_where_nothing_is_valid_all_is_finite(cudnn_by_xla, splash_interpreted, kernel):
    query, key, value, _ = heads(9)
    found = mixed_and_gradients(kernel, (False, True), query, key, value, jnp.zeros((2, 2, 9), bool))
    assert all(np.isfinite(array).all() for array in found)


@forms
def test_cudnn_lowers_under_two_vmaps_whatever_is_mapped(form):
    """JAX folds the mapped axes into one; it wants the lengths to be mapped as the heads are."""
    (causal, masked), (query, key, value, valid) = form, heads(9, jnp.bfloat16)
    mix = functools.partial(attend.attend, causal=causal, kernel="cudnn", valid=valid[0, 0] if masked else None)

    def loss(query, key, value):
        return jnp.sum(mix(query, key, value).astype(jnp.float32) ** 2)

    gradient = jax.vmap(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))
    assert lowered.custom_calls(gradient, query, key, value, platform="cuda") == {
        "__cudnn$fmhaSoftmax": 1,
        "__cudnn$fmhaSoftmaxBackward": 1,
    }


def with_kernel(model: Any, kernel: attend.Kernel) -> Any:
    return dataclasses.replace(model, kernel=kernel)


def test_a_base_model_and_its_gradients_by_cudnn(cudnn_by_xla):
    theirs = BaseModel(dataclasses.replace(BASE, copy_heads=1))
    ours, params = with_kernel(theirs, "cudnn"), trained(theirs)
    assert_same_gradients(ours, theirs, base_inputs(), ROWS)
    assert len(cudnn_by_xla) == theirs.config.layers
    # A few rows of the last layer are XLA's.
    jax.eval_shape(ours.logits, params, base_inputs(), ROWS[-3:])
    assert len(cudnn_by_xla) == 2 * theirs.config.layers - 1


def test_lens_net_and_its_gradients_by_cudnn(cudnn_by_xla):
    """Without the map it sees no gist: what is not valid stands before what is, and behind it."""
    theirs = lens_model(dataclasses.replace(LENS, layers=1, map=False))
    assert_same_gradients(with_kernel(theirs, "cudnn"), theirs, lens_inputs())
    assert len(cudnn_by_xla) == 1


def assert_same_gradients(ours: Any, theirs: Any, *inputs: Any) -> None:
    found = (jax.tree.leaves(gradients(model, trained(theirs), *inputs)) for model in (ours, theirs))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


WIDTHS = {"base.head_dim": 64}


def on(monkeypatch, platform: str, *, devices: int = 1, capability: str = "9.0") -> None:
    """A machine of that kind."""
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(attend, "_platform", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "chosen"),
    [
        ("cpu", "bfloat16", 64, "attention xla"),
        ("rocm", "bfloat16", 64, "attention xla"),
        ("cuda", "bfloat16", 64, "attention cudnn"),
        ("cuda", "float16", 128, "attention cudnn"),
        ("cuda", "float32", 64, "attention xla (cudnn reads bfloat16, and dtype is float32)"),
        ("cuda", "bfloat16", 12, "attention xla (cudnn needs heads of a multiple of 8, and base.head_dim is 12)"),
        ("cuda", "bfloat16", 136, "attention xla (cudnn cannot serve (The head dim must be <= 128 and a multiple of 8"),
        ("tpu", "bfloat16", 64, "attention splash"),
        ("tpu", "float32", 64, "attention xla (splash reads bfloat16, and dtype is float32)"),
    ],
)
def test_auto_takes_the_kernel_that_serves(monkeypatch, platform, dtype, width, chosen):
    on(monkeypatch, platform)
    with lowered.as_if_there_were_cudnn():
        assert str(attend.choose("auto", dtype=dtype, widths={"base.head_dim": width})).startswith(chosen)


def test_auto_says_why_cudnn_or_splash_is_not_taken(monkeypatch):
    on(monkeypatch, "cuda", capability="7.5")
    reason = "cudnn needs compute capability 8.0, and this device has 7.5"
    assert attend.choose("auto", dtype="bfloat16", widths=WIDTHS) == attend.Choice("xla", reason)
    on(monkeypatch, "cuda")  # whose JAX was installed without cuDNN
    assert "cuDNN is not detected" in str(attend.choose("auto", dtype="bfloat16", widths=WIDTHS))
    on(monkeypatch, "tpu", devices=4)
    reason = "splash runs on one device, and 4 share a batch"
    assert attend.choose("auto", dtype="bfloat16", widths=WIDTHS) == attend.Choice("xla", reason)


def test_a_kernel_that_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setattr(attend, "_platform", lambda: "cpu")
    settings: Any = {"dtype": "bfloat16", "block_size": 8, "max_lod": 2, "attention": "cudnn"}
    with pytest.raises(
        ValueError, match=r"^attention must be auto or xla where cudnn needs cuda, and .* cpu, got cudnn"
    ):
        build_models(BaseConfig(), GistConfig(), LensConfig(), **settings)
    on(monkeypatch, "cuda")
    with lowered.as_if_there_were_cudnn(), pytest.raises(ValueError, match=r"12, got cudnn$"):
        build_models(BaseConfig(head_dim=12), GistConfig(), LensConfig(), **settings)
    with lowered.as_if_there_were_cudnn():
        models = build_models(BaseConfig(), GistConfig(), LensConfig(), **settings)
    assert models.base.kernel == models.lens.kernel == "cudnn"


@pytest.mark.skipif(attend._platform() not in ("cuda", "tpu"), reason="needs a GPU or a TPU")
@forms
@pytest.mark.parametrize("length", [9, 192, 500])
def test_the_kernel_of_this_device_is_attention(form, length):
    choice = attend.choose("auto", dtype="bfloat16", widths={"the heads here": 16})
    assert choice.kernel != "xla", choice
    assert_same(choice.kernel, form, *heads(length, jnp.bfloat16), tolerance=0.05)
