"""How long a training step takes, and how much of it the mathematics cannot do without.

    python -m experiments.bench.step                                   the two shapes for a CPU
    python -m experiments.bench.step --shapes large --json bench.json  the one for an accelerator
    python -m experiments.bench.step --shapes small --profile traces   and a trace for TensorBoard or Perfetto

The *floor* of a shape is one program of nothing but model passes: the base model forward on the entries of all variants
with logits at the horizon, LensNet forward and backward on the same entries, the anchor's LensNet forward where its
weight is not 0, and GistNet on all blocks. Everything else (trees, rollouts, gathering entries, pairs, targets, losses,
optimizer, metrics) is what `step_over_floor` holds above 1. All programs take turns in one process, so that a slow
moment of the machine falls on all of them. Utilisation is the floor's arithmetic (`lensjax.cost`) over the time of a
step, as a share of what one large matrix product reaches in the same process; the roofline is the time that arithmetic
and memory traffic allow, by that product and by one large array read and written.
"""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import command
from experiments.bench.cost import step_cost
from lensjax.context import working as contexts
from lensjax.context.rollouts import sample_rollouts
from lensjax.models import Models, Params, build_models
from lensjax.models.decision import Window, build_tree, policy_scores, split
from lensjax.runs.config import BaseConfig, Config, ContextConfig, Hyperparameters, OptimizerConfig
from lensjax.training import nll, objective
from lensjax.training.optim import optimizer
from lensjax.training.scoring import Batch, ScoredVariants
from lensjax.training.steps import preference
from lensjax.training.steps.preference import TrainState

Program = Callable[[], Any]
"""Runs what it measures once, on the arguments that it holds, and returns arrays to wait for."""


def _shape(
    base: BaseConfig, context: ContextConfig, *, batch_size: int, share: float, dtype: Literal["float32", "bfloat16"]
) -> Config:
    """Frozen base model, live LensNet loss, KL on."""
    return Config(
        batch_size=batch_size,
        dtype=dtype,
        base=base,
        context=context,
        hyper=Hyperparameters(context_start=share, context_end=share, kl_weight=0.1),
        optimizer=OptimizerConfig(warmup_steps=0),
    )


SHAPES = {
    "small": _shape(
        BaseConfig(dim=128, layers=4, heads=4, kv_heads=2, mlp_dim=384),
        ContextConfig(window=512, block_size=8, horizon=32, recent_tokens=8, rollouts=8),
        batch_size=4,
        share=0.5,
        dtype="float32",
    ),
    "medium": _shape(
        BaseConfig(dim=256, layers=6, heads=8, kv_heads=4, mlp_dim=768),
        ContextConfig(window=1024, block_size=32, horizon=32, recent_tokens=8, rollouts=4),
        batch_size=2,
        share=0.75,
        dtype="float32",
    ),
    "large": _shape(
        BaseConfig(vocab_size=32_768, dim=768, layers=12, heads=12, kv_heads=12, mlp_dim=2048),
        ContextConfig(window=2048, block_size=32, horizon=64, recent_tokens=8, rollouts=4),
        batch_size=8,
        share=0.5,
        dtype="bfloat16",
    ),
}


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    shapes: tuple[Literal["small", "medium", "large"], ...] = ("small", "medium")
    repetitions: int = 20
    """Turns that every program takes after one to warm up."""
    json: Path | None = None
    """Where to write one object a shape."""
    profile: Path | None = None
    """Folder for a trace of three steps of each shape."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    arguments = tyro.cli(Arguments, args=words, description=__doc__)
    with command.errors_end():
        bench(arguments)


def bench(arguments: Arguments) -> list[dict[str, Any]]:
    """Measures every shape, and returns what `--json` writes."""
    if arguments.repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {arguments.repetitions}")
    if arguments.json is not None and arguments.json.exists():
        raise FileExistsError(f"{arguments.json} exists: name another file")
    console = Console()
    found = [measure(name, SHAPES[name], arguments=arguments, console=console) for name in arguments.shapes]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def measure(name: str, config: Config, *, arguments: Arguments, console: Console) -> dict[str, Any]:
    """One shape: times in milliseconds, medians over the repetitions."""
    models = build_models(config)
    with Compiles() as compiles:
        step = Step(config, models)
        programs: dict[str, Program] = {"step": step, "floor": floor(step), "product": product(config), "copy": copy()}
        programs |= parts(step)
        jax.block_until_ready([program() for program in programs.values()])
        before = compiles.count
        times = turns(programs, arguments.repetitions, console)
        recompiles = compiles.count - before
    if arguments.profile is not None:
        with jax.profiler.trace(str(arguments.profile / name)):
            jax.block_until_ready([step() for _ in range(3)])
    medians = {part: float(np.median(values)) for part, values in times.items()}
    cost = step_cost(config)
    peak, bandwidth = 2e3 * _product_rows() ** 3 / medians["product"], 2e3 * _COPIED_BYTES / medians["copy"]
    roofline = sum(
        part.seconds(flops_per_second=peak, bytes_per_second=bandwidth)
        for part in (cost.base, cost.lens, cost.anchor, cost.gist)
    )
    report = {
        "shape": name,
        "device": jax.devices()[0].device_kind,
        "repetitions": arguments.repetitions,
        "entries": config.context_capacity,
        "variants": config.batch_size * (config.context.rollouts + 1),
        "floor_ms": medians["floor"],
        "step_ms": medians["step"],
        "step_over_floor": medians["step"] / medians["floor"],
        "step_over_floor_quartiles": np.percentile(np.divide(times["step"], times["floor"]), [25, 75]).tolist(),
        "lens_losses_share": medians["objective"] / medians["step"],
        "parts_ms": {part: value for part, value in medians.items() if part not in _WHOLE},
        "flops": cost.total.flops,
        "traffic_bytes": cost.total.traffic,
        "peak_flops_per_second": peak,
        "peak_bytes_per_second": bandwidth,
        "utilisation": 1e3 * cost.total.flops / medians["step"] / peak,
        "step_over_roofline": medians["step"] / (1e3 * roofline),
        "variants_per_second": config.batch_size * (config.context.rollouts + 1) / medians["step"] * 1e3,
        "tokens_per_second": config.batch_size * config.context.window / medians["step"] * 1e3,
        "peak_bytes": step.peak_bytes,
        "compile_seconds": step.compile_seconds,
        "compiles": step.compiles + recompiles,
    }
    _print(console, report, times)
    return report


class Compiles:
    """Counts compilations while it is open."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Compiles":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Step:
    """The whole training step, compiled, and what the other programs need of it."""

    def __init__(self, config: Config, models: Models) -> None:
        self.config, self.models = config, models
        key = jax.random.key(0)
        self.state = preference.init_train_state(key, config=config, models=models)
        shape = (config.batch_size, config.context.window)
        self.batch = {"tokens": jax.random.randint(key, shape, 0, config.base.vocab_size, jnp.int32)}
        self.params: dict[str, Params] = jax.tree.map(jnp.copy, self.state.params)
        self.scored: ScoredVariants = jax.jit(
            lambda params, state, batch: preference.score_batch(params, state, batch, config=config, models=models)
        )(self.params, self.state, self.batch)
        began = time.perf_counter()
        step = functools.partial(preference.train_step, config=config, models=models)
        with Compiles() as compiles:
            self._compiled = jax.jit(step, donate_argnums=0).lower(self.state, self.batch).compile()
        self.compiles = compiles.count
        self.compile_seconds = time.perf_counter() - began

    def __call__(self) -> Any:
        """One step; the next call goes on from it."""
        self.state, report = self._compiled(self.state, self.batch)
        return report

    @property
    def peak_bytes(self) -> int:
        """What the device held at most, where it says so; else what the compiler plans for one step."""
        statistics = jax.devices()[0].memory_stats()
        if statistics is not None and "peak_bytes_in_use" in statistics:
            return int(statistics["peak_bytes_in_use"])
        plan = self._compiled.memory_analysis()
        assert plan is not None
        return int(
            plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
        )


_WHOLE = ("step", "floor", "product", "copy")
_COPIED_BYTES = 2**28


def product(config: Config) -> Program:
    """One large matrix product: what the device can do at best."""
    square = jnp.ones((_product_rows(), _product_rows()), config.dtype)
    return functools.partial(jax.jit(jnp.matmul), square, square)


def _product_rows() -> int:
    return 2048 if jax.default_backend() == "cpu" else 8192


def copy() -> Program:
    """One large array read and written in place: how fast the memory is."""
    held = [jnp.zeros(_COPIED_BYTES // 4, jnp.float32)]
    add = jax.jit(lambda array: array + 1.0, donate_argnums=0)

    def run() -> Array:
        held[0] = add(held[0])
        return held[0]

    return run


def floor(step: Step) -> Program:
    """The model passes alone, in one program."""
    config, models, entries = step.config, step.models, step.scored.entries
    leaves = jnp.ones((config.batch_size, config.context.history, config.base.dim), entries.embeddings.dtype)

    @jax.jit
    def run(params: dict[str, Params], entries: contexts.Entries, leaves: Array, signs: Array, horizons: Array) -> Any:
        gists = _gists(models, params["gist"], leaves, config)
        logits = _logits(models, params["base"], entries, horizons)
        loss, grads = _lens_gradient(models, params["lens"], entries, signs)
        anchor = policy_scores(models, params["anchor"], entries)
        return gists, logits, loss, grads, anchor

    params = {**step.params, "anchor": jax.tree.map(jnp.copy, step.params["lens"])}
    signs = jnp.sign(jax.random.normal(jax.random.key(1), entries.valid.shape))
    return functools.partial(run, params, entries, leaves, signs, _windows(step.batch, config).horizon)


def _windows(batch: Batch, config: Config) -> Window:
    return split(batch["tokens"], horizon=config.context.horizon)


def _gists(models: Models, params: Params, leaves: Array, config: Config) -> list[Array]:
    """Every level of gists over leaves [B, T, D]."""
    size, levels = config.context.block_size, [leaves]
    for _ in range(config.context.max_lod):
        rows, count, dim = levels[-1].shape
        blocks = levels[-1][:, : count // size * size].reshape(-1, size, dim)
        levels.append(models.gist.apply(params, blocks).reshape(rows, -1, dim).astype(leaves.dtype))
    return levels[1:]


def _logits(models: Models, params: Params, entries: contexts.Entries, horizons: Array) -> Array:
    """Logits [B, V, H, vocabulary] at the rows that predict the horizons [B, H]."""

    def one(entry: contexts.Entries, horizon: Array) -> Array:
        read = nll.reading(models.base, params, entry, horizon)
        return models.base.apply(params, read.embeddings, read.positions, read.spans, read.rows)

    return jax.vmap(jax.vmap(one, (0, None)))(entries, horizons)


def _lens_gradient(models: Models, params: Params, entries: contexts.Entries, signs: Array) -> tuple[Array, Params]:
    return jax.value_and_grad(lambda lens: jnp.mean(signs * policy_scores(models, lens, entries)))(params)


def parts(step: Step) -> dict[str, Program]:
    """The parts of a step, each a program of its own."""
    config, models, params, state = step.config, step.models, step.params, jax.tree.map(jnp.copy, step.state)
    scored, shape, geometry = step.scored, step.config.context, step.config.context.geometry
    capacity = config.context_capacity
    window = _windows(step.batch, config)
    trees = jax.jit(jax.vmap(lambda row: build_tree(models, params, row, config)))(window.history)
    scores = jax.jit(lambda: policy_scores(models, params["lens"], scored.entries))()
    keys = jax.random.split(jax.random.key(2), config.batch_size)

    def rollouts(key: Array) -> Any:
        return sample_rollouts(
            key, capacity, state.hyper.lod2_share, rollouts=shape.rollouts, geometry=geometry, capacity=capacity
        )

    def loss(values: Array, scored: ScoredVariants, state: TrainState) -> Any:
        output = objective.lens_objective(
            scored,
            values,
            scores,
            jax.random.key(0),
            normaliser=state.normaliser,
            budget=state.budget,
            temperature=state.hyper.temperature,
            hyper=state.hyper,
            config=config,
        )
        return output.loss, output.metrics

    def adam(grads: Params, opt_state: Any, lens: Params) -> Any:
        return optimizer.update(
            config.optimizer, {"lens": grads}, opt_state, {"lens": lens}, learning_rate=1e-3, weight_decay=0.0
        )

    def lens(lens: Params, entries: contexts.Entries) -> Any:
        return _lens_gradient(models, lens, entries, jnp.ones(entries.valid.shape))

    def base(base: Params, entries: contexts.Entries) -> Any:
        losses = functools.partial(nll.token_losses, models.base, base)
        return jax.vmap(lambda rows, tail: jax.vmap(lambda row: losses(row, tail))(rows))(entries, window.horizon)

    gather = jax.vmap(lambda tree, variants: jax.vmap(lambda one: contexts.materialise(tree, one))(variants))
    made: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "tree": (jax.vmap(lambda row: build_tree(models, params, row, config)), (window.history,)),
        "rollouts": (jax.vmap(rollouts), (keys,)),
        "materialise": (gather, (trees, scored.contexts)),
        "nll": (base, (params["base"], scored.entries)),
        "lens": (lens, (params["lens"], scored.entries)),
        "anchor": (lambda anchor, entries: policy_scores(models, anchor, entries), (params["lens"], scored.entries)),
        "objective": (jax.value_and_grad(loss, has_aux=True), (scores, scored, state)),
        "optimizer": (adam, (params["lens"], state.opt_state, params["lens"])),
    }
    return {name: functools.partial(jax.jit(function), *given) for name, (function, given) in made.items()}


def turns(programs: dict[str, Program], repetitions: int, console: Console) -> dict[str, list[float]]:
    """Milliseconds of each program, turn after turn."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in track(range(repetitions), console=console, transient=True, disable=not console.is_terminal):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def _print(console: Console, report: dict[str, Any], times: dict[str, list[float]]) -> None:
    title = f"{report['shape']}: {report['variants']} variants of {report['entries']} entries, {report['device']}"
    table = Table("part", "ms, median", "quartiles", "of the step", title=title)
    for part, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        table.add_row(part, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", f"{middle / report['step_ms']:.3f}")
    console.print(table)
    console.out(
        f"step / floor {report['step_over_floor']:.3f}, utilisation {report['utilisation']:.2f} of "
        f"{report['peak_flops_per_second'] / 1e9:.0f} GFLOP/s, step / roofline {report['step_over_roofline']:.1f} with "
        f"{report['peak_bytes_per_second'] / 1e9:.0f} GB/s, peak {report['peak_bytes'] / 2**20:.0f} MiB, "
        f"compiles {report['compiles']}, {report['compile_seconds']:.0f} s",
        highlight=False,
    )


if __name__ == "__main__":
    main()
