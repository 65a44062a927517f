"""The loop around a step that costs nothing, so that it can be interrupted at every step and in every place."""

import functools
import io
import json
import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lensjax.runs.config import BaseConfig, Config, ContextConfig, DataConfig, OptimizerConfig, StoppingConfig
from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices, loop
from lensjax.runs.store import checkpoint
from lensjax.runs.store.log import RunLogger, read_rows
from tests.runs import Killed, request_stop

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


def toy_step(state, batch):
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


def faulty_step(state, batch, *, faults):
    """`toy_step` with metrics that are set from a step on: name to (step, value)."""
    after, metrics = toy_step(state, batch)
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
        return loop.checkpoint_dir(self.folder, "lens")

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
            self.folder, resume=None if newest is None and not self.rows() else ("lens", newest or 0)
        ) as logger:
            logger.hook = hook
            return loop.run_phase(
                phase,
                init_state() if state is None else state,
                Batches(batches, hook),
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path / "run", monkeypatch)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What a run gives that nobody interrupts, and every place that it passes."""
    passed = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        whole = Run(tmp_path_factory.mktemp("expected"), monkeypatch)
        whole.start(hook=lambda place, step: passed.append((place, step)))
        return whole.result(), passed


# An undisturbed run


def test_a_run_by_hand(run):
    state, seconds = run.start()
    by_hand = init_state()
    batches = data.make_iterator(CONFIG, "train", seed=3, batch_size=2)
    losses = {}
    for done in range(1, 8):
        by_hand, metrics = jax.jit(toy_step)(by_hand, {"tokens": next(batches)["tokens"]})
        losses[done] = float(metrics["loss"])
    assert state.digest == by_hand.digest and state.step == 7
    np.testing.assert_array_equal(state.weights, by_hand.weights)
    training = {row["step"]: row["loss"] for row in run.rows() if "loss" in row}
    assert training == {step: losses[step] for step in (2, 4, 6, 7)}
    assert [row["step"] for row in run.rows() if "eval/nll" in row] == [3, 6, 7]
    assert checkpoint.steps(run.checkpoints) == [3, 6, 7]
    _, saved = checkpoint.restore(run.checkpoints, 7, init_state())
    assert saved["batches"] == batches.get_state() and 0 < saved["seconds"] <= seconds
    perf = [row for row in read_rows(run.folder) if "perf/steps_per_second" in row]
    assert [row["step"] for row in perf] == [2, 4, 6, 7]
    for row in perf:
        assert row["perf/tokens_per_second"] == pytest.approx(2 * 16 * row["perf/steps_per_second"])
    shown = run.output.getvalue().splitlines()
    assert len(shown) == 3 and shown[-1] == f"lens      7  nll {float(jnp.sum(state.weights)):.3f}"


def test_the_places_cover_every_step(expected):
    _, passed = expected
    steps = {place: [step for name, step in passed if name == place] for place in PLACES}
    assert steps["batch"] == [1, 2, 3, 4, 5, 6, 7]
    assert steps["evaluate"] == steps["save"] == steps["in save"] == steps["saved"] == [3, 6, 7]
    assert sorted(set(steps["logged"])) == [2, 3, 4, 6, 7]


def test_one_compile_and_none_for_a_finished_phase(run, compiles):
    def never_compiled():
        def fresh_step(state, batch):
            return toy_step(state, batch)

        return fresh_step

    with compiles() as names:
        run.start(step=never_compiled())
    assert names.count("jit(fresh_step)") == 1
    before = run.result()
    with compiles() as names:
        state, _ = run.start(step=never_compiled())
    assert "jit(fresh_step)" not in names
    assert state.step == 7 and run.result() == before


def test_a_batch_of_another_shape_is_an_error_and_no_second_compile(run):
    run.config = replace(CONFIG, batch_size=4)
    with pytest.raises(TypeError, match=r"int32\[4,16\]"):
        run.start()


def test_nothing_moves_between_host_and_device_inside_the_step(run, monkeypatch):
    monkeypatch.setattr(devices, "share_out", lambda rows, mesh: rows)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run.start()


# Interruptions


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


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_at_every_step_ends_as_if_nothing_had_happened(run, expected, place):
    result, passed = expected
    steps = {step for name, step in passed if name == place}
    kills, done = 0, set()

    def kill():
        raise Killed

    while True:
        try:
            start_and_interrupt(run, place, kill, done)
            break
        except Killed:
            kills += 1
            rows = run.rows()
            assert rows == result[2][: len(rows)]
            assert done <= steps
    assert done == steps and kills == len(steps)
    assert run.result() == result


@pytest.mark.parametrize("place", PLACES)
def test_a_run_stopped_at_every_step_saves_that_step_and_loses_nothing(run, expected, place):
    result, passed = expected
    steps = {step for name, step in passed if name == place}
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    stops, done = 0, set()
    while True:
        try:
            start_and_interrupt(run, place, request_stop, done)
            break
        except loop.Interrupted as stop:
            stops += 1
            assert stop.code == 143
            assert checkpoint.latest_step(run.checkpoints) == max(done)
            assert run.rows() == [row for row in result[2] if row["step"] <= max(done)]
            assert f"stopped at lens step {max(done)}; go on with --resume {run.folder}" in run.output.getvalue()
            assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert done == steps and stops == len(steps)
    assert run.result() == result


def test_ctrl_c_stops_after_the_step_and_a_second_one_at_once(run, expected):
    def once(place, step):
        if (place, step) == ("batch", 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(loop.Interrupted) as stop:
        run.start(hook=once)
    assert stop.value.code == 130 and checkpoint.steps(run.checkpoints) == [2]

    def twice(place, step):
        if (place, step) == ("batch", 4):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.start(hook=twice)
    assert checkpoint.steps(run.checkpoints) == [2, 3]
    run.start()
    assert run.result() == expected[0]


def test_a_stop_in_the_last_step_is_not_forgotten(run, expected):
    def hook(place, step):
        if (place, step) == ("saved", 7):
            request_stop()

    with pytest.raises(loop.Interrupted):
        run.start(hook=hook)
    assert run.result() == expected[0]


def test_seconds_add_up_over_starts(run, monkeypatch):
    """Every step takes 10 seconds; a kill loses those after the last checkpoint."""
    now = 0.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)

    def hook(place, step, *, last):
        nonlocal now
        if place == "batch":
            if step > last:
                raise Killed
            now += 10

    with pytest.raises(Killed):
        run.start(hook=functools.partial(hook, last=5))
    assert checkpoint.restore(run.checkpoints, 3, init_state())[1]["seconds"] == 30
    now = 1000.0
    assert run.start(hook=functools.partial(hook, last=7))[1] == 70
    assert run.start()[1] == 70


# Values that are not finite


@pytest.mark.parametrize(
    ("faults", "changes", "message", "saved"),
    [
        ({"loss": (5, math.nan)}, {}, "phase lens, step 5: loss = nan; the last good checkpoint is {folder}/3", [3]),
        ({"loss": (1, math.nan)}, {}, "phase lens, step 1: loss = nan; there is no checkpoint of this phase yet", []),
        (
            {"loss": (4, math.inf), "mc/rank_loss": (4, math.nan), "grad_norm": (6, math.nan)},
            {},
            "phase lens, step 4: loss = inf, mc/rank_loss = nan; the last good checkpoint is {folder}/3",
            [3],
        ),
        # Nothing is logged before the checkpoint: what is saved must have been looked at.
        (
            {"grad_norm": (2, -math.inf)},
            {"logging_steps": 100, "eval_steps": 100},
            "phase lens, step 2: grad_norm = -inf; there is no checkpoint",
            [],
        ),
        # Nothing is logged or saved before the evaluation, which must not be of parameters that went bad.
        (
            {"loss": (2, math.nan)},
            {"logging_steps": 100, "save_steps": 100},
            "phase lens, step 2: loss = nan; there is no checkpoint",
            [],
        ),
        # Only the last step is bad, and nothing but the end of the phase looks at it.
        (
            {"loss": (7, math.nan)},
            {"logging_steps": 100, "eval_steps": 100},
            "phase lens, step 7: loss = nan; the last good checkpoint is {folder}/6",
            [3, 6],
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(run, faults, changes, message, saved):
    run.config = replace(CONFIG, **changes)
    evaluated = []
    with pytest.raises(FloatingPointError) as error:
        run.start(
            step=functools.partial(faulty_step, faults=faults),
            evaluate=lambda state: evaluated.append(int(state.step)) or {"nll": 1.0},
        )
    assert str(error.value).startswith(message.format(folder=run.checkpoints))
    assert checkpoint.steps(run.checkpoints) == saved
    first = min(step for step, _ in faults.values())
    assert all(step < first for step in evaluated)


def test_a_held_out_loss_that_is_not_finite_stops_the_run(run):
    def evaluate(state):
        return {"nll": math.nan if int(state.step) == 6 else 1.0}

    with pytest.raises(FloatingPointError, match=r"phase lens, step 6: eval/nll = nan; the last good .*/lens/3"):
        run.start(evaluate=evaluate)
    assert checkpoint.steps(run.checkpoints) == [3]


def test_histograms_pass_the_check_of_every_step(run):
    step = functools.partial(faulty_step, faults={"mc/adv_histogram": (1, np.ones(42, np.float32))})
    run.start(step=step)
    assert run.rows() and not any("mc/adv_histogram" in row for row in run.rows())


def test_undefined_correlations_do_not_stop_the_run(run):
    name = "mc/preference_corr_mean"
    step = functools.partial(faulty_step, faults={name: (1, math.nan)})
    run.start(step=step, evaluate=lambda state: {name: math.nan})
    assert {row.get(name, row.get(f"eval/{name}")) for row in run.rows()} == {"n/a"}
    text = (run.folder / "metrics.jsonl").read_text()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())


def test_a_run_with_a_fault_goes_on_from_the_good_checkpoint(run, expected):
    with pytest.raises(FloatingPointError):
        run.start(step=functools.partial(faulty_step, faults={"loss": (5, math.nan)}))
    assert "nan" in [row.get("loss") for row in run.rows()]
    run.start()
    assert run.result() == expected[0]


# Patience

# Held-out losses by step: the best one is that of step 4, and of the two after it none is better.
SCHEDULE = {2: 3.0, 4: 1.5, 6: 2.0, 8: 1.75, 10: 0.5, 12: 0.25}
PATIENT = replace(CONFIG, steps=12, logging_steps=5, eval_steps=2, save_steps=1, stopping=StoppingConfig(patience=2))


def by_schedule(state):
    return {"nll": SCHEDULE[int(state.step)]}


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(replace(state, key=jax.random.key_data(state.key)))]


def by_hand(steps):
    """The state after some steps."""
    state, batches, step = init_state(), data.make_iterator(CONFIG, "train", seed=3, batch_size=2), jax.jit(toy_step)
    for _ in range(steps):
        state, _ = step(state, {"tokens": next(batches)["tokens"]})
    return state


def waited(run):
    """The newest checkpoint, and what it knows of the evaluations before it."""
    newest = checkpoint.latest_step(run.checkpoints)
    return newest, checkpoint.data_state(run.checkpoints, newest).get("stopping")


def test_patience_ends_a_run_and_gives_back_its_best_state(run):
    run.config = PATIENT
    state, seconds = run.start(evaluate=by_schedule)
    assert bits(state) == bits(by_hand(4))
    # The best checkpoint is there beside the three newest; the one that was the best before it is not.
    assert checkpoint.steps(run.checkpoints) == [4, 6, 7, 8]
    assert waited(run) == (8, {"score": 1.5, "step": 4, "waited": 2})
    assert loop.kept_step(run.checkpoints) == 4
    assert run.output.getvalue().splitlines()[-1] == "lens ended at step 8 of 12 and keeps step 4, nll 1.500"
    before = run.rows()
    again, same = run.start(evaluate=by_schedule, step=None)  # there is nothing to compile
    assert bits(again) == bits(state) and run.rows() == before and waited(run)[0] == 8
    assert same == checkpoint.data_state(run.checkpoints, 8)["seconds"] <= seconds


def test_what_improves_is_saved_though_no_save_is_due(run):
    run.config = replace(PATIENT, save_steps=100)
    state, _ = run.start(evaluate=by_schedule)
    assert bits(state) == bits(by_hand(4))
    assert checkpoint.steps(run.checkpoints) == [2, 4, 8]


def test_patience_that_does_not_run_out_gives_back_the_best_state_too(run):
    run.config = replace(PATIENT, steps=9, eval_steps=4, save_steps=100, stopping=StoppingConfig(patience=3))
    state, _ = run.start(evaluate=lambda state: {"nll": {4: 2.0, 8: 1.0, 9: 1.5}[int(state.step)]})
    assert bits(state) == bits(by_hand(8)) and checkpoint.steps(run.checkpoints) == [4, 8, 9]
    again, _ = run.start(step=None)
    assert bits(again) == bits(state)


def test_a_small_improvement_is_none_where_more_is_asked_for(run):
    run.config = replace(PATIENT, stopping=StoppingConfig(patience=2, min_improvement=1.5))
    state, _ = run.start(evaluate=by_schedule)
    assert bits(state) == bits(by_hand(2)) and waited(run) == (6, {"score": 3.0, "step": 2, "waited": 2})


@pytest.mark.parametrize("kind", ["killed", "stopped"])
@pytest.mark.parametrize("place", ["batch", "evaluate", "in save", "saved"])
def test_a_patient_run_that_is_interrupted_at_every_step_stops_at_the_same_one(tmp_path, monkeypatch, kind, place):
    whole, run = Run(tmp_path / "whole", monkeypatch, PATIENT), Run(tmp_path / "run", monkeypatch, PATIENT)
    expected, done = whole.start(evaluate=by_schedule)[0], set()

    def kill():
        raise Killed

    while True:
        try:
            interrupt = kill if kind == "killed" else request_stop
            state, _ = start_and_interrupt(run, place, interrupt, done, evaluate=by_schedule)
            break
        except (Killed, loop.Interrupted):
            assert max(done) <= 8
    assert len(done) == (4 if place == "evaluate" else 8)
    assert bits(state) == bits(expected)
    assert run.rows() == whole.rows() and waited(run) == waited(whole)


@pytest.mark.parametrize("report", [{"loss": 1.0}, {"nll": math.nan}])
def test_an_evaluation_without_the_metric_to_monitor_is_refused(run, monkeypatch, report):
    monkeypatch.setattr("lensjax.runs.store.log.check_finite", lambda rows, advice: None)
    run.config = PATIENT
    with pytest.raises(ValueError, match=r"phase lens monitors nll, and its evaluation gives no such number: \{'"):
        run.start(evaluate=lambda state: report)


def test_without_patience_nothing_is_monitored(run):
    run.start(evaluate=lambda state: {"loss": 1.0})
    assert checkpoint.data_state(run.checkpoints, 7).keys() == {"batches", "seconds"}
    assert loop.kept_step(run.checkpoints) == 7 and loop.kept_step(run.folder) is None
