"""Several processes on one machine, as a cluster would start them: they train, lose one, and go on without it.

    make cluster
    python -m experiments.cluster --processes 4 --devices 2 --output-dir runs/cluster

Each process has emulated CPU devices of its own and is told by environment variables who it is, as a Slurm job or a pod
is (docs/guides/devices.md has templates for both). One is killed in the middle of training; the others must end by
themselves, each with one line; one process fewer goes on from the newest checkpoint to the end. The losses are then
those of a run that one process made alone, to rounding. Leaves the runs and what every process printed.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments import command
from lensjax._settings import Bound, PositiveInt, settings
from lensjax.models.base_lm import BaseConfig
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.runs.store import checkpoint, config_file, files, run_folder
from lensjax.runs.store.log import read_rows
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.pretrain import PretrainConfig

CONFIG = Config(
    steps=0,
    batch_size=24,  # for 8 devices as for 6
    logging_steps=1,
    eval_steps=20,
    eval_batches=2,
    save_steps=10,
    base=BaseConfig(dim=8, layers=1, heads=2, kv_heads=1, mlp_dim=16, conv_width=2),
    gist=GistConfig(heads=2),
    lens=LensConfig(dim=8, layers=1, heads=2, mlp_dim=16),
    context=ContextConfig(window=32, block_size=4, max_lod=1, horizon=2, recent_tokens=4, rollouts=2),
    optimizer=OptimizerConfig(warmup_steps=2),
    data=DataConfig(task="recall"),
    pretrain=PretrainConfig(steps=40, batch_size=24),
)
PHASE, KILLED, AFTER = "pretrain", 1, 20
"""The process that is killed in a phase, and the checkpoint after which it is."""
ROUNDING = 1e-4
"""How far losses may be apart, in parts of them: sums over other numbers of devices round differently, and optimizers
make more of that with every step."""
_LOOKS = 0.05  # seconds between two looks at what the processes do


@settings()
class Arguments:
    """How many processes, and where."""

    output_dir: Path = Path("runs/cluster")
    processes: Annotated[int, Bound(2, 64)] = 4
    devices: PositiveInt = 2
    """Of each process."""
    patience: PositiveInt = 300
    """Seconds in which processes must end, or show what is waited for."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(cluster, Arguments, words, description=__doc__)


def cluster(arguments: Arguments) -> None:
    """Plays it all, and says what came of it.

    Raises:
      ValueError: something came otherwise; names the file with what the process said.
    """
    folder = arguments.output_dir
    command.check_free(folder, resume=False)
    folder.mkdir(parents=True, exist_ok=True)
    config, run = folder / "config.json", folder / "run"
    files.write_text(config, config_file.to_json(CONFIG))
    train = ("-m", "experiments.train", str(config), "--output-dir")
    print(f"{arguments.processes} processes with {arguments.devices} devices each train", flush=True)
    with started((*train, str(run)), arguments.processes, arguments, name="first") as them:
        _wait(lambda: saved(run) >= AFTER, them, arguments.patience, what=f"checkpoint {AFTER}")
        them[KILLED].popen.kill()
        print(f"process {KILLED} is killed; checkpoint {saved(run)} of phase {PHASE} is there", flush=True)
        ended(them, arguments.patience)
    for one in them:
        print(f"  process {one.number} ended after {one.seconds:.1f} s with {one.popen.returncode}: {one.line()}")
        if (one.popen.returncode == 0) or (one.number != KILLED and not one.line().startswith("error: ")):
            raise ValueError(f"process {one.number} did not end with an error: see {one.log}")
    held = saved(run)
    fewer = arguments.processes - 1
    print(f"{fewer} processes go on from checkpoint {held}", flush=True)
    go_on(("-m", "experiments.train", "--resume", str(run)), fewer, arguments, name="second")
    print("one process makes the same run alone", flush=True)
    go_on((*train, str(folder / "alone")), 1, arguments, name="alone")
    ours, theirs = (losses(folder / name) for name in ("run", "alone"))
    if ours.keys() != theirs.keys():
        raise ValueError(f"{run} has not the steps of {folder / 'alone'}, each once")
    apart = {step: abs(ours[step] / theirs[step] - 1) for step in ours}
    before, after = (max(apart[step] for step in apart if (step > (PHASE, held)) is late) for late in (False, True))
    print(f"losses are those of one process to {before:.1e} up to checkpoint {held}, and to {after:.1e} behind it")
    if not max(before, after) < ROUNDING:
        raise ValueError(f"losses of {run} are more than {ROUNDING} from those of {folder / 'alone'}")


@dataclass
class Process:
    """One of several."""

    number: int
    popen: subprocess.Popen[bytes]
    log: Path
    """What it prints."""
    seconds: float = 0.0
    """From when they were waited for to its end."""

    def line(self) -> str:
        """What went wrong, in its own words; the last of what it printed where it did not say so."""
        lines = self.log.read_text(errors="replace").splitlines() or ["nothing"]
        return next((line for line in lines if line.startswith("error: ")), lines[-1])


@contextlib.contextmanager
def started(words: Sequence[str], count: int, arguments: Arguments, *, name: str) -> Iterator[list[Process]]:
    """Starts so many processes of one program; those that still run at the end of the block are killed.

    Args:
      words: what follows `python`.
      count: of processes.
      arguments: devices of each, and the folder for what they print.
      name: of that.
    """
    address = f"localhost:{_free_port()}"
    them = []
    try:
        for number in range(count):
            log = arguments.output_dir / f"{name}-{number}.log"
            with log.open("wb") as out:
                popen = subprocess.Popen(
                    [sys.executable, *words],
                    env={**os.environ, **environment(number, count, address, devices=arguments.devices)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            them.append(Process(number, popen, log))
        yield them
    finally:
        for one in them:
            one.popen.kill()
            one.popen.wait()


def environment(number: int, count: int, address: str, *, devices: int) -> dict[str, str]:
    """What tells a process which of several it is, and gives it emulated devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if count > 1:
        own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
    return own


def go_on(words: Sequence[str], count: int, arguments: Arguments, *, name: str) -> None:
    """Starts processes that must all end well.

    Raises:
      ValueError: one does not.
    """
    with started(words, count, arguments, name=name) as them:
        ended(them, arguments.patience)
    for one in them:
        if one.popen.returncode != 0:
            raise ValueError(f"process {one.number} ended with {one.popen.returncode}: {one.line()} ({one.log})")


def ended(them: Sequence[Process], patience: float) -> None:
    """Waits for the end of all, and notes when each came.

    Raises:
      ValueError: one hangs.
    """
    began = time.monotonic()
    running = list(them)
    while running:
        for one in [one for one in running if one.popen.poll() is not None]:
            one.seconds = time.monotonic() - began
            running.remove(one)
        if time.monotonic() - began > patience:
            raise ValueError(f"process {running[0].number} hangs: see {running[0].log}")
        time.sleep(_LOOKS)


def saved(run: Path) -> int:
    """The newest checkpoint of the phase, -1 before the first."""
    step = checkpoint.latest_step(run_folder.checkpoint_dir(run, PHASE))
    return -1 if step is None else step


def losses(run: Path) -> dict[tuple[str, int], float]:
    """The loss of each step of a run, by phase and step.

    Raises:
      ValueError: a step was written twice, or its loss is no number.
    """
    rows = [row for row in read_rows(run) if "loss" in row]
    found = {(row["phase"], row["step"]): row["loss"] for row in rows}
    if len(found) < len(rows) or not np.isfinite(list(found.values())).all():
        raise ValueError(f"metrics.jsonl of {run} has a step twice, or a loss that is no number")
    return found


def _wait(is_there: Callable[[], bool], them: Sequence[Process], patience: float, *, what: str) -> None:
    began = time.monotonic()
    while not is_there():
        for one in them:
            if one.popen.poll() is not None:
                raise ValueError(f"process {one.number} ended before {what} was there: {one.line()} ({one.log})")
        if time.monotonic() - began > patience:
            raise ValueError(f"{what} was not there after {patience} seconds: see {them[0].log}")
        time.sleep(_LOOKS)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
