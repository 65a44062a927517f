"""The bandit with a known optimum."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from experiments.studies import bandit as script

pytestmark = pytest.mark.slow

SMALL = script.Arguments(arms=5, groups=64, steps=400, seeds=2, learning_rate=0.05)


def shares(name, arguments=SMALL):
    problems = jax.vmap(lambda key: script.draw(key, arguments=arguments))(jax.random.split(jax.random.key(1), 2))
    run = jax.jit(jax.vmap(lambda one: script.train(one, objective=script.OBJECTIVES[name], arguments=arguments)))
    return np.asarray(run(problems))


def test_the_optimum_is_the_best_of_all_policies():
    problem = script.draw(jax.random.key(0), arguments=SMALL)
    rewards, reference = np.asarray(problem.rewards, float), np.exp(np.asarray(problem.reference, float))

    def worth(policy):
        return policy @ (rewards - SMALL.beta * (np.log(policy) - np.log(reference)))

    optimum = reference * np.exp(rewards / SMALL.beta)
    optimum /= optimum.sum()
    best = SMALL.beta * np.log(reference @ np.exp(rewards / SMALL.beta))
    assert worth(optimum) == pytest.approx(best)
    random = np.random.default_rng(0)
    assert all(worth(policy) < best for policy in random.dirichlet(np.ones(5), size=50))
    assert float(problem.value) == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("name", ["copg", "a_star_po", "info_nca", "policy_gradient, baseline"])
def test_these_find_the_optimum_from_data_of_another_policy(name):
    reached = shares(name)
    assert (reached[:, 0] == 0).all() and (reached <= 1 + 1e-4).all()
    assert (reached[:, -1] > 0.98).all()


@pytest.mark.parametrize("name", ["policy_gradient", "logistic", "grpo"])
def test_these_do_not(name):
    assert (shares(name)[:, -1] < 0.95).all()


def test_the_command_leaves_a_table_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "OBJECTIVES", {name: script.OBJECTIVES[name] for name in ("copg", "grpo")})
    folder = tmp_path / "run"
    words = ["--arms", "3", "--groups", "8", "--steps", "20", "--seeds", "2", "--output-dir", str(folder)]
    script.main(words)
    with (folder / "bandit.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective"], row["seed"]) for row in rows] == [(n, s) for n in ("copg", "grpo") for s in "01"]
    assert (folder / "bandit.png").is_file() and "copg" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not empty: choose another --output-dir"):
        script.main(words)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"arms": 1}, r"arms must be in \[2, 1048576\], got 1"), ({"beta": 0.0}, "beta must be above 0, got 0.0")],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
