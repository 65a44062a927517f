"""Checkpoints of other makers, beside what the reference implementation makes of them."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context.working import in_full
from lensjax.models import BaseModel, Params
from lensjax.models.checkpoints import huggingface, load_language_model, load_params, read_config, sha256, tensors
from lensjax.models.nn.rope import RopeScaling
from tests.models import checkpoint_files as files
from tests.models.checkpoint_files import FIXTURES, FOLDERS, WEIGHTS
from tests.small import jit

ALL = (*FOLDERS, "llama.gguf")


def read(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return file["tokens"], file["logits"]


def logits(model: BaseModel, params: Params, tokens: np.ndarray) -> np.ndarray:
    rows = np.arange(len(tokens))
    return np.asarray(jit(model.logits)(params, in_full(model.embed(params, tokens), rows), rows))


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_the_reference(name: str) -> None:
    tokens, expected = read(name)
    model, params = load_language_model(FIXTURES / name)
    np.testing.assert_allclose(logits(model, params, tokens), expected, atol=1e-5, rtol=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"norm_eps": 1e-3}),
        ("llama", {"rope_theta": 10_000.0}),
        ("llama31", {"rope_scaling": RopeScaling()}),
        ("llama31", {"rope_scaling": RopeScaling("llama3", original_length=8192)}),
        ("qwen2", {"norm_eps": 1e-4}),
        ("qwen3", {"norm_eps": 1e-4}),
        ("gemma3", {"window": 8}),
        ("gemma3", {"window": None}),
        ("gemma3", {"global_every": 3}),
        ("gemma3", {"local_rope_theta": 600.0}),
        ("gemma3", {"rope_theta": 60_000.0}),
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"scale_embedding": False}),
    ],
)
def test_a_setting_that_is_wrong_would_be_seen(name: str, changes: dict) -> None:
    tokens, expected = read(name)
    model, params = load_language_model(FIXTURES / name)
    other = BaseModel(dataclasses.replace(model.config, **changes))
    assert np.abs(logits(other, params, tokens) - expected).max() > 1e-4


def test_settings_are_those_of_the_files() -> None:
    llama, scaled, mistral, qwen2, qwen3, gemma3, file = (read_config(FIXTURES / name) for name in ALL)
    assert dataclasses.replace(file, norm_eps=llama.norm_eps) == llama and file.norm_eps == np.float32(llama.norm_eps)
    assert (llama.dim, llama.layers, llama.heads, llama.kv_heads, llama.mlp_dim) == (32, 2, 4, 2, 40)
    assert (llama.vocab_size, llama.tied, llama.head_dim, llama.norm_eps) == (48, False, None, 1e-5)
    assert (llama.conv_width, llama.copy_heads, llama.rope_theta) == (0, 0, 50_000.0)
    assert scaled.tied and scaled.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 128)
    assert mistral.head_dim == 12 and mistral.norm_eps == 1e-6
    assert qwen2.qkv_bias and not qwen2.qk_norm and qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 16
    assert gemma3.tied and gemma3.qk_norm and gemma3.post_norms and gemma3.scale_embedding
    assert (gemma3.window, gemma3.global_every, gemma3.rope_theta, gemma3.local_rope_theta) == (9, 2, 50_000.0, 500.0)


def test_the_stored_types_are_several() -> None:
    assert [files.dtypes(FIXTURES / name) for name in FOLDERS] == [
        *({"F32"}, {"BF16"}, {"BF16"}, {"BF16"}, {"F16"}, {"BF16"})
    ]


@pytest.mark.parametrize("name", ALL)
def test_matrices_are_stored_in_the_type_asked_for(name: str) -> None:
    tokens, expected = read(name)
    model, params = load_language_model(FIXTURES / name, "bfloat16")
    types = {leaf.ndim: leaf.dtype for leaf in jax.tree.leaves(params)}
    assert types == {1: np.dtype("float32"), 2: jnp.dtype("bfloat16")}
    assert 0 < np.abs(logits(model, params, tokens) - expected).max() < 0.05 * np.abs(expected).max()
    whole = load_params(FIXTURES / name, model.config)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other.astype(one.dtype)), params, whole)


@pytest.mark.parametrize("name", ALL)
def test_the_tree_is_that_of_a_fresh_model(name: str) -> None:
    model, params = load_language_model(FIXTURES / name)
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert jax.tree.map(lambda leaf: leaf.shape, fresh) == jax.tree.map(lambda leaf: leaf.shape, params)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    path = files.copy("llama", tmp_path)
    files.shards()(path)
    jax.tree.map(np.testing.assert_array_equal, *(load_language_model(one)[1] for one in (path, FIXTURES / "llama")))


def test_older_settings_mean_the_same(tmp_path: Path) -> None:
    for name in ("llama", "llama31"):
        path, expected = files.copy(name, tmp_path), read_config(FIXTURES / name)
        scaling = files.keys(path)["rope_parameters"]
        files.older(**{key: value for key, value in scaling.items() if key != "rope_theta"})(path)
        assert read_config(path) == expected
    # Every so many-th layer is global, and the bases of both kinds have names of their own.
    path, expected = files.copy("gemma3", tmp_path), read_config(FIXTURES / "gemma3")
    older = {"rope_theta": 50_000.0, "rope_local_base_freq": 500.0, "rope_scaling": None, "sliding_window_pattern": 2}
    files.settings(rope_parameters=..., layer_types=..., tie_word_embeddings=..., **older)(path)
    assert read_config(path) == expected
    files.settings(rope_theta=..., rope_local_base_freq=..., sliding_window_pattern=...)(path)
    unsaid = {"rope_theta": 1_000_000.0, "local_rope_theta": 10_000.0, "global_every": 6}
    assert read_config(path) == dataclasses.replace(expected, **unsaid)
    files.older()(files.copy("qwen2", tmp_path))
    assert read_config(tmp_path / "qwen2") == read_config(FIXTURES / "qwen2")


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    path = files.copy("llama31", tmp_path)
    table = files.load_file(path / WEIGHTS)["model.embed_tokens.weight"]
    files.tensors(lm_head__weight=table.copy())(path)
    assert "head" not in load_language_model(path)[1]


def test_factors_of_a_gguf_file_are_the_scaling_of_llama_3(tmp_path: Path) -> None:
    path = files.copy("llama.gguf", tmp_path)
    scaling = RopeScaling("llama3", factor=32.0)
    frequencies = jnp.float32(50_000.0) ** (-jnp.arange(0, 8, 2, dtype=jnp.float32) / 8)
    factors = np.asarray(frequencies / scaling(frequencies))
    files.rewritten(lambda keys, raw: raw.update({"rope_freqs.weight": factors}))(path)
    assert read_config(path).rope_scaling == scaling
    assert load_language_model(path)[0].config.rope_scaling == scaling


def test_gaussian_positions_may_be_added_and_nothing_else_changed() -> None:
    config = read_config(FIXTURES / "llama")
    load_params(FIXTURES / "llama", dataclasses.replace(config, gaussian_rope=True))
    with pytest.raises(ValueError, match=r"llama is another model: base\.norm_eps 1e-06 instead of 1e-05"):
        load_params(FIXTURES / "llama", dataclasses.replace(config, norm_eps=1e-6))


def test_the_sum_is_that_of_the_weights(tmp_path: Path) -> None:
    for name, file in (("llama", f"llama/{WEIGHTS}"), ("llama.gguf", "llama.gguf")):
        assert sha256(FIXTURES / name) == hashlib.sha256((FIXTURES / file).read_bytes()).hexdigest()
    path = files.copy("llama", tmp_path)
    files.shards()(path)
    parts = sorted(path.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts]
    assert sha256(path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_one_parameter_at_a_time_is_held_beside_those_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, order, put = huggingface.open_checkpoint(FIXTURES / "llama"), [], jax.device_put
    noted = dataclasses.replace(checkpoint, read=lambda name: (order.append("r"), checkpoint.read(name))[1])
    monkeypatch.setattr(jax, "device_put", lambda value: (order.append("p"), put(value))[1])
    tensors.load(noted, "float32")
    between = "".join(order).split("p")
    assert between.pop() == "" and set(between) == {"r", "rr"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("safetensors", "llama", "checkpoints in a folder need safetensors: pip install 'lensjax[hf]'"),
        ("gguf", "llama.gguf", "GGUF files need gguf: pip install 'lensjax[gguf]'"),
    ],
)
def test_an_extra_that_is_missing_is_named(package: str, name: str, message: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from lensjax.models.checkpoints import load_language_model\n"
        f"try: load_language_model({str(FIXTURES / name)!r})\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == message
