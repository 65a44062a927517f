"""The suite on a run's models: what its tables say, and what is refused."""

import csv
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import evaluate, train
from experiments import suite as suites
from lensjax._settings import replace
from lensjax.evaluation import compare, questions
from lensjax.evaluation.questions import Answered
from lensjax.models.decision import split
from lensjax.runs.data import suite as tasks
from lensjax.runs.data.task import DataConfig
from lensjax.runs.engine import progress
from lensjax.training import nll
from tests.runs import TINY, cheap_programs, tiny_config, write_corpus
from tests.small import VOCABULARY, Run, jit

WORDS = replace(TINY, data=DataConfig(task="suite"), **{"base.vocab_size": 512, "context.window": 210})


@pytest.fixture(scope="module")
def answered():
    """One question of random tokens, of which the first 2 behind the cursor are the answer."""
    run = Run()
    tokens = jax.random.randint(jax.random.key(0), (36,), 0, VOCABULARY)
    scored = jnp.arange(4) < 2
    params = run.state().params | run.frozen()

    def measure(params, tokens):
        return questions.measure(
            *(run.models, params, tokens, jnp.array([4, 4]), scored, jax.random.key(1)),
            **{"length": 22, "draws": 3, "recipe": run.recipe},
        )

    return run, params, tokens, scored, jit(measure)


@pytest.mark.slow
def test_the_whole_history_is_the_ordinary_loss_of_the_answer_and_its_likeliest_tokens(answered):
    run, params, tokens, _, measure = answered
    found = measure(params, tokens)
    losses = nll.sequence_nll(run.models.base, params["base"], tokens)[-4:-2]
    np.testing.assert_allclose(found[compare.FULL].nll, losses.mean(), rtol=1e-5)
    assert found[compare.FULL].hit == 1 and found[questions.EMPTY].hit == 0
    assert {name: bool(found[name].hit) for name in ("answer", "recency")} == {"answer": True, "recency": False}
    # The answer that the model itself would write is matched; a change of one of its tokens is not.
    history = split(tokens, horizon=4).history
    written = _written(run, params, history)
    own = measure(params, jnp.concatenate([history, jnp.array([*written, 0, 0])]))
    other = measure(params, jnp.concatenate([history, jnp.array([written[0], (written[1] + 1) % VOCABULARY, 0, 0])]))
    assert own[compare.FULL].match == 1 and other[compare.FULL].match == 0


def _written(run, params, history):
    """The two tokens that the model writes after the whole history, one by one."""
    loss = jit(lambda tokens: nll.sequence_nll(run.models.base, params["base"], tokens)[-1])
    written = []
    for _ in range(2):
        longer = [jnp.array([*history.tolist(), *written, token]) for token in range(VOCABULARY)]
        written.append(int(np.argmin([loss(tokens) for tokens in longer])))
    return written


@pytest.mark.slow
def test_what_stands_behind_the_answer_changes_nothing(answered):
    _, params, tokens, _, measure = answered
    changed = tokens.at[-2:].set((tokens[-2:] + 1) % VOCABULARY)
    first, second = measure(params, tokens), measure(params, changed)
    causal = [name for name in first if not name.endswith("hindsight")]
    assert len(causal) > 10
    for name in causal:
        np.testing.assert_allclose(first[name].nll, second[name].nll, rtol=1e-5, err_msg=name)
        assert first[name].match == second[name].match


def test_tasks_that_do_not_fit_are_left_out_by_name():
    text = replace(TINY, data=DataConfig(task="text", path="somewhere"), **{"context.window": 122})
    suite = suites.prepare(text, sequences=2, batch_size=2, seed=0)
    assert set(suite.tasks) | set(suite.left_out) == set(tasks.TASKS) and "needle" in suite.tasks
    assert "needs" in suite.left_out["tracking_4"] and suite.config.context.history == 120
    with pytest.raises(ValueError, match="no task of the suite fits this run: mqar_keys needs"):
        suites.prepare(replace(text, **{"context.window": 10}), sequences=2, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"--suite needs a run whose models read text .* got 'recall'"):
        suites.prepare(TINY, sequences=2, batch_size=2, seed=0)


def test_a_task_has_the_same_windows_alone_as_among_others():
    whole = suites.prepare(WORDS, sequences=2, batch_size=2, seed=0)
    some = suites.prepare(WORDS, ("tracking_1", "needle"), sequences=2, batch_size=2, seed=0)
    assert list(some.tasks) == ["tracking_1", "needle"] and some.config == whole.config and some.left_out == {}
    jax.tree.map(np.testing.assert_array_equal, some.tasks, {name: whole.tasks[name] for name in some.tasks})


@pytest.mark.parametrize("chosen", [(), ("needle", "haystack"), ("needle", "needle")])
def test_tasks_that_are_not_different_ones_of_the_suite_are_refused(chosen):
    message = rf"tasks must be different ones of mqar_keys, .*_words, got {re.escape(str(chosen))}"
    with pytest.raises(ValueError, match=message):
        suites.prepare(TINY, chosen, sequences=2, batch_size=2, seed=0)


def test_tasks_without_the_suite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--tasks are those of the suite: leave it out, or add --suite"):
        evaluate.evaluate(evaluate.Arguments((tmp_path,), tasks=("needle",)))


def test_each_task_gets_what_was_measured_of_it_and_a_line_says_how_far_that_is(monkeypatch):
    """Three batches a task on two devices, which share one of each: the loss of a question is the sum of its tokens."""
    monkeypatch.setattr(progress, "EVERY", 0.0)

    def measured(params, tokens, *others):
        loss = tokens.sum(-1).astype(jnp.float32)
        return {name: Answered(loss, 0 * loss, 0 * loss) for name in ("recency", "full")}

    monkeypatch.setattr(suites, "_compiled", lambda *shapes: measured)
    suite, output = suites.prepare(WORDS, ("needle", "tracking_1"), sequences=6, batch_size=2, seed=0), io.StringIO()
    rows = suites.evaluate(suite, None, {}, {4: 22}, draws=2, console=Console(file=output))
    sums = {task: np.concatenate([one["tokens"].sum(-1) for one in own]) for task, own in suite.tasks.items()}
    assert {row["task"]: row["nll"] for row in rows} == {task: own.mean() for task, own in sums.items()}
    first, *lines = [line.split("  ")[0] for line in output.getvalue().splitlines()]
    steps = -(-6 // jax.device_count())
    assert first == f"suite, 22 entries: {steps} steps, of which the first compiles, too"
    assert lines[:steps] == [f"suite, 22 entries {done} of {steps}" for done in range(1, steps + 1)]


@pytest.mark.slow
def test_a_run_of_text_is_measured_on_the_suite(tmp_path, capsys):
    with cheap_programs():
        train.run(
            tiny_config(
                tmp_path / "run", write_corpus(tmp_path / "corpus"), **{"context.window": 98, "eval_batches": 1}
            )
        )
    words = [
        str(tmp_path / "run"),
        "--suite",
        "--budgets",
        "3",
        "--sequences",
        "4",
        "--batch-size",
        "2",
        "--draws",
        "2",
    ]
    evaluate.main(words)
    printed = capsys.readouterr().out
    assert "nats a token of the answer at 3x" in printed and "left out: tracking_4" in printed
    rows = list(csv.DictReader((tmp_path / "run" / "evaluation-suite.csv").read_text().splitlines()))
    assert {row["policy"] for row in rows} >= {"empty", "recency", "bm25", "lensnet_4", "answer", "full"}
    hits = {(row["task"], row["policy"]): float(row["hit_rate"]) for row in rows}
    assert hits["needle", "full"] == 1 and hits["needle", "empty"] == 0
    report = json.loads((tmp_path / "run" / "evaluation-suite.json").read_text())
    assert "tracking_4" in report["left_out"] and len(report["rows"]) == len(rows)
    assert (tmp_path / "run" / "evaluation-suite.png").stat().st_size > 1000
    evaluate.main([*words, "--name", "one", "--tasks", "needle"])
    one = list(csv.DictReader((tmp_path / "run" / "one-suite.csv").read_text().splitlines()))
    assert one == [row for row in rows if row["task"] == "needle"]
    assert (tmp_path / "run" / "one-suite.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        evaluate.main(words)
