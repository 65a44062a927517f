import functools
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rlan import grids, meta, model, rules
from experiments.rlan.grids import PADDING
from experiments.rlan.model import GridModel
from lensjax.models import hyperlora
from lensjax.models.hyperlora import Delta
from tests.rlan.small import CONFIG, MODELS, STATE, tasks
from tests.small import jit

pytestmark = pytest.mark.slow

# The solver


def test_the_convolution_is_one():
    random = np.random.default_rng(0)
    cells, kernel = random.normal(size=(5, 5, 3)), random.normal(size=(27, 2))
    cells, kernel = jnp.asarray(cells, jnp.float32), jnp.asarray(kernel, jnp.float32)
    expected = jax.lax.conv_general_dilated(
        cells[None], kernel.reshape(3, 3, 3, 2), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    np.testing.assert_allclose(model._conv(cells, kernel), expected, rtol=1e-4, atol=1e-5)


def test_each_target_changes_the_answer_and_zeroed_ones_do_not():
    grid, params = tasks()["query"][0, 0, 0], STATE.params
    deltas = meta.task_deltas(MODELS, params, tasks()["support"][0])
    answer = jit(functools.partial(meta.answers, MODELS, params))
    nothing = answer(hyperlora.zeroed(deltas), grid)
    for name in model.TARGETS:
        found = answer({**hyperlora.zeroed(deltas), name: deltas[name]}, grid)
        assert float(jnp.abs(found - nothing).max()) > 1e-3
    tiny = {name: Delta(1e-6 * delta.a, delta.b) for name, delta in deltas.items()}
    np.testing.assert_allclose(answer(tiny, grid), nothing, rtol=1e-3, atol=1e-3)


def test_the_surest_step_is_that_of_the_lowest_entropy_where_it_counts():
    logits = jnp.zeros((3, 2, 2, 10)).at[1, 0, 0, 4].set(9.0).at[2, 1, 1, 4].set(99.0)
    assert int(model.best_step(logits, jnp.asarray([[True, True], [False, False]]))) == 1
    assert int(model.best_step(logits, jnp.ones((2, 2), bool))) == 2


# Held-out measures


class Copier(GridModel):
    """Answers with the input, and with nonsense in the padding; its last step is unsure."""

    def solve(self, params, deltas, grid):
        sure = 9 * jax.nn.one_hot(grid, 11)[..., :10]
        return jnp.stack([sure, -sure])

    def logits(self, params, deltas, hidden):
        return hidden


class LastCopier(Copier):
    """Its last step is sure."""

    def solve(self, params, deltas, grid):
        return super().solve(params, deltas, grid)[::-1]


@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (1, 2)])
def test_answers_to_turned_inputs_are_turned_back(shape):
    models = replace(MODELS, grid=LastCopier(CONFIG.grid, 4))
    asked = rules.padded(np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 10, 4)
    query, views = jnp.asarray(np.stack([[asked, asked], [asked.T, asked.T]])), range(1, 8)
    deltas = {name: Delta(jnp.zeros((7, 8, 2)), jnp.zeros((7, 2, 8))) for name in model.TARGETS}
    found = jit(lambda query: meta.turned_answers(models, STATE.params, deltas, query, views))(query)
    assert found.shape == (7, 2, 4, 4, 10)
    for one in found:
        np.testing.assert_array_equal(jnp.where(query[:, 0] == PADDING, PADDING, jnp.argmax(one, axis=-1)), query[:, 0])


def test_views_map_back_to_the_frame_of_the_task():
    grid = Copier(CONFIG.grid, 4)
    models = replace(MODELS, grid=grid)
    support = tasks()["support"][0]
    asked = rules.padded(np.asarray([[1, 2, 3], [4, 5, 0]]), 4)
    permutations = grids.colour_permutations(1, 2)
    views = jit(functools.partial(meta.view_predictions, models, permutations=permutations, take_best_step=True))(
        STATE.params, support, asked, np.asarray([2, 3], np.int32)
    )
    assert views.shape == (16, 4, 4) and views.dtype == np.int32
    np.testing.assert_array_equal(views, np.broadcast_to(asked, views.shape))
    last = jit(functools.partial(meta.view_predictions, models, permutations=permutations))(
        STATE.params, support, asked, np.asarray([2, 3], np.int32)
    )
    assert (np.asarray(last) != asked).any(axis=(1, 2)).all()


def test_an_answer_counts_in_the_size_that_the_examples_say():
    """The second answer of the second task is said to be 1 x 2, and lacks a row; what is padding does not count."""
    asked = rules.padded(np.asarray([[1, 2], [3, 4]]), 4)
    query = np.full((2, 2, 2, 4, 4), PADDING, np.int32)
    query[:, 0] = query[1, 1] = asked
    sizes = np.asarray([[[2, 2], [0, 0]], [[2, 2], [1, 2]]], np.int32)
    models = replace(MODELS, grid=LastCopier(CONFIG.grid, 4))
    support = tasks()["support"].at[1, :, 1, 3].set(PADDING)  # the second task's answers lack a row
    batch = {"support": support, "query": query, "size": sizes}
    found = jit(functools.partial(meta.eval_step, models=models))(STATE.params, batch)
    assert (float(found["exact"]), float(found["pixel"])) == ((1 + 0.5) / 2, (1 + 0.75) / 2)
    assert (float(found["exact_copy"]), float(found["pixel_copy"])) == (1, 1)
    # What copies would copy: the table of grids that stay as they are leaves the answers as they are, padding too.
    same = jit(functools.partial(meta.eval_step, models=models))(
        STATE.params, {**batch, "support": support.at[:, :, 1].set(support[:, :, 0])}
    )
    assert (float(same["exact_table"]), float(same["pixel_table"])) == (1, 1)
    same_shape = float(jnp.mean(support[0, :, 0] == support[0, :, 1], dtype=jnp.float32))
    assert float(found["loo_accuracy_same_shape"]) == pytest.approx(same_shape)
    assert float(found["loo_accuracy"]) != pytest.approx(same_shape) and float(found["loo_lift_same_shape"]) == 0


def answer_by_table(support, query):
    """The first question with each colour replaced by what stands in its place most often."""
    cells = list(zip(support[:, 0].ravel(), support[:, 1].ravel(), strict=True))
    colours = [Counter(after for before, after in cells if before == colour) for colour in range(10)]
    table = [max(sorted(found), key=found.get) if found else colour for colour, found in enumerate(colours)]
    return np.asarray(table)[query[0, 0]]


def test_held_out_metrics_and_their_controls():
    batch = tasks(3)
    batch["size"] = jnp.full((3, 1, 2), 4)
    found = jit(functools.partial(meta.eval_step, models=MODELS))(STATE.params, batch)
    deltas_of = jit(functools.partial(meta.task_deltas, MODELS, STATE.params))
    score = jit(lambda used, pair: meta.grid_loss(meta.answers(MODELS, STATE.params, used, pair[0]), pair[1]))
    deltas = [deltas_of(support) for support in batch["support"]]
    by_hand = {"": deltas, "_zeroed": [hyperlora.zeroed(x) for x in deltas], "_foreign": [deltas[-1], *deltas[:-1]]}
    for name, used in by_hand.items():
        scores = [score(delta, pair) for delta, pair in zip(used, batch["query"][:, 0], strict=True)]
        for metric, values in zip(("nll", "pixel", "exact"), zip(*scores, strict=True), strict=True):
            assert float(found[metric + name]) == pytest.approx(float(np.mean(values)), rel=1e-4), metric + name
    mapped = [answer_by_table(*map(np.asarray, task)) for task in zip(batch["support"], batch["query"], strict=True)]
    for name, asked in (("copy", batch["query"][:, 0, 0]), ("table", np.stack(mapped))):
        right = np.asarray(asked == batch["query"][:, 0, 1])
        expected = right.mean(), right.all(axis=(1, 2)).mean()
        assert [float(found[f"{metric}_{name}"]) for metric in ("pixel", "exact")] == pytest.approx(expected), name
    assert float(found["pixel_table"]) > float(found["pixel_copy"])
    copies = batch["support"][:, :, 0] == batch["support"][:, :, 1]
    assert float(found["loo_accuracy_copy"]) == pytest.approx(float(jnp.mean(copies, dtype=jnp.float32)))
    assert float(found["loo_lift"]) == pytest.approx(float(found["loo_accuracy"] - found["loo_accuracy_copy"]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas)
    assert float(found["lora_diversity"]) == pytest.approx(float(hyperlora.diversity(stacked)), rel=1e-4)
    assert {f"lora_magnitude_{name}" for name in model.TARGETS} <= found.keys()
