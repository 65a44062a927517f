import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.rlan import meta, model, rules
from experiments.rlan.grids import PADDING
from experiments.rlan.model import GridConfig, GridModel
from experiments.rlan.rules import RulesConfig
from lensjax.models import HyperLoRAModel
from lensjax.models.hyperlora import Delta
from lensjax.training.optim.optimizer import OptimizerConfig, make_optimizer
from lensjax.training.steps.update import gradient_step, init_learner
from tests.rlan.small import CONFIG, MODELS, STATE, tasks
from tests.small import jit

pytestmark = pytest.mark.slow


@jit
def held_out_answers(support):
    """Logits for each example from the others, and for the first input from all of them."""
    deltas, others, held_out = meta.leave_one_out_deltas(MODELS, STATE.params, support)
    answers = functools.partial(meta.answers, MODELS, STATE.params)
    return jax.vmap(answers)(others, support[:, 0]), answers(deltas, support[0, 0]), held_out


@functools.cache
def loss_of(**changes):
    config = replace(CONFIG, hyperlora=replace(CONFIG.hyperlora, **changes))
    return jit(functools.partial(meta.meta_loss, config=config, models=MODELS))


# Leaving one out


def test_an_answer_that_is_held_out_does_not_leak():
    """Whatever stands in output i, the prediction of i is the same to the bit; those of the others are not."""
    support = tasks()["support"][0]
    before, _, _ = held_out_answers(support)
    for i in range(3):
        after, _, _ = held_out_answers(support.at[i, 1].set((support[i, 1] + 3) % 10))
        np.testing.assert_array_equal(after[i], before[i])
        assert all((after[j] != before[j]).any() for j in range(3) if j != i)


def test_padding_examples_change_nothing():
    support = tasks()["support"][0].at[1].set(PADDING)
    moved = support[jnp.asarray([0, 2, 1])]
    (left_out, whole, held_out), (left_out_moved, whole_moved, _) = held_out_answers(support), held_out_answers(moved)
    assert held_out.tolist() == [True, False, True]
    np.testing.assert_allclose(whole, whole_moved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(left_out[2], left_out_moved[1], rtol=1e-4, atol=1e-5)
    # Two examples and no room for a third.
    short = jit(lambda pairs: meta.task_deltas(MODELS, STATE.params, pairs))
    expected, found = short(support[jnp.asarray([0, 2])]), short(support)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_the_loss_of_what_is_held_out_is_that_of_deltas_without_it():
    support, query = tasks()["support"][0], tasks()["query"][0]
    batch = {"support": support[None], "query": query[None]}
    _, report = loss_of()(STATE.params, jax.tree.map(lambda x: jnp.concatenate([x, x]), batch), jnp.int32(0))
    logits, _, _ = held_out_answers(support)
    losses, pixels, _ = zip(*map(meta.grid_loss, logits, support[:, 1]), strict=True)
    assert float(report["loo_loss"]) == pytest.approx(float(np.mean(losses)), rel=1e-4)
    assert float(report["loo_accuracy"]) == pytest.approx(float(np.mean(pixels)), rel=1e-5)


def test_padding_counts_for_nothing_in_the_loss():
    """Of two tasks the second has one example: none can be left out, and its loss of that part is 0."""
    batch = tasks()
    single = batch["support"].at[1, 1:].set(PADDING)
    _, report = loss_of()(STATE.params, {**batch, "support": single}, jnp.int32(0))
    _, alone = loss_of()(STATE.params, jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), batch), jnp.int32(0))
    assert float(report["loo_skipped_ratio"]) == 0.5
    assert float(report["loo_loss"]) == pytest.approx(float(alone["loo_loss"]) / 2, rel=1e-5)
    assert float(alone["loo_skipped_ratio"]) == 0


# Losses


def test_the_score_of_an_answer_by_hand():
    answer = rules.padded(np.asarray([[1, 2]]), 2)
    logits = np.full((2, 2, 10), -np.inf, np.float32)
    logits[0, 0, 1] = logits[0, 1, 1] = logits[0, 1, 2] = 0  # sure and right; one of two, the first of which is wrong
    logits[1, :, 0] = 0
    loss, pixel, exact = meta.grid_loss(jnp.maximum(logits, -1e9), answer)
    assert [float(loss), float(pixel), float(exact)] == pytest.approx([np.log(2) / 2, 0.5, 0])
    right = meta.grid_loss(100 * jax.nn.one_hot(answer, 10), answer)
    assert [float(x) for x in right] == pytest.approx([0, 1, 1], abs=1e-6)
    pairs = np.stack([rules.padded(np.asarray([[1, 3]]), 2), answer])
    assert [float(x) for x in meta.grid_scores(pairs)] == [0.5, 0]
    # Right colours in another shape are no right answer.
    assert [float(x) for x in meta.grid_scores(np.stack([rules.padded(np.asarray([[1, 2], [1, 2]]), 2), answer]))] == [
        1,
        0,
    ]


def test_the_loss_is_the_weighted_sum_and_terms_start_at_their_step():
    batch, step = tasks(), jnp.int32(3)
    loss, report = loss_of()(STATE.params, batch, step)
    parts = {name: float(report[name]) for name in ("task_loss", "loo_loss", "equivariance_loss")}
    assert all(value > 0 for value in parts.values())
    expected = parts["task_loss"] + 0.5 * parts["loo_loss"] + 0.25 * parts["equivariance_loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    staged = loss_of(loo_start=4, equivariance_start=3)
    late = staged(STATE.params, batch, jnp.int32(4))[0]
    assert float(staged(STATE.params, batch, step)[0]) == pytest.approx(
        parts["task_loss"] + 0.25 * parts["equivariance_loss"], rel=1e-5
    )
    assert float(late) == pytest.approx(expected, rel=1e-5)
    alone, plain = loss_of(loo_weight=0.0, equivariance_weight=0.0)(STATE.params, batch, step)
    assert float(alone) == pytest.approx(parts["task_loss"], rel=1e-5) and "loo_loss" not in plain


class Reader(GridModel):
    """Reads from an example how far the cells have moved; turns and mirrors change that and nothing else."""

    def encode(self, params, pair):
        ways = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        same = [jnp.mean(jnp.roll(pair[0], way, axis=(0, 1)) == pair[1], dtype=jnp.float32) for way in ways]
        return jax.nn.one_hot(jnp.argmax(jnp.stack(same)), self.config.dim)


@pytest.mark.parametrize(("family", "keeps"), [("double", True), ("shift", False)])
def test_the_equivariance_loss_tells_rules_that_break_the_symmetry_from_those_that_keep_it(family, keeps):
    """Shifts by one cell turn with the grids. A shift upside down is another one, a mirrored colour map is not."""
    grid = Reader(GridConfig(dim=9, steps=1), 5)
    models = meta.RlanModels(grid, HyperLoRAModel(CONFIG.hyperlora, 9, grid.targets))
    config = replace(CONFIG, rules=RulesConfig(families=(family,)))
    params = meta.init_state(jax.random.key(0), config=config, models=models).params
    _, report = jit(functools.partial(meta.meta_loss, config=config, models=models))(
        params, tasks(config=config.rules), jnp.int32(0)
    )
    found = [float(report[name]) for name in ("equivariance_loss", "equiv_delta_norm")]
    assert found == pytest.approx([0, 0], abs=1e-2) if keeps else min(found) > 0.3


def told_by_four_rules(random, breaks):
    """Pairs of 16 tasks, each of one of four rules: cells that move in a direction, or colours that move on."""
    inputs, kinds = random.integers(1, 5, size=(16, 4, 5, 5), dtype=np.int32), random.integers(4, size=16)
    ways = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    moved = [
        np.roll(grid, ways[k], axis=(1, 2)) if breaks else 1 + (grid - 1 + k) % 4
        for grid, k in zip(inputs, kinds, strict=True)
    ]
    return jnp.asarray(np.stack([inputs, np.stack(moved)], axis=2), jnp.int32), jnp.asarray(kinds)


def test_the_encoder_that_has_learned_which_rule_it_is_breaks_the_symmetry_where_the_rule_does():
    """The encoder itself, trained for 100 steps to tell four rules apart, and a fresh hypernetwork behind it."""
    config = replace(CONFIG, grid=GridConfig(dim=16, steps=1), rules=RulesConfig(size=5))
    models = meta.build_models(config)
    fresh = meta.init_state(jax.random.key(0), config=config, models=models).params
    adam = make_optimizer(OptimizerConfig(), learning_rate=1e-2)

    def loss(params, support, kinds):
        encode = jax.vmap(jax.vmap(functools.partial(models.grid.encode, params["grid"])))
        logits = jnp.mean(encode(support), axis=1) @ params["probe"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, kinds)), ()

    @jit
    def step(learner, support, kinds):
        loss_fn = functools.partial(loss, support=support, kinds=kinds)
        after, seen = gradient_step(learner, loss_fn, tx=adam, rates={})
        return after, seen.loss

    measure = jit(functools.partial(meta.meta_loss, config=config, models=models))
    losses = {}
    for breaks in (False, True):
        random, params = np.random.default_rng(0), {"grid": fresh["grid"], "probe": jnp.zeros((16, 4))}
        learner = init_learner(jax.random.key(0), params, tx=adam)
        for _ in range(100):
            learner, value = step(learner, *told_by_four_rules(random, breaks))
        assert float(value) < 0.05
        pairs, _ = told_by_four_rules(random, breaks)
        batch = {"support": pairs[:, :3], "query": pairs[:, 3:]}
        report = measure({"grid": learner.params["grid"], "hypernet": fresh["hypernet"]}, batch, jnp.int32(0))[1]
        losses[breaks] = float(report["equivariance_loss"])
    assert losses[False] < 0.01 and losses[True] > 0.2


class Way:
    """A hypernetwork whose deltas are which way an example's cells have moved."""

    def apply(self, params, context):
        return {name: Delta(context[:, None], jnp.ones((1, 9))) for name in model.TARGETS}


class Mover(Reader):
    """Moves the cells as the deltas say: right for every shift."""

    def solve(self, params, deltas, grid):
        ways = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        moved = jnp.stack([jnp.roll(grid, way, axis=(0, 1)) for way in ways])
        return 9 * jax.nn.one_hot(moved[jnp.argmax(deltas["gru_reset"].a)], 10)[None]

    def logits(self, params, deltas, hidden):
        return hidden


@pytest.mark.parametrize(("equivariance", "asks_nothing"), [("deltas", False), ("outputs", True)])
def test_output_equivariance_is_right_where_that_of_deltas_is_not(equivariance, asks_nothing):
    """What moves cells to the right, turned, moves them down: other deltas, and the same answer."""
    random = np.random.default_rng(0).integers(10, size=(2, 4, 5, 5), dtype=np.int32)
    pairs = jnp.asarray(np.stack([random, np.roll(random, 1, axis=3)], axis=2))
    models = meta.RlanModels(Mover(GridConfig(dim=9, steps=1), 5), Way())
    config = replace(CONFIG, equivariance=equivariance, equivariance_views=7)
    _, report = jit(functools.partial(meta.meta_loss, config=config, models=models))(
        {"grid": {}, "hypernet": {}}, {"support": pairs[:, :3], "query": pairs[:, 3:]}, jnp.int32(0)
    )
    assert float(report["exact"]) == 1 and float(report["equiv_delta_norm"]) > 1
    loss = float(report["equivariance_loss"])
    assert loss == pytest.approx(0, abs=1e-6) if asks_nothing else loss > 0.5


def test_the_output_loss_moves_everything_that_answers_a_turned_task():
    """All of it against an answer that is held fixed, and nothing where the turned answer is that answer."""
    config = replace(CONFIG, equivariance="outputs", rules=replace(CONFIG.rules, families=("shift",)))

    def part(params):
        return meta.meta_loss(params, tasks(config=config.rules), jnp.int32(0), config=config, models=MODELS)[1][
            "equivariance_loss"
        ]

    loss, gradient = jit(jax.value_and_grad(part))(STATE.params)
    assert float(loss) > 0.1
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_one_step_moves_everything_and_the_hypernetwork_at_a_rate_of_its_own():
    """Adam's first step moves every weight by the learning rate."""
    config = replace(CONFIG, hyperlora=replace(CONFIG.hyperlora, learning_rate_multiplier=10.0))
    after, report = jit(functools.partial(meta.meta_step, config=config, models=MODELS))(STATE, tasks())
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), after.params, STATE.params)
    assert max(jax.tree.leaves(moved["grid"])) == pytest.approx(float(report["lr"]), rel=0.01)
    assert max(jax.tree.leaves(moved["hypernet"])) == pytest.approx(10 * float(report["lr"]), rel=0.01)
    assert min(jax.tree.leaves(moved)) > 0 and int(after.step) == 1
