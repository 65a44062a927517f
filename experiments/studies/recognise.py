"""Can a query be recognised in a gist at all? A bound for LensNet on recall, without any preference.

    python -m experiments.studies.recognise --run runs/recall/base

Of the gists of all blocks of a sequence one stands for the block that the query begins. Two scorers point at it: the
product of the embeddings themselves, which nobody has trained, and a linear probe, two matrices between them that are
trained on the answers. Embeddings and GistNet are those of a run. Prints, for 1, 2 and 4 tokens of query, how often
each is right, and leaves the same in `recognise.csv` in the run's folder.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from rich.console import Console

from experiments import command
from experiments.tables import write_csv
from lensjax import _settings
from lensjax._settings import PositiveInt, Seed, settings
from lensjax.models import Models, Params
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.load import load_params
from lensjax.runs.store import config_file, run_folder

BATCH, HELD_OUT = 256, 2048


@settings()
class Arguments:
    """What to probe."""

    run: Path
    """Folder of a run on recall."""
    queries: tuple[PositiveInt, ...] = (1, 2, 4)
    steps: PositiveInt = 1500
    """Training steps of the probe."""
    seeds: tuple[Seed, ...] = (0, 1, 2)


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(probe, Arguments, words, description=__doc__)


def probe(arguments: Arguments) -> list[dict[str, Any]]:
    """Probes every length of query with every seed, and returns the rows of `recognise.csv`."""
    config = config_file.load(run_folder.config_path(arguments.run), Config)
    if config.data.task != "recall":
        raise ValueError(f"{arguments.run} has data.task {config.data.task!r}: expected a run on recall")
    output = arguments.run / "recognise.csv"
    if output.exists():
        raise FileExistsError(f"{output} exists: move it away")
    models, console = config.build_models(), Console()
    params = load_params(arguments.run, config, models, ("base", "gist"))
    rows = []
    for query in arguments.queries:
        shape = {"context.horizon": config.context.block_size - query, "context.recent_tokens": query}
        asking = _settings.replace(config, **{"data.query": query}, **shape)
        for seed in arguments.seeds:
            plain, probed = _accuracies(asking, models, params, seed, arguments.steps)
            rows.append({"query": query, "seed": seed, "embeddings": plain, "probe": probed})
        own = [row for row in rows if row["query"] == query]
        shares = {name: np.array([row[name] for row in own]) for name in ("embeddings", "probe")}
        ranges = (f"{name} {x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for name, x in shares.items())
        console.out(f"query of {query}: {', '.join(ranges)}", highlight=False)
    write_csv(rows, output)
    return rows


def _accuracies(
    config: Config, models: Models, params: dict[str, Params], seed: int, steps: int
) -> tuple[float, float]:
    """Share of held-out sequences in which the embeddings, and the probe, point at the right block."""
    weights = jnp.eye(config.base.dim), jnp.eye(config.base.dim)
    optimizer = optax.adam(3e-3)

    def scores(weights: tuple[Array, Array], tokens: ArrayLike) -> Array:
        gists, query = _seen(models, params, jnp.asarray(tokens), config)
        return jnp.einsum("bqd,bnd->bn", _unit(query) @ weights[0], _unit(gists) @ weights[1])

    def loss(weights: tuple[Array, Array], batch: data.Batch) -> Array:
        logits = scores(weights, batch["tokens"])
        answers = batch["answers"][:, 0] // config.context.block_size
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    @jax.jit
    def step(carry: Any, batch: data.Batch) -> Any:
        weights, state = carry
        # optax raises a decay to the power of an integer, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(weights, batch), state)
        return optax.apply_updates(weights, updates), state

    examples = data.make_iterator(config, "train", seed=seed, batch_size=BATCH)
    carry = weights, optimizer.init(weights)
    for _ in range(steps):
        carry = step(carry, next(examples))
    held_out = data.fixed_batches(config, "test", batch_size=HELD_OUT, count=1, seed=seed)[0]
    answers = held_out["answers"][:, 0] // config.context.block_size

    def accuracy(weights: tuple[Array, Array]) -> float:
        return float(jnp.mean(jax.jit(scores)(weights, held_out["tokens"]).argmax(axis=1) == answers))

    return accuracy(weights), accuracy(carry[0])


def _seen(models: Models, params: dict[str, Params], tokens: Array, config: Config) -> tuple[Array, Array]:
    """Gists of all blocks before the query [B, N, D], and the query's embeddings [B, Q, D]."""
    size, count, history = config.context.block_size, config.context.geometry.blocks(1), config.context.history
    embeddings = models.base.embed(params["base"], tokens.reshape(-1)).reshape(*tokens.shape, -1)
    blocks = embeddings[:, : count * size].reshape(-1, size, embeddings.shape[-1])
    gists = models.gist.apply(params["gist"], blocks).reshape(len(tokens), count, -1)
    return gists, embeddings[:, history - config.data.query : history]


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-8)


if __name__ == "__main__":
    main()
