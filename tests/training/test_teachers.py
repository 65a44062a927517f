"""Teachers in hindsight: which rows they ask, what they find, and what they must not depend on."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import nodes
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.models.decision import Window, split
from lensjax.training import teachers
from lensjax.training.teachers import DistillConfig
from tests import reference
from tests.foreign import ForeignModel
from tests.small import LENS, batch, jit

VOCABULARY = 24


@dataclass(frozen=True)
class Copier:
    """An induction head, by hand: a row looks at what followed its own token before, and says it again."""

    vocab_size: int = VOCABULARY
    dim: int = VOCABULARY

    def init(self, key):
        return {}

    def embed(self, params, tokens):
        return jax.nn.one_hot(tokens, VOCABULARY)

    def attention(self, params, entries, rows):
        keys = jnp.pad(entries.embeddings[:-1], ((1, 0), (0, 0)))
        logits = 12 * entries.embeddings[rows] @ keys.T
        is_earlier = jnp.arange(keys.shape[0])[None] < jnp.asarray(rows)[:, None]
        weights = jax.nn.softmax(jnp.where(is_earlier, logits, -1e9))
        return weights[None, None], jnp.ones((1, 1, keys.shape[0]))

    def logits(self, params, entries, rows):
        weights, _ = self.attention(params, entries, rows)
        return 8 * weights[0, 0] @ entries.embeddings


@dataclass(frozen=True)
class Fixed:
    """Attends as its parameters say: float32[layers, heads, S, S]."""

    vocab_size: int = 7
    dim: int = 2

    def init(self, key):
        return {}

    def embed(self, params, tokens):
        return jnp.zeros((len(tokens), 2))

    def logits(self, params, entries, rows):
        return jnp.zeros((len(rows), 7))

    def attention(self, params, entries, rows):
        return params["weights"][:, :, rows], jnp.ones((1, 1, entries.valid.shape[0]))


def copied(block=3):
    """24 tokens, all of them others, behind which comes what follows the last one in a block of 4."""
    history = np.random.default_rng(0).permutation(VOCABULARY).astype(np.int32)
    start = 4 * block
    history[-1] = history[start]
    return Window(jnp.asarray(history), jnp.asarray(history[start + 1 : start + 4]))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


GEOMETRY = Geometry(history=24, block_size=4, max_lod=1, recent_tokens=4)


# What the horizon attends to.


def test_future_attention_by_hand():
    # A history of three and a horizon of two: the rows of tokens 2 and 3 predict it, and the last token asks nothing.
    weights = np.random.default_rng(0).uniform(size=(2, 1, 4, 4)).astype(np.float32)
    weights[:, 0, 2] = [[0.5, 0.3, 0.2, 0], [0.1, 0.1, 0.8, 0]]
    weights[:, 0, 3] = [[0.0, 0.2, 0.2, 0.6], [0.4, 0.0, 0.2, 0.4]]
    window, params = Window(jnp.asarray([1, 2, 3]), jnp.asarray([4, 5])), {"weights": jnp.asarray(weights)}
    for heads, first, second in (("max", [0.5, 0.3, 0.8], [0.4, 0.2, 0.2]), ("mean", [0.3, 0.2, 0.5], [0.2, 0.1, 0.2])):
        look = functools.partial(teachers.future_attention, Fixed(), params, window, heads=heads)
        np.testing.assert_allclose(look(), np.add(first, second) / 2, rtol=1e-6)
        # The second token of the horizon alone: the row of the first.
        np.testing.assert_allclose(look(weights=[0.0, 1.0]), second, rtol=1e-6)
        expected = 0.75 * np.asarray(first) + 0.25 * np.asarray(second)
        np.testing.assert_allclose(look(weights=[0.75, 0.25]), expected, rtol=1e-6)
    by_default = teachers.future_attention(Fixed(), params, window)
    np.testing.assert_array_equal(by_default, teachers.future_attention(Fixed(), params, window, heads="max"))


HEADS = ("max", "mean")


@functools.cache
def look():
    """At the small run's windows, with weights; and the whole of its base model's attention."""
    base, params = LENS.models.base, LENS.params()["base"]

    def one(tokens, weights):
        entries = contexts.in_full(base.embed(params, tokens), jnp.arange(36))
        every, _ = base.attention(params, entries, jnp.arange(36))
        window = split(tokens, horizon=4)
        found = [teachers.future_attention(base, params, window, weights=weights, heads=heads) for heads in HEADS]
        return dict(zip(HEADS, found, strict=True)), every

    return jit(one)


def test_future_attention_is_that_of_a_loop():
    weights = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    found, every = jax.device_get(look()(batch()["tokens"][0], weights))
    expected = {name: np.zeros(32) for name in HEADS}
    for row, weight in zip(range(31, 35), weights, strict=True):
        seen = [head[row, :32] for layer in every for head in layer]
        expected["mean"] += weight * sum(seen) / len(seen)
        expected["max"] += weight * functools.reduce(np.maximum, seen)
    for name in HEADS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    assert (found["mean"] > 0).all() and 0.5 < found["mean"].sum() < 1 - 1e-3
    assert (found["max"] > found["mean"]).all() and (found["max"] <= 1).all()


def test_future_attention_is_the_same_without_jit_and_in_a_loop():
    windows = [copied(block) for block in range(4)]
    one = functools.partial(teachers.future_attention, Copier(), {}, weights=jnp.asarray([0.5, 0.2, 0.3]))
    together = jax.jit(jax.vmap(one))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *windows))
    for window, found in zip(windows, together, strict=True):
        np.testing.assert_allclose(found, one(window), rtol=1e-5)


def test_future_attention_does_not_read_what_has_no_weight():
    """A horizon that ends early is padded with any tokens, of weight 0; the last one is never read."""
    tokens = np.asarray(batch()["tokens"][0])
    changed = np.concatenate([tokens[:34], (tokens[34:] + 1) % 7])
    early = jnp.asarray([0.5, 0.5, 0.0, 0.0])
    assert_same(look()(changed, early)[0], look()(tokens, early)[0])
    window = copied()
    padded = Window(window.history, jnp.concatenate([window.horizon, window.history[:2]]))
    found = teachers.future_attention(Copier(), {}, padded, weights=jnp.asarray([1, 1, 1, 0, 0]) / 3)
    np.testing.assert_allclose(found, teachers.future_attention(Copier(), {}, window), rtol=1e-5)
    last, every = np.append(tokens[:35], (tokens[35] + 1) % 7), jnp.full(4, 0.25)
    assert_same(look()(last, every)[0], look()(tokens, every)[0])
    # What has weight is.
    for name in HEADS:
        assert (look()(changed, every)[0][name] != look()(tokens, every)[0][name]).any()


# What the gradient of the horizon's loss says.


@functools.cache
def gates(points):
    """Of ForeignModel, in a history of 9: three blocks of 2, then an incomplete one and the tail."""
    geometry = Geometry(history=9, block_size=2, max_lod=2, recent_tokens=2)

    def one(params, window, weights):
        found = teachers.gate_gradients(ForeignModel(), params, window, geometry, weights=weights, points=points)
        return found, nodes.pool_tokens(found, geometry)

    return one


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype("f") for name, shape in (("table", (7, 5)), ("head", (5, 7)))}
    return params, Window(*(rng.integers(0, 7, count).astype(np.int32) for count in (9, 3)))


def loss_of_gates(params, window, opened, weights):
    """In float64, token after token, with a gate on each of three blocks."""
    history, horizon = np.asarray(params["table"], np.float64)[window.history], params["table"][window.horizon]
    mean, gate = history.mean(axis=0), np.append(np.repeat(opened, 2), np.ones(3))
    shown = np.concatenate([mean + gate[:, None] * (history - mean), horizon])
    total = 0.0
    for step, (token, weight) in enumerate(zip(window.horizon, weights, strict=True)):
        read = 9 + step
        logits = reference.logits_at_end(params, shown[:read], np.arange(read), np.ones(read))
        total += weight * (np.log(np.exp(logits).sum()) - logits[token])
    return total


@pytest.mark.parametrize("points", [1, 3])
def test_gate_gradients_are_those_of_a_slow_loop(points):
    params, window = drawn()
    weights = np.asarray([0.2, 0.5, 0.3], np.float32)
    found, pooled = jax.jit(gates(points))(params, window, weights)
    expected = np.zeros(3)
    for point in range(points):
        opening = (point + 0.5) / points
        for block, step in enumerate(1e-5 * np.eye(3)):
            more, less = (loss_of_gates(params, window, opening + sign * step, weights) for sign in (1, -1))
            expected[block] -= (more - less) / 2e-5 / points
    # The same at both tokens of a block, nothing behind the blocks; and pooling gives it back.
    np.testing.assert_allclose(found, np.append(np.repeat(expected, 2), np.zeros(3)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(pooled[:3], expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).min() > 1e-4


def test_gate_gradients_sum_to_what_all_blocks_save():
    params, window = drawn(1)
    params["head"] *= 4
    every = np.full(3, 1 / 3)
    saved = loss_of_gates(params, window, np.zeros(3), every) - loss_of_gates(params, window, np.ones(3), every)
    found = jax.jit(gates(32))(params, window, None)[1][:3].sum()
    assert float(found) == pytest.approx(saved, abs=1e-4) and saved > 0.1


def test_gate_gradients_are_the_same_without_jit_and_in_a_loop():
    params, window = drawn()
    windows = jax.tree.map(lambda *leaves: jnp.stack(leaves), window, drawn(1)[1])
    weights, compiled = jnp.full(3, 1 / 3), jax.jit(gates(2))
    together, _ = jax.jit(jax.vmap(gates(2), in_axes=(None, 0, None)))(params, windows, weights)
    for index, found in enumerate(together):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], windows)
        np.testing.assert_allclose(found, compiled(params, one, weights)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gates(2)(params, window, weights)[0], together[0], rtol=1e-4, atol=1e-6)


def test_each_token_of_the_horizon_has_its_own_gradient():
    params, window = drawn(2)
    compiled = jax.jit(gates(2))
    rows = np.stack([compiled(params, window, weights)[0] for weights in np.eye(3, dtype=np.float32)])
    np.testing.assert_allclose(compiled(params, window, None)[0], rows.mean(axis=0), rtol=1e-4, atol=1e-6)
    # Of the first one what comes behind it says nothing.
    other = Window(window.history, np.append(window.horizon[:1], (window.horizon[1:] + 1) % 7))
    first = np.asarray([1, 0, 0], np.float32)
    np.testing.assert_array_equal(compiled(params, other, first)[0], rows[0])


def test_a_block_that_nothing_depends_on_is_worth_nothing():
    class SaysOneBlock(Copier):
        def logits(self, params, entries, rows):
            return jnp.tile(6 * entries.embeddings[8:12].sum(axis=0), (len(rows), 1))

    window = Window(jnp.arange(24), jnp.asarray([9, 10]))
    found = teachers.gate_gradients(SaysOneBlock(), {}, window, GEOMETRY, points=32)
    assert np.flatnonzero(found).tolist() == [8, 9, 10, 11]
    # Shut, the block says nothing; open, it says four tokens alike.
    logits = 6.0 * np.isin(np.arange(24), range(8, 12))
    assert float(found[8]) == pytest.approx(np.log(24) - (np.log(np.exp(logits).sum()) - 6), abs=1e-2)


# Both, and the choice.


@pytest.mark.parametrize("teacher", ["attention", "gradient"])
@pytest.mark.parametrize("block", range(5))
def test_the_block_that_the_horizon_copies_is_worth_most(teacher, block):
    found = teachers.worth(Copier(), {}, copied(block), GEOMETRY, teacher=teacher)
    pooled = np.asarray(nodes.pool_tokens(found, GEOMETRY))
    assert pooled.argmax() == block
    assert pooled[block] > 3 * np.abs(np.delete(pooled, block)).max()


def test_the_choice_passes_the_weights_on():
    window, last = copied(), jnp.asarray([0.0, 0.0, 1.0])
    for teacher, expected in (
        ("attention", teachers.future_attention(Copier(), {}, window, weights=last)),
        ("gradient", teachers.gate_gradients(Copier(), {}, window, GEOMETRY, weights=last)),
    ):
        found = teachers.worth(Copier(), {}, window, GEOMETRY, teacher=teacher, weights=last)
        np.testing.assert_array_equal(found, expected)


def test_a_model_without_attention_is_refused_by_the_teacher_that_needs_it():
    params, window = drawn()
    geometry = Geometry(history=9, block_size=2, max_lod=1, recent_tokens=2)
    message = r"distill.teacher is attention, .* ForeignModel has none: set distill.teacher to gradient"
    with pytest.raises(ValueError, match=message):
        teachers.worth(ForeignModel(), params, window, geometry, teacher="attention")
    assert teachers.worth(ForeignModel(), params, window, geometry, teacher="gradient").shape == (9,)


def test_shapes_that_do_not_fit_are_refused():
    params, window = drawn()
    geometry = Geometry(history=9, block_size=2, max_lod=1, recent_tokens=2)
    gradients = functools.partial(teachers.gate_gradients, ForeignModel(), params)
    with pytest.raises(ValueError, match=r"weights must have shape \[3\] .* got \(2,\)"):
        gradients(window, geometry, weights=np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"window.history must have shape \[9\] .* got \(8,\)"):
        gradients(Window(window.history[:8], window.horizon), geometry)
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        gradients(window, geometry, points=0)
    with pytest.raises(ValueError, match=r"weights must have shape \[3\] .* got \(1,\)"):
        teachers.future_attention(Copier(), {}, copied(), weights=np.ones(1, np.float32))


def test_settings():
    assert DistillConfig() == DistillConfig(steps=0, teacher="attention", temperature=0.5, sharpness=1.0)
    with pytest.raises(ValueError, match=r"distill\.teacher must be one of attention, gradient, got 'oracle'"):
        DistillConfig(teacher="oracle")
