"""The loop: what a run does that nobody disturbs, and that no interruption loses anything."""

import functools
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices, loop
from lensjax.runs.store import checkpoint
from lensjax.runs.store.log import read_rows
from tests.runs import Killed, request_stop
from tests.toy_run import CONFIG, PLACES, Run, init_state, start_and_interrupt, toy_step


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
        by_hand, metrics = jax.jit(toy_step)(by_hand, {"tokens": next(batches)["tokens"]}, {})
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
        def fresh_step(state, batch, frozen):
            return toy_step(state, batch, frozen)

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


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: tests that were started in the background would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
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
