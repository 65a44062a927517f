"""Programs that take turns in a benchmark: a training step, its floor, its parts, and the best of the device."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from rich.console import Console
from rich.progress import track

from lensjax.context import working as contexts
from lensjax.context.rollouts import sample_rollouts
from lensjax.context.working import Entries
from lensjax.models import GistEncoder, LanguageModel, LensPolicy, Models, Params
from lensjax.models.decision import Window, build_tree, policy_scores, split
from lensjax.runs.config import Config
from lensjax.runs.engine.progress import has_bars
from lensjax.training import nll, objective
from lensjax.training.objective import Statistics
from lensjax.training.optim import optimizer
from lensjax.training.scoring import Batch, ContextConfig, ScoredVariants
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import TrainState, init_train_state

Program = Callable[[], Any]
"""Runs what it measures once, on the arguments that it holds, and returns arrays to wait for."""
COPIED_BYTES = 2**28


def turns(programs: dict[str, Program], repetitions: int, console: Console) -> dict[str, list[float]]:
    """Milliseconds of each program, turn after turn."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in track(range(repetitions), console=console, transient=True, disable=not has_bars(console)):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


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
        self.config, self.models, recipe = config, models, config.recipe
        key = jax.random.key(0)
        self.state, self._frozen = init_train_state(key, recipe=recipe, models=models)
        shape = (config.batch_size, config.context.window)
        self.batch = {"tokens": jax.random.randint(key, shape, 0, config.base.vocab_size, jnp.int32)}
        self.params = {**self._frozen, **jax.tree.map(jnp.copy, self.state.params)}
        self.scored: ScoredVariants = jax.jit(
            lambda params, state, batch: preference.score_batch(params, state, batch, recipe=recipe, models=models)
        )(self.params, self.state, self.batch)
        began = time.perf_counter()
        step = functools.partial(preference.train_step, recipe=recipe, models=models)
        with Compiles() as compiles:
            self._compiled = jax.jit(step, donate_argnums=0).lower(self.state, self.batch, self._frozen).compile()
        self.compiles = compiles.count
        self.compile_seconds = time.perf_counter() - began

    def __call__(self) -> Any:
        """One step; the next call goes on from it."""
        self.state, report = self._compiled(self.state, self.batch, self._frozen)
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


def product(dtype: str) -> Program:
    """One large matrix product: what the device can do at best."""
    square = jnp.ones((product_rows(), product_rows()), dtype)
    return functools.partial(jax.jit(jnp.matmul), square, square)


def product_rows() -> int:
    """Rows and columns of the matrices of `product`."""
    return 2048 if jax.default_backend() == "cpu" else 8192


def copy() -> Program:
    """One large array read and written in place: how fast the memory is."""
    array = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
    add = jax.jit(lambda array: array + 1.0, donate_argnums=0)

    def run() -> Array:
        nonlocal array
        array = add(array)
        return array

    return run


def floor(step: Step) -> Program:
    """The model passes alone, in one program."""
    config, entries = step.config, step.scored.entries
    leaves = jnp.ones((config.batch_size, config.context.history, config.base.dim), entries.embeddings.dtype)
    params = {**step.params, "anchor": jax.tree.map(jnp.copy, step.params["lens"])}
    signs = jnp.sign(jax.random.normal(jax.random.key(1), entries.valid.shape))
    passes = jax.jit(functools.partial(model_passes, models=step.models, context=config.context))
    return functools.partial(passes, params, entries, leaves, signs, _windows(step.batch, config).horizon)


def model_passes(
    params: dict[str, Params],
    entries: Entries,
    leaves: Array,
    signs: Array,
    horizons: Array,
    *,
    models: Models,
    context: ContextConfig,
) -> Any:
    """What a step cannot do without: GistNet, the base model's logits, LensNet and its gradient, the anchor.

    Args:
      params: of all models, and of the "anchor".
      entries: of V contexts for each of B sequences, leading axes [B, V].
      leaves: embeddings of the histories [B, C, D].
      signs: float32[B, V, W], what LensNet's scores are multiplied with.
      horizons: int32[B, H].
      models: base model, GistNet and LensNet.
      context: block size and levels.
    """
    gists = _gists(models.gist, params["gist"], leaves, context)
    logits = horizon_logits(models.base, params["base"], entries, horizons)
    loss, grads = lens_gradient(models.lens, params["lens"], entries, signs)
    anchor = policy_scores(models.lens, params["anchor"], entries)
    return gists, logits, loss, grads, anchor


def _windows(batch: Batch, config: Config) -> Window:
    return split(batch["tokens"], horizon=config.context.horizon)


def _gists(gist: GistEncoder, params: Params, leaves: Array, context: ContextConfig) -> list[Array]:
    """Every level of gists over leaves [B, C, D]."""
    size, levels = context.block_size, [leaves]
    for _ in range(context.max_lod):
        rows, count, dim = levels[-1].shape
        blocks = levels[-1][:, : count // size * size].reshape(-1, size, dim)
        levels.append(gist.apply(params, blocks).reshape(rows, -1, dim).astype(leaves.dtype))
    return levels[1:]


def horizon_logits(base: LanguageModel, params: Params, entries: Entries, horizons: Array) -> Array:
    """Logits [B, V, H, vocabulary] at the rows that predict the horizons [B, H]."""

    def one(entry: Entries, horizon: Array) -> Array:
        read = nll.reading(base, params, entry, horizon)
        return base.logits(params, read.entries, read.rows)

    return jax.vmap(jax.vmap(one, (0, None)))(entries, horizons)


def lens_gradient(lens: LensPolicy, params: Params, entries: Entries, signs: Array) -> tuple[Array, Params]:
    """LensNet forward and backward: of the mean of its scores, float32[B, V, W], with these signs."""
    return jax.value_and_grad(lambda params: jnp.mean(signs * policy_scores(lens, params, entries)))(params)


def parts(step: Step) -> dict[str, Program]:
    """The parts of a step, each a program of its own."""
    config, models, params, state = step.config, step.models, step.params, jax.tree.map(jnp.copy, step.state)
    recipe, scored, geometry, capacity = config.recipe, step.scored, config.geometry, config.capacity
    window = _windows(step.batch, config)
    build = jax.vmap(lambda row: build_tree(models, params, row, geometry))
    trees = jax.jit(build)(window.history)
    scores = jax.jit(lambda: policy_scores(models.lens, params["lens"], scored.entries))()
    keys = jax.random.split(jax.random.key(2), config.batch_size)
    tx = optimizer.make_optimizer(config.optimizer)

    def rollouts(key: Array) -> Any:
        count, share = config.context.rollouts, state.hyper.high_lod_share
        return sample_rollouts(key, capacity, share, rollouts=count, geometry=geometry, capacity=capacity)

    def loss(values: Array, scored: ScoredVariants, state: TrainState) -> Any:
        statistics = Statistics(state.normaliser, state.demand, state.hyper.temperature)
        output = objective.lens_objective(
            jax.random.key(0), scored, values, scores, statistics, state.hyper, recipe=recipe
        )
        return output.loss, output.metrics

    def update(grads: Params, opt_state: Any, lens: Params) -> Any:
        opt_state = optimizer.set_rates(opt_state, learning_rate=1e-3, weight_decay=0.0)
        # optax raises a float decay to an integer step count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update({"lens": grads}, opt_state, {"lens": lens})
            return optax.apply_updates({"lens": lens}, updates), opt_state

    def lens(params: Params, entries: Entries) -> Any:
        return lens_gradient(models.lens, params, entries, jnp.ones(entries.valid.shape))

    def anchor(params: Params, entries: Entries) -> Any:
        return policy_scores(models.lens, params, entries)

    def base(params: Params, entries: Entries) -> Any:
        losses = functools.partial(nll.token_nll, models.base, params)
        return jax.vmap(lambda rows, tail: jax.vmap(lambda row: losses(row, tail))(rows))(entries, window.horizon)

    gather = jax.vmap(lambda tree, variants: jax.vmap(lambda one: contexts.materialise(tree, one))(variants))
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "tree": (build, (window.history,)),
        "rollouts": (jax.vmap(rollouts), (keys,)),
        "materialise": (gather, (trees, scored.contexts)),
        "nll": (base, (params["base"], scored.entries)),
        "lens": (lens, (params["lens"], scored.entries)),
        "anchor": (anchor, (params["lens"], scored.entries)),
        "objective": (jax.value_and_grad(loss, has_aux=True), (scores, scored, state)),
        "optimizer": (update, (params["lens"], state.opt_state, params["lens"])),
    }
    return {name: functools.partial(jax.jit(function), *arrays) for name, (function, arrays) in calls.items()}
