"""Checkpoints that are not what they should be: one clear error each, before anything is on a device."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lensjax.models.checkpoints import load_language_model, load_params, read_config
from tests.models import checkpoint_files as files
from tests.models.checkpoint_files import FIXTURES, WEIGHTS, Change, older, rewritten, rope, settings, shards, tensors

LAYER_0, LAYER_1 = "model__layers__0__", "model__layers__1__"
SLIDING = ["full_attention", "sliding_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 128


def text(name: str, content: Any) -> Change:
    return lambda path: (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def cut(name: str, end: int) -> Change:
    def change(path: Path) -> None:
        file = path / name if name else path
        file.write_bytes(file.read_bytes()[:end])

    return change


def pickles(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def tokens(count: int, **more: Any) -> dict[str, Any]:
    return {"model": {"vocab": {str(index): index for index in range(count)}}, **more}


HOSTILE: list[tuple[str, str, Change, str]] = [
    # What a folder is.
    ("no config.json", "llama", lambda path: (path / "config.json").unlink(), r"config\.json does not exist"),
    ("settings are no JSON", "llama", text("config.json", "{"), r"config\.json is not JSON"),
    ("settings are a list", "llama", text("config.json", []), r"config\.json must hold an object, got list"),
    ("no weights", "llama", lambda path: (path / WEIGHTS).unlink(), r"has no weights: expected model\.safetensors"),
    ("a pickle", "llama", pickles, r"pickles \(pytorch_model\.bin\).*convert them to safetensors"),
    # What the model is.
    ("no model_type", "llama", settings(model_type=...), r"model_type must be one of llama, .*got None"),
    ("another model_type", "llama", settings(model_type="gemma2"), r"model_type must be .*got 'gemma2'"),
    ("a model_type that is a list", "llama", settings(model_type=["llama"]), r"model_type must be one of"),
    ("a classifier", "llama", settings(architectures=["LlamaForSequenceClassification"]), r"architectures must be"),
    ("an unknown key", "llama", settings(logit_scale=0.1), r"logit_scale: not known for model_type llama"),
    ("part of a head turned", "llama", settings(partial_rotary_factor=0.5), r"partial_rotary_factor: not known"),
    ("attention biases", "llama", settings(attention_bias=True), r"attention_bias must be false, got True"),
    ("biases of the MLP", "llama", settings(mlp_bias=True), r"mlp_bias must be false, got True"),
    ("a zero for false", "llama", settings(mlp_bias=0), r"mlp_bias must be false, got 0"),
    ("another activation", "llama", settings(hidden_act="gelu"), r"hidden_act must be silu, got 'gelu'"),
    ("quantised", "llama", settings(quantization_config={"bits": 4}), r"quantization_config must be null"),
    ("an active window", "mistral", settings(sliding_window=4096), r"sliding_window must be null, got 4096"),
    ("a window by default", "mistral", settings(sliding_window=...), r"sliding_window is missing, and model_type mist"),
    ("windows of Qwen2", "qwen2", settings(use_sliding_window=True), r"use_sliding_window must be false"),
    ("windows in layers", "qwen2", settings(layer_types=SLIDING), r"layer_types must be full_attention in each of 2"),
    ("kv heads by default", "qwen2", settings(num_key_value_heads=...), r"num_key_value_heads is missing"),
    ("head width by default", "qwen3", settings(head_dim=...), r"head_dim is missing, and model_type qwen3"),
    # Gemma 3.
    ("no scale of queries", "gemma3", settings(query_pre_attn_scalar=...), r"query_pre_attn_scalar is missing"),
    ("a scale of 0", "gemma3", settings(query_pre_attn_scalar=0), r"query_pre_attn_scalar must be a number above 0"),
    (
        "capped logits",
        "gemma3",
        settings(final_logit_softcapping=30.0),
        r"final_logit_softcapping must be null, got 30",
    ),
    ("capped attention", "gemma3", settings(attn_logit_softcapping=50.0), r"attn_logit_softcapping must be null"),
    ("both directions", "gemma3", settings(use_bidirectional_attention=True), r"use_bidirectional_attention must be"),
    ("SiLU in Gemma", "gemma3", settings(hidden_activation="silu"), r"hidden_activation must be gelu_pytorch_tanh"),
    ("Llama's activation", "gemma3", settings(hidden_act="silu"), r"hidden_act: not known for model_type gemma3_text"),
    ("no window", "gemma3", settings(sliding_window=None), r"sliding_window must be a whole number above 0, got None"),
    (
        "global layers anywhere",
        "gemma3",
        settings(layer_types=["sliding_attention", "full_attention", "full_attention"]),
        r"layer_types must be full_attention in every so many-th of 3 layers",
    ),
    (
        "a pattern of 0",
        "gemma3",
        settings(layer_types=..., sliding_window_pattern=0),
        r"sliding_window_pattern must be",
    ),
    (
        "one base for both",
        "gemma3",
        settings(rope_parameters={"rope_theta": 1e4}),
        r"rope_parameters must hold full_att",
    ),
    ("a local base besides", "gemma3", settings(rope_local_base_freq=1e4), r"rope_local_base_freq beside rope_para"),
    ("a windowed Llama", "llama", settings(sliding_window_pattern=6), r"sliding_window_pattern: not known for model_t"),
    (
        "a linear scaling of global layers",
        "gemma3",
        rope(full_attention={"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}),
        r"rope_parameters\.full_attention\.rope_type must be one of .*got 'linear'",
    ),
    (
        "a scaling of local layers",
        "gemma3",
        rope(sliding_attention=LLAMA3),
        r"rope_parameters\.sliding_attention\.rope_type must be default",
    ),
    (
        "no norm behind the MLP",
        "gemma3",
        tensors(**{f"{LAYER_1}post_feedforward_layernorm__weight": ...}),
        r"lacks model\.layers\.1\.post_feedforward_layernorm\.weight",
    ),
    # Numbers.
    ("a size that is NaN", "llama", settings(hidden_size=float("nan")), r"hidden_size must be a whole.*got nan"),
    ("a size that is text", "llama", settings(intermediate_size="40"), r"intermediate_size must be .* got '40'"),
    ("a size that is true", "llama", settings(num_attention_heads=True), r"num_attention_heads must be .*got True"),
    ("a size with a fraction", "llama", settings(vocab_size=48.5), r"vocab_size must be a whole number"),
    ("no size", "llama", settings(num_hidden_layers=...), r"num_hidden_layers must be .*got None"),
    ("a layer fewer", "llama", settings(num_hidden_layers=1), r"has 2 layers, its settings say 1"),
    ("layers without end", "llama", settings(num_hidden_layers=10**12), r"base.layers must be at most 128, got 10{12}"),
    ("heads that do not fit", "llama", settings(num_key_value_heads=3), r"base\.heads must be a multiple of"),
    ("an odd head", "mistral", settings(head_dim=11), r"config\.json: base\.head_dim must be even.*got 11"),
    ("an infinite epsilon", "llama", settings(rms_norm_eps=float("inf")), r"rms_norm_eps must be a number.*got inf"),
    ("no epsilon", "llama", settings(rms_norm_eps=...), r"rms_norm_eps must be a number above 0, got None"),
    ("a flag that is text", "llama", settings(tie_word_embeddings="no"), r"tie_word_embeddings must be true or false"),
    # Positions.
    ("another scaling", "llama", rope(rope_type="yarn", factor=4.0), r"rope_parameters\.rope_type .*got 'yarn'"),
    ("an older scaling", "llama", older(type="linear", factor=2.0), r"rope_scaling\.rope_type .*got 'linear'"),
    ("half a scaling", "llama31", rope(low_freq_factor=...), r"rope_parameters\.low_freq_factor must be a number"),
    ("a scaling with more", "llama31", rope(attention_factor=2.0), r"rope_parameters\.attention_factor is not known"),
    ("a scaling upside down", "llama31", rope(high_freq_factor=0.5), r"base\.rope_scaling\.high must be above"),
    ("no theta", "qwen2", rope(rope_theta=...), r"rope_parameters\.rope_theta must be a number above 0, got None"),
    ("two thetas", "llama", settings(rope_theta=1e4), r"rope_theta beside rope_parameters"),
    # Tensors.
    ("a tensor less", "llama", tensors(**{f"{LAYER_1}mlp__up_proj__weight": ...}), r"lacks model\.layers\.1\.mlp\.up"),
    ("no biases", "qwen2", tensors(**{f"{LAYER_0}self_attn__q_proj__bias": ...}), r"lacks .*0\.self_attn\.q_proj\.b"),
    ("a tensor more", "llama", tensors(model__extra=np.ones(3, "f")), r"does not use: model\.extra"),
    (
        "a bias more",
        "llama",
        tensors(**{f"{LAYER_0}self_attn__o_proj__bias": np.ones(32, "f")}),
        r"does not use: model\.layers\.0\.self_attn\.o_proj\.bias",
    ),
    (
        "a tensor turned",
        "llama",
        tensors(**{f"{LAYER_0}mlp__down_proj__weight": lambda old: old.T.copy()}),
        r"0\.mlp\.down_proj\.weight must have shape \[32, 40\] by its settings, got \[40, 32\]",
    ),
    ("a vocabulary less", "llama", settings(vocab_size=49), r"embed_tokens\.weight must have shape \[49, 32\]"),
    ("doubles", "llama", tensors(model__norm__weight=np.ones(32)), r"model\.norm\.weight must be one of F32.*got F64"),
    (
        "whole numbers",
        "llama",
        tensors(model__norm__weight=np.ones(32, np.int8)),
        r"model\.norm\.weight must be one of F32, F16, BF16, got I8",
    ),
    ("no head", "llama31", settings(tie_word_embeddings=False), r"lacks lm_head\.weight"),
    ("a head of its own", "llama", settings(tie_word_embeddings=True), r"ties its head .* lm_head\.weight differs"),
    # Files.
    ("half a file", "llama", cut(WEIGHTS, -1000), r"model\.safetensors is no whole safetensors file .*fetch it again"),
    ("half a header", "llama", cut(WEIGHTS, 100), r"model\.safetensors is no whole safetensors file"),
    ("no file", "llama", cut(WEIGHTS, 0), r"model\.safetensors is no whole safetensors file"),
    ("noise", "llama", text(WEIGHTS, 64 * "noise "), r"model\.safetensors is no whole safetensors file"),
    (
        "an absent shard",
        "llama",
        shards(lambda index: index.update(x="model-00003-of-00002.safetensors")),
        r"index\.json names model-00003-of-00002\.safetensors, which is absent",
    ),
    (
        "a tensor that its shard lacks",
        "llama",
        shards(lambda index: index.update(x="model-00001-of-00002.safetensors")),
        r"index\.json names x, which its files do not hold",
    ),
    (
        "a shard elsewhere",
        "llama",
        shards(lambda index: index.update(x="../model")),
        r"'\.\./model'.*not a file beside",
    ),
    ("no shards", "llama", shards(lambda index: index.clear()), r"index\.json must have a weight_map"),
    ("a tensor twice", "llama", shards(twice=True), r"has lm_head\.weight in two files"),
    # Tokenizers.
    ("too many tokens", "llama", text("tokenizer.json", tokens(60)), r"token of number 59, .* vocab_size 48"),
    (
        "too many added",
        "llama",
        text("tokenizer.json", tokens(48, added_tokens=[{"id": 48}])),
        r"token of number 48, but config\.json says vocab_size 48",
    ),
    ("half a tokenizer", "llama", text("tokenizer.json", '{"model'), r"tokenizer\.json is not JSON"),
    # GGUF.
    ("half a GGUF file", "llama.gguf", cut("", -2000), r"llama\.gguf is no whole GGUF file"),
    ("the head of a GGUF file", "llama.gguf", cut("", 500), r"llama\.gguf is no whole GGUF file"),
    ("no GGUF file", "llama.gguf", lambda path: path.write_bytes(b"GGML0000"), r"is no GGUF file \(it starts with"),
    (
        "another architecture",
        "llama.gguf",
        rewritten(lambda keys, raw: keys.update({"general.architecture": "gemma"})),
        r"general\.architecture must be one of llama, qwen2, qwen3, got 'gemma'",
    ),
    (
        "an unknown key of GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: keys.update({"llama.expert_count": 4})),
        r"llama\.expert_count: not known",
    ),
    (
        "a scaling of GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: keys.update({"llama.rope.scaling.type": "yarn"})),
        r"llama\.rope\.scaling\.type: not known",
    ),
    (
        "no epsilon in GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: keys.pop("llama.attention.layer_norm_rms_epsilon")),
        r"llama\.attention\.layer_norm_rms_epsilon must be one number above 0, got None",
    ),
    (
        "part of a head turned in GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: keys.update({"llama.rope.dimension_count": 4})),
        r"llama\.rope\.dimension_count must be the width of a head, 8, got 4",
    ),
    (
        "too many tokens in GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: keys.update({"llama.vocab_size": 40})),
        r"has 48 tokens, but says llama\.vocab_size 40",
    ),
    (
        "a tensor less in GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: raw.pop("blk.1.ffn_up.weight")),
        r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    (
        "a tensor more in GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: raw.update({"blk.0.attn_sinks": np.ones(4, "f")})),
        r"does not use: blk\.0\.attn_sinks",
    ),
    (
        "other factors in GGUF",
        "llama.gguf",
        rewritten(lambda keys, raw: raw.update({"rope_freqs.weight": np.full(4, 2, "f")})),
        r"rope_freqs\.weight is not that of Llama 3",
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_one_clear_error_before_anything_is_on_a_device(
    name: str, change: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.copy(name, tmp_path)
    change(path)
    before = len(jax.live_arrays())
    monkeypatch.setattr(jax, "device_put", lambda value: pytest.fail("a tensor went to the device"))
    with pytest.raises(ValueError, match=message) as raised:
        load_language_model(path)
    assert str(tmp_path) in str(raised.value) and str(raised.value).count(str(path)) == 1
    assert len(jax.live_arrays()) == before


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 30 and len({case[0] for case in HOSTILE}) == len(HOSTILE)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist: give a Hugging Face folder or a GGUF file"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json is no GGUF file .*the folder that config\.json is in"):
        read_config(FIXTURES / "llama" / "config.json")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'float16'"):
        load_language_model(FIXTURES / "llama", "float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'int8'"):
        load_params(FIXTURES / "llama", read_config(FIXTURES / "llama"), "int8")  # type: ignore[arg-type]
