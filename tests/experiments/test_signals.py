"""`experiments.studies.signals`: its cells, what each trains and on what, how the rate is chosen, and what it writes."""

import csv
import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import train as train_script
from experiments.studies import signals as script
from lensjax import _settings
from lensjax.evaluation import compare
from lensjax.runs.data import batches as data
from lensjax.runs.store import checkpoint, config_file, run_folder
from lensjax.training.steps import distill, preference
from tests.runs import TINY, contents

# 30 tokens before the cursor, 16 of which the base model reads; two of them and a horizon of 2 are in no block.
PRESET = _settings.replace(
    TINY,
    **{
        "context.omit": True,
        "context.recent_tokens": 2,
        "hyper.context_start": 18 / 30,
        "hyper.context_end": 18 / 30,
        "focus.steps": 2,
        "optimizer.warmup_steps": 0,
        "data.query": 2,
    },
)
RATES, SEEDS, SEQUENCES = (1e-3, 3e-2), (0, 1), 4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A preset, and a run whose base model is as it was drawn."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "preset.json").write_text(config_file.to_json(PRESET))
    base = replace(PRESET, output_dir=str(folder / "base"))
    models = base.build_models()
    params = {name: getattr(models, name).init(jax.random.key(5)) for name in ("base", "gist")}
    run_folder.create_run(base.output_dir, base)
    checkpoint.save(run_folder.checkpoint_dir(folder / "base", "pretrain"), 4, {"params": params})
    return folder


def arguments(workplace, name="out", **changes):
    settings = {
        "base_run": str(workplace / "base"),
        "output_dir": workplace / name,
        "preset": str(workplace / "preset.json"),
        "steps": 2,
        "batch_size": 2,
        "rollouts": 2,
        "seeds": SEEDS,
        "learning_rates": RATES,
        "sequences": SEQUENCES,
        "views": ("entries", "map and attention"),
        "starts": ("recency",),
    }
    return script.Arguments(**settings | changes)


@pytest.fixture(scope="module")
def done(workplace):
    """The rows of the grid, the file, and how often each program of a step was called."""
    calls = []

    def counted(step, name):
        def call(*args, **static):
            calls.append(name)
            return step(*args, **static)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "compiled", counting(script.compiled, calls))
        rows = script.run(arguments(workplace))
    with (workplace / "out" / "signals.csv").open(newline="") as file:
        return rows, list(csv.DictReader(file)), calls
