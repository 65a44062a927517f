"""The host's part of training: batches in, metrics and checkpoints out, and nothing lost when it is interrupted.

One step of the loop is: update, log, evaluate, save. The device is never waited for except where metrics are written.

With `config.stopping.patience` a phase ends where its held-out loss no longer improves, and gives back its best state.
The checkpoint of that state is one like any other, written at the evaluation and spared from deletion.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import grain
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from lensjax._numerics import may_be_nan
from lensjax.runs.engine import devices, recovery, stopping
from lensjax.runs.engine.progress import StepBar
from lensjax.runs.engine.stopping import StoppingConfig
from lensjax.runs.store import checkpoint
from lensjax.runs.store import log as run_logging
from lensjax.runs.store.log import RunLogger
from lensjax.runs.store.run_folder import checkpoint_dir
from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED

State = TypeVar("State")


class Interrupted(SystemExit):
    """The run was asked to stop (SIGTERM, SIGHUP or Ctrl-C), and has saved what it needs to go on."""


class Claim(Protocol):
    """A run's folder in the hands of its process, such as `lensjax.runs.folder.Claim`."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Goes into every checkpoint's manifest."""
        ...

    @property
    def require(self) -> Callable[[], None]:
        """Raises where the folder is no longer that of the run."""
        ...


class Settings(Protocol):
    """What the loop reads of a run's configuration, such as `lensjax.Config`."""

    @property
    def example_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one example by the name of the array, int32 all of them: what the step is given of a batch."""
        ...

    @property
    def shard_parameters(self) -> bool: ...  # noqa: D102
    @property
    def logging_steps(self) -> int: ...  # noqa: D102
    @property
    def eval_steps(self) -> int: ...  # noqa: D102
    @property
    def save_steps(self) -> int: ...  # noqa: D102
    @property
    def stopping(self) -> StoppingConfig: ...  # noqa: D102


@dataclass(frozen=True)
class Phase:
    """One stretch of training."""

    name: str
    """One of the logger's phases."""
    steps: int
    batch_size: int
    step: Callable[[Any, dict[str, Array], Any], tuple[Any, dict[str, Array]]]
    """Pure `(state, batch, frozen) -> (state, metrics)`; compiled here, once, with the state donated."""
    evaluate: Callable[[Any], Mapping[str, float]]
    """Held-out metrics of a state."""
    headline: tuple[str, ...]
    """Held-out metrics to show while it runs."""
    monitor: str
    """The held-out metric, a loss, that `config.stopping` looks at."""


def run_phase(
    phase: Phase,
    state: State,
    batches: grain.DatasetIterator,
    *,
    frozen: Any,
    run_dir: Path,
    config: Settings,
    mesh: Mesh,
    logger: RunLogger,
    console: Console,
    claim: Claim | None = None,
) -> tuple[State, float]:
    """Trains from the newest checkpoint of the phase, or from `state`, to the end of the phase.

    The end is the last step, or with patience the evaluation at which it ran out.

    Args:
      phase: what to do.
      state: the state at step 0; its buffers are donated.
      batches: training data at its start; moved to the checkpoint's position.
      frozen: what the step reads and never changes, such as a base model: neither donated nor saved.
      run_dir: the run's folder.
      config: read are the shapes of an example, whether to split the state, the logging, evaluation and saving steps,
        and when to stop.
      mesh: the devices that share each batch; a run may go on with another number of them.
      logger: takes the metrics.
      console: shows the progress.
      claim: what checkpoints are written with; None where no other process can have the folder.

    Returns:
      The state after the last step, or with patience that of the best evaluation; and the seconds that the phase took,
      earlier starts included.

    Raises:
      Interrupted: on SIGTERM, SIGHUP or Ctrl-C, after a checkpoint was saved.
      FloatingPointError: a metric became NaN or infinite; names step, term and the last good checkpoint.
      ValueError: with patience, the evaluation does not report the metric to monitor.
    """
    folder = checkpoint_dir(run_dir, phase.name)
    state, frozen = (devices.place(tree, mesh, split=config.shard_parameters) for tree in (state, frozen))
    first, elapsed, best = 0, 0.0, stopping.init()
    newest = checkpoint.latest_step(folder)
    if newest is not None:
        state, saved = checkpoint.restore(folder, newest, state)
        batches.set_state(saved["batches"])
        first, elapsed = newest, saved["seconds"]
        _say_other_rows(saved.get("rows"), logger, phase.name, first, console)
        best = stopping.Best(**saved["stopping"]) if "stopping" in saved else best
    if first == phase.steps or stopping.is_over(best, patience=config.stopping.patience):
        return _kept(folder, best, state), elapsed
    if logger.is_written(phase.name, first + 1):
        again = f"{phase.name} is trained again from step {first}: its later checkpoints are damaged or gone"
        console.out(f"{again}; the metrics of these steps stay as they are", highlight=False)
    started = time.perf_counter() - elapsed

    # Compiled ahead of time: a call with other shapes would be an error, never a second compile.
    spec = {
        name: devices.batch_spec((phase.batch_size, *shape), jnp.int32, mesh)
        for name, shape in config.example_shapes.items()
    }
    placed = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
    compiled = jax.jit(phase.step, donate_argnums=0, out_shardings=placed).lower(state, spec, frozen).compile()
    devices.meet()  # the first step connects all devices, and waits for late ones for 30 seconds alone
    step = may_be_nan(compiled)
    recorder = _Recorder(phase.name, logger, folder)
    with _stop_requests() as stop, StepBar(console, phase.name, phase.steps, done=first) as bar:
        for done in range(first + 1, phase.steps + 1):
            rows = next(batches)
            batch = {name: devices.share_out(rows[name], mesh) for name in spec}
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, frozen)
            bar.advance()
            recorder.take(done, metrics, tokens=sum(array.size for array in batch.values()))
            is_last = done == phase.steps
            is_logged = is_last or done % config.logging_steps == 0
            if is_logged:
                recorder.log()
            if is_last or done % config.eval_steps == 0:
                recorder.check()
                report = phase.evaluate(state)
                recorder.log_evaluation(done, report)
                headline = {name: report[name] for name in phase.headline if name in report}
                bar.show(headline)
                shown = "  ".join(f"{name} {value:.3f}" for name, value in headline.items())
                console.out(f"{phase.name} {done:>6}  {shown}", highlight=False)
                best = _judged(best, phase, done, report, config.stopping)
                is_last = is_last or stopping.is_over(best, patience=config.stopping.patience)
            if is_logged or is_last:
                stop.agree()
            if is_last or stop.requested or done == best.step or done % config.save_steps == 0:
                recorder.check()
                position = {"batches": batches.get_state(), "seconds": time.perf_counter() - started}
                logger.sync()
                position |= {"rows": logger.written(phase.name)}
                position |= {} if best.step is None else {"stopping": asdict(best)}
                if claim is not None:
                    claim.require()
                identity = None if claim is None else claim.identity
                checkpoint.save(folder, done, state, data_state=position, spare=best.step, identity=identity)
            if is_last or stop.requested:
                break
    # Also after the last step: another phase may follow, which would not know of the request.
    if stop.requested:
        console.out(f"stopped at {phase.name} step {done}; go on with --resume {run_dir}", highlight=False)
        raise Interrupted(128 + stop.agreed)
    if best.step is not None:
        kept = f"keeps step {best.step}, {phase.monitor} {best.score:.3f}"
        console.out(f"{phase.name} ended at step {done} of {phase.steps} and {kept}", highlight=False)
    return _kept(folder, best, state), time.perf_counter() - started


def kept_step(directory: Path) -> int | None:
    """The step whose parameters are the result of a phase so far; None before the first checkpoint.

    Args:
      directory: the phase's `checkpoint_dir`.

    Returns:
      With patience the step of the best evaluation, once there is one; else that of the newest checkpoint. Those that
      are damaged are named in a warning, and the one before them is taken.

    Raises:
      DamagedError: there are checkpoints, and all of them are damaged.
    """
    found = recovery.newest(directory)
    if found.step is None and found.damages:
        raise found.damages[0]
    found.warn()
    return found.kept


def _say_other_rows(written: list[int] | None, logger: RunLogger, phase: str, step: int, console: Console) -> None:
    """A word on rows that are no longer as they were written before a checkpoint."""
    there = logger.written(phase)
    if written is None or there == written:
        return
    what = "the others are lost, and missing in the curves" if there[0] < written[0] else "others were added by hand"
    what = "not all of them are as they were written" if there[0] == written[0] else what
    console.out(
        f"warning: metrics.jsonl holds {there[0]} of the {written[0]} rows of phase {phase} up to step {step}: {what}",
        highlight=False,
    )


def _judged(
    best: stopping.Best, phase: Phase, step: int, report: Mapping[str, float], config: StoppingConfig
) -> stopping.Best:
    """Takes in an evaluation; without patience no evaluation is the best one."""
    if config.patience is None:
        return best
    if phase.monitor not in report or math.isnan(report[phase.monitor]):
        raise ValueError(
            f"phase {phase.name} monitors {phase.monitor}, and its evaluation gives no such number: {dict(report)}"
        )
    return stopping.update(best, report[phase.monitor], step, min_improvement=config.min_improvement)


def _kept(directory: Path, best: stopping.Best, state: State) -> State:
    """The state that an ended phase gives back."""
    return state if best.step is None else checkpoint.restore(directory, best.step, state)[0]


class _Recorder:
    """Sends metrics to the log a few steps late, and looks at those of every step for NaN."""

    def __init__(self, phase: str, logger: RunLogger, folder: Path) -> None:
        self._phase, self._logger, self._folder = phase, logger, folder
        self._unchecked: list[tuple[int, dict[str, Array]]] = []
        self._steps, self._tokens, self._since = 0, 0, time.perf_counter()

    def take(self, step: int, metrics: dict[str, Array], *, tokens: int) -> None:
        """Keeps one step's metrics where they are, on the device."""
        self._unchecked.append((step, metrics))
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens

    def log(self) -> None:
        """Writes the newest step's metrics, and the speed since the last time."""
        step, metrics = self._unchecked[-1]
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - self._since
        speed = {"perf/steps_per_second": self._steps / seconds, "perf/tokens_per_second": self._tokens / seconds}
        self._logger.log(self._phase, step, {**metrics, **speed})
        self._logger.flush()
        self.check()
        self._steps, self._tokens, self._since = 0, 0, time.perf_counter()

    def log_evaluation(self, step: int, report: Mapping[str, float]) -> None:
        """Writes held-out metrics."""
        self._logger.log(self._phase, step, {f"eval/{name}": value for name, value in report.items()})
        run_logging.check_finite(self._logger.flush(), advice=self._advice())

    def check(self) -> None:
        """Fetches what was not looked at yet, and stops the run at the first step that is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        fetched = jax.device_get([metrics for _, metrics in unchecked])
        rows = [
            {"phase": self._phase, "step": step}
            | {name: float(value) for name, value in metrics.items() if name not in (*MAY_BE_UNDEFINED, *HISTOGRAMS)}
            for (step, _), metrics in zip(unchecked, fetched, strict=True)
        ]
        run_logging.check_finite(rows, advice=self._advice())

    def _advice(self) -> str:
        newest = checkpoint.latest_step(self._folder)
        if newest is None:
            return "there is no checkpoint of this phase yet; lower the learning rate and start anew"
        return f"the last good checkpoint is {self._folder / str(newest)}"


class _Stop:
    """Whether a signal asked the run to stop.

    Several processes get it at different steps, or one alone gets it: they agree where they wait for each other anyway.
    """

    received = 0
    """The signal that this process got."""
    agreed = 0
    """The one that all processes know of."""

    def receive(self, number: int) -> None:
        self.received = number
        if jax.process_count() == 1:
            self.agreed = number

    def agree(self) -> None:
        self.agreed = devices.largest(self.received)

    @property
    def requested(self) -> bool:
        return self.agreed != 0


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Turns SIGTERM, Ctrl-C and the end of the terminal into a request to stop after the step.

    A second one stops at once. What the process was started to ignore, as by nohup, it goes on ignoring.
    """
    stop = _Stop()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    previous = {name: handler for name, handler in handlers.items() if handler is not signal.SIG_IGN}

    def request(number: int, frame: FrameType | None) -> None:
        stop.receive(number)
        restore()

    def restore() -> None:
        for name, handler in previous.items():
            signal.signal(name, handler)

    for name in previous:
        signal.signal(name, request)
    try:
        yield stop
    finally:
        restore()
