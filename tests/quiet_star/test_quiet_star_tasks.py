from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.quiet_star import tasks
from experiments.quiet_star.config import BakeConfig, QuietStarConfig, RLConfig
from experiments.quiet_star.model import ModelConfig
from experiments.quiet_star.tasks import TASKS, WORDS, QuestionSource, TaskConfig
from experiments.quiet_star.train import PRESETS
from lensjax.evaluation import faithfulness
from lensjax.runs.engine.stopping import StoppingConfig
from tests.quiet_star.small import CONFIG

# Tasks


def test_questions_and_answers_by_hand():
    instance = tasks.Instance("", np.asarray([]), 2, np.stack([[1, 2, 0, 3]] * 3))
    assert instance.answer == 2
    random = np.random.default_rng(0)
    assert instance.trace(random, 1.0).tolist() == [0, 1]
    first, second = np.asarray([instance.trace(random, 0.5) for _ in range(4000)]).T
    assert np.mean(first == 0) == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    # A step after a wrong one follows from that.
    assert np.mean(second[first == 3] == 3) == pytest.approx(0.5 + 0.5 / 4, abs=0.06)


@pytest.mark.parametrize("index", range(3))
def test_a_chain_of_pointers(index):
    row = QuestionSource(TaskConfig("pointer", right_share=1.0), "train", 0)[index]
    permutation, at = row["prompt"][:8], row["prompt"][8]
    assert sorted(permutation) == list(range(8))
    assert row["trace"].tolist() == [permutation[at], permutation[permutation[at]]]
    assert row["answer"] == row["conclusion"] == permutation[permutation[permutation[at]]]


def test_a_sum_in_words():
    row = QuestionSource(TaskConfig("arithmetic", right_share=1.0), "test", 0)[0]
    words = [WORDS[token] for token in row["prompt"]]
    assert len(words) == TASKS["arithmetic"].prompt_length and " ".join(words[-3:]) == "last digit ?"
    total, totals = int(words[2]), [int(words[2])]
    for verb, number in zip(words[6:-3:4], words[7:-3:4], strict=True):
        total += int(number) * (1 if verb in ("finds", "buys", "gets") else -1)
        totals.append(total % 10)
    assert [*row["trace"], row["answer"]] == totals and row["conclusion"] == totals[-1]


@pytest.mark.parametrize("name", ["pointer", "arithmetic"])
def test_instances_are_held_out_whatever_the_seed(name):
    config, random = TaskConfig(name), np.random.default_rng(0)
    drawn = [TASKS[name].draw(random) for _ in range(3000)]
    shares = [np.mean([tasks.split_of(one) == split for one in drawn]) for split in tasks.SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    seen = {
        split: {_name(name, QuestionSource(config, split, seed)[i]) for i in range(60) for seed in range(2)}
        for split in tasks.SPLITS
    }
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    one, again = (QuestionSource(config, "test", 4)[7] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)


def _name(task, row):
    """What decides the split: the permutation, or the numbers and signs in whatever words."""
    if task == "pointer":
        return tuple(row["prompt"][:8])
    words = [WORDS[token] for token in row["prompt"]]
    signs = [verb in ("finds", "buys", "gets") for verb in words[6:-3:4]]
    return (words[2], *signs, *words[7:-3:4])


# Settings


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            RLConfig,
            {"warmup_episodes": 1500},
            "rl.warmup_episodes must be below rl.episodes 1500, got 1500",
        ),
        (RLConfig, {"reward": "loss"}, "rl.reward must be one of log_prob, accuracy, got 'loss'"),
        (RLConfig, {"kl_weight": -1.0}, "rl.kl_weight must be at least 0, got -1.0"),
        (TaskConfig, {"right_share": 1.5}, r"task.right_share must be in \[0, 1\], got 1.5"),
        (ModelConfig, {"dim": 10, "heads": 4}, "model.dim must be a multiple of model.heads 4, got 10"),
        (QuietStarConfig, {"batch_size": 1}, r"batch_size must be in \[2, 65536\], got 1"),
        (BakeConfig, {"learning_rate": 0.0}, "bake.learning_rate must be above 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(section, values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_thresholds_are_those_of_the_library():
    assert CONFIG.faithfulness == faithfulness.FaithfulnessConfig(0.30, 0.02, 0.5, 0.02)


def test_the_presets_can_stop_and_a_patience_that_cannot_run_out_is_refused():
    for preset in PRESETS.values():
        evaluations = preset.rl.episodes // preset.eval_steps
        assert preset.stopping.patience < evaluations
    patient = replace(CONFIG, eval_steps=1, stopping=StoppingConfig(patience=7))
    assert patient.stopping.patience == 7
    with pytest.raises(ValueError, match=r"stopping\.patience 8 cannot run out: with eval_steps 1 .*rl\.episodes 8"):
        replace(patient, stopping=StoppingConfig(patience=8))
    # A model that another run baked is not baked here.
    rare = replace(patient, bake=replace(CONFIG.bake, steps=20), stopping=StoppingConfig(patience=10))
    with pytest.raises(ValueError, match="no phase has more than 8 evaluations"):
        replace(rare, start_from="runs/other")
