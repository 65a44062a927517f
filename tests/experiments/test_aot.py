"""Steps compiled for another device: what is read out of a compiled program, and that every step has a shape."""

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import aot as script
from tests.small import SMALL

TEXT = """HloModule jit_step

%fused (a: f32[8,999]) -> f32[8,999] {
  %a = f32[8,999]{1,0} parameter(0)
  ROOT %b = f32[8,999]{1,0} add(%a, %a)
}

ENTRY %main (p: f32[4096,2]) -> f32[8,9] {
  %p = f32[4096,2]{1,0} parameter(0)
  %x = bf16[64,9]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%fused
  %y = (bf16[2,2]{1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %z = f32[8,9]{1,0} custom-call(%x), custom_call_target="__cublas$gemm"
  ROOT %r = f32[8,9]{1,0} add(%z, %z)
}
"""


def test_the_largest_arrays_are_those_that_a_program_writes():
    # Neither arguments nor what a fusion keeps to itself; each shape once, by bytes and not by numbers.
    assert script.largest(TEXT) == ["bf16[64,9]", "f32[8,9]"]
    assert script.largest(TEXT, 1) == ["bf16[64,9]"]
    assert script.kernels(TEXT) == {"__cudnn$fmhaSoftmax": 1}


def test_figures_of_a_compiled_product():
    shapes = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    figures, text = script.compile_for(jax.devices("cpu")[0], jnp.matmul, shapes, False)
    assert tuple(figures) == script.FIGURES
    assert figures["operations"] == 2 * 64 * 32 * 16 and figures["bytes"] == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert figures["arguments"] == 4 * (64 * 32 + 32 * 16) and figures["results"] == 4 * 64 * 16
    assert figures["peak"] == figures["arguments"] + figures["results"] + figures["temporaries"]
    assert figures["largest"] == "f32[64,16]" and "dot" in text


def test_a_step_that_does_not_compile_is_told(monkeypatch, tmp_path):
    def fails(*shapes):
        raise RuntimeError("no tile\nof this size")

    works = {"session.read": (jnp.negative, (jax.ShapeDtypeStruct((2,), jnp.float32),), True)}
    broken = {"train_step": (fails, (jax.ShapeDtypeStruct((2,), jnp.float32),), False)}
    monkeypatch.setattr(script, "described", lambda target: jax.devices("cpu")[0])
    monkeypatch.setattr(script, "steps", lambda program, *rest: broken if program == "train" else works)
    arguments = script.Arguments(
        targets=("h100",), shapes=("small",), programs=("train", "session"), csv=tmp_path / "a.csv"
    )
    with pytest.raises(ValueError, match="1 of 2 steps did not compile: train_step of small for h100"):
        script.compile_all(arguments)
    _, first, second = (tmp_path / "a.csv").read_text().splitlines()
    assert "train_step" in first and first.endswith(",no tile") and "session.read" in second


@pytest.mark.parametrize(
    ("program", "names"),
    [
        pytest.param("floor", {"floor"}, marks=pytest.mark.slow),
        pytest.param("pretrain", {"pretrain_step"}, marks=pytest.mark.slow),
        ("session", {"session.read", "session.decide", "session.show"}),
    ],
)
def test_every_step_can_be_traced_as_on_a_gpu(program, names):
    models = script.for_device(SMALL.build_models(), "xla", "cuda")
    assert models.lens.tile == 16
    found = script.steps(program, SMALL, models)
    assert set(found) == names
    for function, shapes, donated in found.values():
        first, *_ = results if isinstance(results := jax.eval_shape(function, *shapes), tuple) else (results,)
        if donated:
            assert jax.tree.structure(first) == jax.tree.structure(shapes[0])


def test_without_the_compilers_the_error_says_how_to_get_them(monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(script.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match="run `make aot`"):
        script.described("h100")
