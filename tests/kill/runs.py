"""The trainers' smallest runs, and all that two of them must have in common."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.process import errors_end
from experiments.quiet_star import train as quiet_star
from experiments.quiet_star.config import BakeConfig, QuietStarConfig, RLConfig
from experiments.quiet_star.model import ModelConfig
from experiments.rlan import train as rlan
from experiments.rlan.config import RlanConfig
from experiments.rlan.model import GridConfig
from experiments.rlan.rules import RulesConfig
from lensjax.models.hyperlora import HyperLoRAConfig
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store import checkpoint, config_file, run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.optim.optimizer import OptimizerConfig
from tests import runs

QUIET_STAR = QuietStarConfig(
    batch_size=4,
    logging_steps=2,
    eval_steps=3,
    save_steps=2,
    eval_batches=1,
    model=ModelConfig(dim=8, layers=1, heads=2, mlp_dim=8),
    bake=BakeConfig(steps=4),
    rl=RLConfig(episodes=5, warmup_episodes=2, thoughts=2, value_hidden=8),
    optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
    stopping=StoppingConfig(),
)
RLAN = RlanConfig(
    steps=5,
    batch_size=2,
    logging_steps=2,
    eval_steps=3,
    save_steps=1,
    eval_batches=1,
    vote_batches=1,
    vote_permutations=1,
    equivariance_views=1,
    grid=GridConfig(dim=8, steps=2),
    rules=RulesConfig(size=3, pairs=2),
    hyperlora=HyperLoRAConfig(rank=2),
    optimizer=OptimizerConfig(warmup_steps=1),
)


@dataclass(frozen=True)
class Trainer:
    """A program that trains."""

    name: str
    config: Any
    run: Callable[..., dict[str, Any]]

    def start(self, folder: Path) -> None:
        """A run from its first step on."""
        self.run(replace(self.config, output_dir=str(folder)))

    def go_on(self, folder: Path) -> None:
        """The run in a folder from its newest checkpoint on, as `--resume` does."""
        stored = config_file.load(run_folder.config_path(folder), type(self.config))
        self.run(replace(stored, output_dir=str(folder)), resume=True)

    def program(self, act: Callable[[], object]) -> None:
        """What the command line makes of either."""
        with errors_end():
            act()


def _cheap(config: Any, *, resume: bool = False) -> dict[str, Any]:
    with runs.cheap_programs():
        return runs.start(config, resume=resume)


def _whole(config: Any, *, resume: bool = False) -> dict[str, Any]:
    return runs.start(config, resume=resume)


_ALL_PHASES = runs.tiny_config(Path("never"), **runs.ALL)
TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer("train", _ALL_PHASES, _cheap),  # all of the host's part; a step moves one array
        Trainer("train-whole", _ALL_PHASES, _whole),
        Trainer("rlan", RLAN, rlan.run),
        Trainer("quiet_star", QUIET_STAR, quiet_star.run),
    )
}


def essence(folder: Path) -> str:
    """All that must be the same to the bit, as text: rows, summary, and sums of the newest checkpoints' arrays."""
    summary = json.loads((folder / run_folder.SUMMARY).read_text())
    rows = [{name: row[name] for name in row if not name.startswith("perf/")} for row in read_rows(folder)]
    saved = {}
    for phase in sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()):
        if phase == "frozen":
            continue
        step = checkpoint.latest_step(run_folder.checkpoint_dir(folder, phase))
        if step is None:  # a stranger's folder
            continue
        saved[phase] = step, {name: str(value) for name, value in _arrays(folder, phase, step).items()}
    kept = {name: summary[name] for name in summary if not name.endswith("seconds")}
    return json.dumps({"rows": rows, "summary": kept, "saved": saved}, sort_keys=True)


def _arrays(folder: Path, phase: str, step: int) -> dict[str, str]:
    return {
        name: hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else json.dumps(value)
        for name, value in runs.saved_arrays(folder, phase, step).items()
    }
