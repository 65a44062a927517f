"""A loop around a step that costs nothing, so that it can be interrupted at every step and in every place."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lensjax.models.base_lm import BaseConfig
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine import devices, loop
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.log import RunLogger, read_rows
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig

CONFIG = Config(
    steps=7,
    batch_size=2,
    logging_steps=2,
    eval_steps=3,
    save_steps=3,
    base=BaseConfig(vocab_size=32),
    context=ContextConfig(window=16, block_size=4, max_lod=1, horizon=2, recent_tokens=4),
    optimizer=OptimizerConfig(warmup_steps=0),
    data=DataConfig(task="recall"),
)
PLACES = ("batch", "logged", "evaluate", "save", "in save", "saved")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    digest: jax.Array  # of all tokens so far, in their order
    weights: jax.Array
    key: jax.Array


def init_state() -> State:
    return State(jnp.int32(0), jnp.uint32(1), jnp.zeros(3), jax.random.key(5))


def toy_step(state, batch, frozen):
    tokens = batch["tokens"].astype(jnp.uint32)
    places = 1 + jnp.arange(tokens.size, dtype=jnp.uint32).reshape(tokens.shape)
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (3,))
    after = replace(
        state,
        step=state.step + 1,
        digest=jnp.uint32(31) * state.digest + jnp.sum(tokens * places),
        weights=0.9 * state.weights + noise,
    )
    return after, {"loss": jnp.mean(after.weights**2), "digest": after.digest}


def faulty_step(state, batch, frozen, *, faults):
    """`toy_step` with metrics that are set from a step on: name to (step, value)."""
    after, metrics = toy_step(state, batch, frozen)
    faulty = {
        name: jnp.where(after.step >= step, value, metrics.get(name, 1.0)) for name, (step, value) in faults.items()
    }
    return after, metrics | faulty


class Batches:
    """Data that tells when a batch is taken."""

    def __init__(self, iterator, hook):
        self._iterator, self._hook = iterator, hook
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __next__(self):
        self._hook("batch", self.get_state()["next_index"] + 1)
        return next(self._iterator)


class Logger(RunLogger):
    """A logger that tells when it has written."""

    hook = staticmethod(lambda place, step: None)

    def flush(self):
        rows = super().flush()
        if rows:
            self.hook("logged", rows[-1]["step"])
        return rows


class Run:
    """A run folder, and what it takes to start the run as often as one likes."""

    def __init__(self, folder: Path, monkeypatch, config: Config = CONFIG):
        self.folder, self.config = folder, config
        self.output = io.StringIO()
        self._hook = lambda place, step: None
        save, checksums = checkpoint.save, checkpoint._checksums

        def hooked_save(directory, step, tree, **kwargs):
            self._hook("save", step)
            save(directory, step, tree, **kwargs)
            self._hook("saved", step)

        def hooked_checksums(directory):
            if directory.name.startswith("."):  # all is written, nothing is final
                self._hook("in save", int(directory.name.rpartition("-")[2]))
            return checksums(directory)

        monkeypatch.setattr(checkpoint, "save", hooked_save)
        monkeypatch.setattr(checkpoint, "_checksums", hooked_checksums)

    @property
    def checkpoints(self) -> Path:
        return run_folder.checkpoint_dir(self.folder, "lens")

    def start(self, *, step=toy_step, evaluate=None, hook=lambda place, step: None, state=None):
        """Starts or resumes; `hook(place, step)` is called in the places of `PLACES`."""
        self._hook = hook

        def measure(state):
            hook("evaluate", int(state.step))
            return {"nll": float(jnp.sum(state.weights))} if evaluate is None else evaluate(state)

        phase = loop.Phase("lens", self.config.steps, self.config.batch_size, step, measure, ("nll", "absent"), "nll")
        batches = data.make_iterator(self.config, "train", seed=3, batch_size=2)
        newest = checkpoint.latest_step(self.checkpoints)
        with Logger(
            self.folder, phases=("lens",), resume=None if newest is None and not self.rows() else ("lens", newest or 0)
        ) as logger:
            logger.hook = hook
            return loop.run_phase(
                phase,
                init_state() if state is None else state,
                Batches(batches, hook),
                frozen={},
                run_dir=self.folder,
                config=self.config,
                mesh=devices.make_mesh({}),
                logger=logger,
                console=Console(file=self.output),
            )

    def rows(self):
        """Metrics without those of speed."""
        rows = read_rows(self.folder)
        return [{name: row[name] for name in row if not name.startswith("perf/")} for row in rows]

    def result(self):
        """All bits of the last checkpoint, the position in the data, and the metrics."""
        state, saved = checkpoint.restore(self.checkpoints, self.config.steps, init_state())
        state = replace(state, key=jax.random.key_data(state.key))
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], saved["batches"], self.rows()


def start_and_interrupt(run, place, interrupt, done, **options):
    """Starts a run, and interrupts it once: where it first passes the place at a step that is not in `done`."""
    is_interrupted = False

    def hook(at, step):
        nonlocal is_interrupted
        if at == place and step not in done and not is_interrupted:
            is_interrupted = True
            done.add(step)
            interrupt()

    return run.start(hook=hook, **options)
