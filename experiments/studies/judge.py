"""Do the teachers say what is true? Their order of the old blocks, beside what each block is worth when it is tried.

    python -m experiments.studies.judge --run runs/stdlib/base --output-dir runs/judge

The judge: recency without its oldest block and with one old block in its place, for every old block; what that lowers
the loss of the horizon by is the block's worth, exactly. Half of it may be luck with this horizon: the judge is also
told by every other token and asked about the rest. Rank correlations (Spearman) over the old blocks of a window, and
the worth of the block that each teacher puts first; means over held-out windows with 95 % intervals.
"""

import functools
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from experiments import command
from experiments.tables import write_json
from lensjax._settings import Bound, settings
from lensjax.context import allocator, nodes
from lensjax.context import working as contexts
from lensjax.context.working import WorkingContext
from lensjax.evaluation import baselines
from lensjax.evaluation.statistics import estimate
from lensjax.models import AttentiveLanguageModel, Models, Params
from lensjax.models.decision import build_tree, split
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, run_folder
from lensjax.training import key_tokens, nll, teachers

_AT_ONCE = 16


@settings()
class Arguments:
    """Whose base model, and on what."""

    run: Path
    output_dir: Path = Path("runs/judge")
    split: Literal["validation", "test"] = "validation"
    windows: Annotated[int, Bound(1, 2**20)] = 128


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(judge, Arguments, words, description=__doc__)


def judge(arguments: Arguments) -> dict[str, dict[str, list[float]]]:
    """All teachers; returns what `judge.json` holds."""
    config = config_file.load(run_folder.config_path(arguments.run), Config)
    if not config.context.omit:
        raise ValueError(f"{arguments.run} has context.omit False: only with omission one block can replace another")
    if config.budget - config.context.block_size < config.context.recent_tokens:
        raise ValueError(f"{arguments.run} has a budget of {config.budget}: recency must hold a block before the query")
    command.check_free(arguments.output_dir, resume=False)
    models = config.build_models()
    params = load_params(arguments.run, config, models, ("base", "gist"))
    measure = jax.jit(jax.vmap(functools.partial(measured, models, params, config)))
    size = config.batch_size
    batches = data.fixed_batches(
        config, arguments.split, batch_size=size, count=arguments.windows // size, seed=EVALUATION_SEED
    )
    found = [jax.device_get(measure(batch["tokens"])) for batch in batches]
    both = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    report = {name: [x.mean, *x.interval] for name, x in ((name, estimate(both[name])) for name in both)}
    by_teacher: dict[str, dict[str, list[float]]] = {}
    for name, values in report.items():
        teacher, what = name.split("/")
        by_teacher.setdefault(teacher, {})[what] = [float(value) for value in values]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(by_teacher, arguments.output_dir / "judge.json")
    console = Console()
    console.out(f"{'':<22}{'rank correlation':<28}{'worth of its first block, nats a token'}", highlight=False)
    for teacher, row in by_teacher.items():
        cells = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in (row["rank"], row["first"])]
        console.out(f"{teacher:<22}{cells[0]:<28}{cells[1]}", highlight=False)
    return by_teacher


def measured(models: Models, params: dict[str, Params], config: Config, tokens: Array) -> dict[str, Array]:
    """Of one window: each teacher's rank correlation with the judge, and the worth of the block that it puts first."""
    geometry, length, base = config.geometry, config.budget, params["base"]
    window = split(tokens, horizon=config.context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    old = (geometry.history - length) // geometry.block_size

    def loss(context: WorkingContext) -> Array:
        read = contexts.materialise(tree, contexts.read(context, geometry))
        return nll.token_nll(models.base, base, read, window.horizon)

    recency = loss(contexts.recency(length, geometry, capacity=length))
    start = jnp.arange(geometry.blocks(1)) < old

    def swapped(block: Array) -> Array:
        collapsed = start.at[block].set(False).at[old].set(True)
        state = allocator.FocusState(collapsed, jnp.zeros(collapsed.shape, jnp.int32))
        return loss(allocator.to_context(state, geometry, capacity=length))

    gains = recency[None] - jax.lax.map(swapped, jnp.arange(old), batch_size=_AT_ONCE)
    worth, even, odd = gains.mean(axis=1), gains[:, ::2].mean(axis=1), gains[:, 1::2].mean(axis=1)
    need = jax.nn.relu(key_tokens.token_gain(models.base, base, window, short=config.short).gain)
    said: dict[str, Array] = {"gradient": teachers.gate_gradients(models.base, base, window, geometry)}
    if isinstance(models.base, AttentiveLanguageModel):
        attend = functools.partial(teachers.future_attention, models.base, base, window)
        said |= {"attention, mean head": attend(heads="mean"), "attention": attend()}
        said["attention by need"] = attend(weights=need)
        query = slice(-geometry.recent_tokens, None)
        said["snapkv (causal)"], _ = baselines.attention(models.base, base, window.history, query, geometry)
    said["lookup (causal)"] = baselines.lookup(window.history, geometry)
    said["age (causal)"] = jnp.arange(geometry.history, dtype=jnp.float32)
    report: dict[str, Array] = {}
    for name, values in said.items():
        ranked = nodes.pool_tokens(values, geometry)[:old]
        report |= {f"{name}/rank": spearman(ranked, worth), f"{name}/first": worth[jnp.argmax(ranked)]}
    report |= {"judge, other tokens/rank": spearman(even, odd), "judge, other tokens/first": odd[jnp.argmax(even)]}
    return report | {"judge/rank": jnp.ones(()), "judge/first": worth.max()}


def spearman(first: Array, second: Array) -> Array:
    """Correlation of the ranks of two float32[n]; equal values share no rank, the first of them has the lower."""
    ranks = [
        jnp.argsort(jnp.argsort(values, stable=True), stable=True).astype(jnp.float32) for values in (first, second)
    ]
    x, y = (rank - rank.mean() for rank in ranks)
    return jnp.sum(x * y) / jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))


if __name__ == "__main__":
    main()
