"""The benchmark, on a shape that takes no time; and what the compiled step must not hold."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import programs
from experiments.bench import step as script
from experiments.bench.cost import step_cost
from lensjax import _settings
from lensjax.context.working import Entries
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import init_train_state
from tests.small import SMALL

TINY = _settings.replace(SMALL, **{"hyper.kl_weight": 0.1, "base.vocab_size": 509, "data.task": "recall"})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(script.SHAPES, "small", TINY)


@pytest.mark.slow
def test_a_shape_is_measured(tiny, tmp_path):
    file = tmp_path / "bench.json"
    script.main(["--shapes", "small", "--repetitions", "2", "--json", str(file), "--profile", str(tmp_path / "traces")])
    (report,) = json.loads(file.read_text())
    assert report["shape"] == "small" and report["compiles"] == 1 and report["peak_bytes"] > 0
    assert report["entries"] == 25 and report["variants"] == 12
    assert report["step_over_floor"] == pytest.approx(report["step_ms"] / report["floor_ms"])
    parts = report["parts_ms"]
    assert set(parts) == {"tree", "rollouts", "materialise", "nll", "lens", "anchor", "objective", "optimizer"}
    assert all(value > 0 for value in parts.values())
    assert report["lens_losses_share"] == pytest.approx(parts["objective"] / report["step_ms"])
    peak, bandwidth = report["peak_flops_per_second"], report["peak_bytes_per_second"]
    assert (
        peak == report["products_flops_per_second"]["float32"] and report["products_flops_per_second"]["bfloat16"] > 0
    )
    longest = max(report["flops"] / peak, report["traffic_bytes"] / bandwidth)
    assert report["roofline_ms"] == pytest.approx(1e3 * longest)
    assert report["step_over_roofline"] == pytest.approx(report["step_ms"] / 1e3 / longest)
    assert any((tmp_path / "traces" / "small").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_the_floor_does_the_model_passes():
    step = programs.Step(TINY, TINY.build_models())
    gists, logits, _, grads, anchor = programs.floor(step)()
    rows, variants, horizon = TINY.batch_size, TINY.context.rollouts + 1, TINY.context.horizon
    assert [level.shape for level in gists] == [(rows, 16, 16), (rows, 8, 16)]
    assert logits.shape == (rows, variants, horizon, 509) and anchor.shape == (rows, variants, 25)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    # The logits are those that the losses are made of.
    targets = step.batch["tokens"][:, None, -horizon:, None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)
    assert jnp.allclose(-picked.mean(axis=(2, 3)), step.scored.nll, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["small", "medium"])
def test_the_cost_on_paper_is_what_the_compiler_counts(shape):
    config = _settings.replace(script.SHAPES[shape], batch_size=1, **{"context.rollouts": 1})
    models, recipe = config.build_models(), config.recipe
    static = {"recipe": recipe, "models": models}
    batch = {"tokens": jnp.zeros((1, config.context.window), jnp.int32)}

    def scored(key):
        state, frozen = init_train_state(key, **static)
        return preference.score_batch(frozen, state, batch, **static)

    entries = jax.eval_shape(scored, jax.random.key(0)).entries
    params = jax.eval_shape(
        lambda key: {name: getattr(models, name).init(key) for name in ("base", "lens")}, jax.random.key(0)
    )
    cost = step_cost(config)

    def counted(function, *arguments):
        # As a run compiles it, not as the tests do: fusion decides what is read twice.
        options = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
        return jax.jit(function).lower(*arguments).compile(options).cost_analysis()

    horizons = jax.ShapeDtypeStruct((1, config.context.horizon), jnp.int32)
    base = counted(functools.partial(programs.horizon_logits, models.base), params["base"], entries, horizons)
    lens = counted(
        lambda lens, entries: programs.lens_gradient(models.lens, lens, entries, jnp.ones(entries.valid.shape)),
        params["lens"],
        entries,
    )
    for counts, part in ((base, cost.base), (lens, cost.lens)):
        # The compiler counts products with masked entries as well, and the elementwise operations.
        assert part.flops < counts["flops"] < 1.1 * part.flops
        # The paper reads every input once; what the compiler does not fuse is read again.
        assert part.traffic < counts["bytes accessed"] < 2.5 * part.traffic
    assert step_cost(config, fused_attention=True).total.traffic < 0.7 * cost.total.traffic
    assert cost.lens == 3.0 * cost.anchor and cost.total == cost.base + cost.lens + cost.anchor + cost.gist


@pytest.mark.parametrize("switch", ["lens.blocks", "lens.pointer"])
def test_the_cost_of_what_lensnet_may_have_is_what_the_compiler_counts(switch):
    def flops(config):
        models, shape = config.build_models(), (config.batch_size, config.context.rollouts + 1, config.capacity)
        floats, wide = (jnp.zeros(shape + rest) for rest in ((), (config.base.dim,)))
        levels, valid = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
        entries = Entries(wide, wide, floats, levels, floats, floats, valid)
        params = jax.eval_shape(models.lens.init, jax.random.key(0))
        gradient = jax.jit(lambda lens: programs.lens_gradient(models.lens, lens, entries, floats))
        return gradient.lower(params).cost_analysis()["flops"], step_cost(config).lens.flops

    (counted, paper), (counted_off, paper_off) = (
        flops(_settings.replace(TINY, **{switch: on})) for on in (True, False)
    )
    # The compiler counts the elementwise operations as well.
    assert paper - paper_off < counted - counted_off < 1.2 * (paper - paper_off)


def test_a_file_that_is_there_is_kept(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text("mine")
    with pytest.raises(SystemExit, match="exists: name another file"):
        script.main(["--json", str(file)])
    assert file.read_text() == "mine"


def test_no_repetition_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--repetitions", "0"])
    assert "repetitions must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compiled_step_holds_no_logits_of_all_entries():
    models = TINY.build_models()
    state, frozen = jax.eval_shape(
        functools.partial(init_train_state, recipe=TINY.recipe, models=models), jax.random.key(0)
    )
    batch = {"tokens": jax.ShapeDtypeStruct((TINY.batch_size, TINY.context.window), jnp.int32)}
    step = functools.partial(preference.train_step, recipe=TINY.recipe, models=models)
    text = jax.jit(step).lower(state, batch, frozen).compile().as_text()
    sizes = [
        (shape, functools.reduce(lambda x, y: x * y, map(int, shape.split(","))))
        for shape in set(re.findall(r"\[([\d,]+)\]", text))
        if "509" in shape.split(",")
    ]
    variants, entries = TINY.batch_size * (TINY.context.rollouts + 1), TINY.capacity
    horizon = variants * TINY.context.horizon * 509
    assert max(size for _, size in sizes) == horizon < variants * entries * 509
