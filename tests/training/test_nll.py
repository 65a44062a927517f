"""The reward: what the base model reads, which row predicts which token, and that nothing later leaks into a loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.models import BaseModel
from lensjax.models.base_lm import BaseConfig
from lensjax.training import nll
from tests import reference
from tests.foreign import ForeignModel
from tests.small import jit

HISTORY, HORIZON = 32, 3
GEOMETRY = Geometry(HISTORY, block_size=2, max_lod=3, recent_tokens=2)
VOCABULARY = 37  # more than the tokens of a window, so that each can be another one
HORIZONS = pytest.mark.parametrize("horizon", [HORIZON, 1])


def mean_gist(children):
    return children.mean(axis=1)


@functools.cache
def language_model():
    """A small model and parameters so large that neighbours, positions and gists all matter to the loss."""
    model = BaseModel(
        BaseConfig(vocab_size=VOCABULARY, dim=16, layers=2, heads=2, kv_heads=1, mlp_dim=32, gaussian_rope=True)
    )
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)
    return model, jax.tree.map(lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), shapes)


def leaves_of(tokens):
    """What the model's `embed` gives, without its program."""
    return language_model()[1]["embedding"]["embedding"][tokens]


def random_tokens(seed=0, window=HISTORY + HORIZON, vocabulary=VOCABULARY):
    return np.random.default_rng(seed).integers(0, vocabulary, window).astype(np.int32)


def random_cuts(max_lod=2, seed=0, length=20):
    """Three random cuts of one length, each with entries of every level."""
    geometry = dataclasses.replace(GEOMETRY, max_lod=max_lod)
    rng, cuts = np.random.default_rng(seed), []
    while len(cuts) < 3:
        cut = reference.random_cut(geometry, length, rng)
        if {lod for _, lod in cut} == set(range(max_lod + 1)):
            cuts.append(cut)
    return cuts


def as_variants(cuts, capacity=24):
    return reference.variants_of(cuts, window=HISTORY, capacity=capacity)


@jit
def score(params, leaves, horizon, variants):
    """Losses of variants under the language model."""
    tree = trees.build(leaves, mean_gist, block_size=2, max_lod=3)
    return nll.variant_nll(language_model()[0], params, tree, variants, horizon, GEOMETRY)[0]


def losses_of(cuts, tokens, capacity=24):
    _, params = language_model()
    return score(params, leaves_of(tokens[:HISTORY]), tokens[HISTORY:], as_variants(cuts, capacity))


# (a) With nothing collapsed it is the ordinary loss.


@HORIZONS
def test_nothing_collapsed_is_the_ordinary_teacher_forced_loss(horizon):
    model, params = language_model()
    tokens = random_tokens(window=HISTORY + horizon)
    window = len(tokens)
    in_full = as_variants([[(token, 0) for token in range(HISTORY)]], capacity=HISTORY)

    # The usual way: logits of every position, shifted against the tokens by one.
    @jit
    def all_logits(tokens):
        index = jnp.arange(window)
        return model.logits(params, contexts.in_full(model.embed(params, tokens), index), index)

    @jit
    def by_token(history, horizon):
        tree = trees.build(model.embed(params, history), mean_gist, block_size=2, max_lod=3)
        entries = contexts.materialise(tree, jax.tree.map(lambda leaf: leaf[0], in_full))
        return nll.token_nll(model, params, entries, horizon)

    log_p = np.asarray(jax.nn.log_softmax(all_logits(tokens)), np.float64)
    per_token = -log_p[np.arange(window - 1), tokens[1:]]
    losses = by_token(tokens[:HISTORY], tokens[HISTORY:])
    # Every token of the horizon, the first one included.
    np.testing.assert_allclose(losses, per_token[-horizon:], rtol=1e-5)
    (mean,) = score(params, leaves_of(tokens[:HISTORY]), tokens[HISTORY:], in_full)
    assert float(mean) == pytest.approx(per_token[-horizon:].mean(), rel=1e-5)
    ordinary = jit(lambda tokens: nll.sequence_nll(model, params, tokens))(tokens)
    np.testing.assert_allclose(ordinary, per_token, rtol=1e-5)
    # Not by accident: the unshifted and the doubly shifted loss are others.
    assert abs(-log_p[np.arange(window), tokens][-horizon:].mean() - mean) > 0.1
    assert abs(-log_p[np.arange(window - 2), tokens[2:]][-horizon:].mean() - mean) > 0.1


class Successor:
    """Predicts token + `step` with near certainty from the entry of the token alone."""

    def __init__(self, step):
        self.step = step

    def embed(self, params, tokens):
        return jax.nn.one_hot(tokens, VOCABULARY)

    def logits(self, params, entries, rows):
        return 20.0 * jnp.roll(entries.embeddings, self.step, axis=-1)[rows]


@pytest.mark.parametrize(("step", "is_right"), [(1, True), (0, False), (2, False)])
def test_the_target_of_an_entry_is_the_next_token(step, is_right):
    tokens = np.arange(HISTORY + HORIZON, dtype=np.int32)  # each token's successor is the next number
    model = Successor(step)

    @jit
    def loss(tokens):
        tree = trees.build(model.embed(None, tokens[:HISTORY]), mean_gist, block_size=2, max_lod=1)
        entries = contexts.materialise(tree, contexts.recency(20, GEOMETRY, capacity=24))
        return nll.token_nll(model, None, entries, tokens[HISTORY:])

    np.testing.assert_allclose(loss(tokens), [0.0 if is_right else 20.0] * HORIZON, atol=1e-4)


# (b) Nothing leaks from later tokens.


@dataclasses.dataclass(frozen=True)
class GivenRows:
    """A base model whose parameters are the embeddings of the tokens of one window, each of which comes once."""

    model: BaseModel
    params: dict

    def embed(self, rows, tokens):
        return rows[tokens]

    def logits(self, rows, *inputs):
        return self.model.logits(self.params, *inputs)


def test_no_gradient_reaches_a_token_from_losses_at_or_before_it():
    base, window = GivenRows(*language_model()), HISTORY + HORIZON
    tokens = np.random.default_rng(2).permutation(window).astype(np.int32)
    context = reference.context_of(random_cuts()[0], window=HISTORY, capacity=24)

    @jit
    @jax.jacrev
    def influence(rows):
        tree = trees.build(base.embed(rows, tokens[:HISTORY]), mean_gist, block_size=2, max_lod=2)
        return nll.token_nll(base, rows, contexts.materialise(tree, context), tokens[HISTORY:])

    size = np.abs(np.asarray(influence(leaves_of(np.arange(window))))).max(axis=-1)[:, tokens]
    assert size.shape == (HORIZON, window)
    # Each loss depends on every token before its own one, in full or in a gist, and on no other: never on the last.
    np.testing.assert_array_equal(size > 0, np.arange(window) < HISTORY + np.arange(HORIZON)[:, None])


def test_no_gradient_reaches_padding():
    model, params = language_model()
    tokens, cut = random_tokens(2), random_cuts()[0]
    tree = trees.build(leaves_of(tokens[:HISTORY]), mean_gist, block_size=2, max_lod=2)
    read = contexts.materialise(tree, reference.context_of(cut, window=HISTORY, capacity=24))

    @jit
    @jax.grad
    def influence(embeddings):
        changed = dataclasses.replace(read, embeddings=embeddings)
        return nll.token_nll(model, params, changed, tokens[HISTORY:]).sum()

    size = np.abs(np.asarray(influence(read.embeddings))).max(axis=-1)
    np.testing.assert_array_equal(size > 0, np.arange(24) < len(cut))


# (c) The order of the variants does not matter.


def test_permuting_variants_permutes_losses():
    tokens, cuts = random_tokens(4), random_cuts(seed=4)
    losses = np.asarray(losses_of(cuts, tokens))
    assert len(set(losses.tolist())) == 3
    order = [2, 0, 1]
    np.testing.assert_array_equal(losses_of([cuts[i] for i in order], tokens), losses[order])


# (d) The slow reference, which reads anew for every target what comes before it.


def language_model_at_end(embeddings, positions, spans):
    model, params = language_model()
    run = _apply_last(model)
    return run(params, *(np.asarray(x, np.float32) for x in (embeddings, positions, spans)))


@functools.cache
def _apply_last(model):
    def last(params, embeddings, positions, spans):
        entries = dataclasses.replace(contexts.in_full(embeddings, positions), spans=spans)
        return model.logits(params, entries, jnp.full(1, embeddings.shape[0] - 1))[0]

    return jit(last)


@pytest.mark.parametrize("max_lod", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_language_model_agrees_with_the_slow_reference(max_lod):
    for seed in range(3):
        tokens, cuts = random_tokens(seed), random_cuts(max_lod, seed)
        for cut, loss in zip(cuts, losses_of(cuts, tokens), strict=True):
            expected = reference.variant_loss(
                language_model_at_end,
                leaves_of(tokens),
                lambda children: children.mean(axis=0),
                cut,
                tokens,
                horizon=HORIZON,
                block_size=2,
            )
            assert float(loss) == pytest.approx(expected, rel=1e-4)


@functools.cache
def scored_by_foreign_model(geometry):
    model = ForeignModel()

    @jit
    def score(params, tokens, variants):
        history, horizon = tokens[: geometry.history], tokens[geometry.history :]
        tree = trees.build(
            model.embed(params, history), mean_gist, block_size=geometry.block_size, max_lod=geometry.max_lod
        )
        return nll.variant_nll(model, params, tree, variants, horizon, geometry)[0]

    return score


@settings(max_examples=24)
@given(
    shape=st.sampled_from(
        [
            (Geometry(23, 3, 2, 6), 5),
            (Geometry(27, 2, 3, 4), 1),
            (Geometry(20, 4, 1, 1), 21),
            (Geometry(26, 4, 1, 3, omit=True), 4),
        ]
    ),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_base_model_agrees_with_the_slow_reference(shape, depth, seed):
    geometry, horizon = shape
    model = ForeignModel()
    params = model.init(jax.random.key(0))
    tokens = random_tokens(seed, geometry.history + horizon, model.vocab_size)
    length = geometry.length(geometry.history - round(depth * (geometry.history - geometry.shortest)))
    cut = reference.random_cut(geometry, length, np.random.default_rng(seed))
    rows = geometry.rows(geometry.history)
    context = reference.context_of(cut, window=geometry.history, capacity=rows)
    (loss,) = scored_by_foreign_model(geometry)(params, tokens, jax.tree.map(lambda x: x[None], context))
    expected = reference.variant_loss(
        functools.partial(reference.logits_at_end, params),
        np.asarray(params["table"])[tokens],
        lambda children: children.mean(axis=0),
        reference.read(cut, geometry),
        tokens,
        horizon=horizon,
        block_size=geometry.block_size,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# The rest of the contract.


def test_a_reading_by_hand():
    model = ForeignModel()
    params = model.init(jax.random.key(0))
    tokens = np.asarray([3, 1, 4, 1, 5, 2, 6, 5, 0], np.int32)
    tree = trees.build(model.embed(params, tokens[:6]), mean_gist, block_size=2, max_lod=1)
    context = reference.context_of([(0, 1), (2, 1), (4, 0), (5, 0)], window=6, capacity=6)
    read = nll.reading(model, params, contexts.materialise(tree, context), tokens[6:])
    # Two gists, two tokens, the horizon but for its last token, two rows of padding.
    entries = read.entries
    assert entries.positions.tolist() == [0.5, 2.5, 4, 5, 6, 7, 0, 0]
    assert entries.spans.tolist() == [2, 2, 1, 1, 1, 1, 0, 0]
    assert read.rows.tolist() == [3, 4, 5]
    table = np.asarray(params["table"])
    np.testing.assert_allclose(entries.embeddings[0], (table[3] + table[1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(entries.embeddings[2:6], table[[5, 2, 6, 5]])
    assert not np.asarray(entries.embeddings[6:]).any()


@HORIZONS
def test_padding_changes_nothing(horizon):
    tokens, cuts = random_tokens(5, window=HISTORY + horizon), random_cuts(seed=5, length=24)
    padded, unpadded = (losses_of(cuts, tokens, capacity=capacity) for capacity in (HISTORY, 24))
    np.testing.assert_allclose(padded, unpadded, rtol=1e-5)


def test_logits_are_computed_at_the_horizon_alone():
    model, params = language_model()
    tree = trees.build(jnp.zeros((HISTORY, 16)), mean_gist, block_size=2, max_lod=1)
    variants = jax.tree.map(lambda x: x[None], contexts.recency(23, GEOMETRY, capacity=23))
    program = str(
        jax.make_jaxpr(lambda horizon: nll.variant_nll(model, params, tree, variants, horizon, GEOMETRY)[0])(
            random_tokens()[HISTORY:]
        )
    )
    assert f"[1,{HORIZON},{VOCABULARY}]" in program
    assert f"{23 + HORIZON - 1},{VOCABULARY}]" not in program


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_a_horizon_that_is_no_sequence_is_refused(shape):
    model = ForeignModel()
    tree = trees.init(capacity=HISTORY, dim=5, block_size=2, max_lod=1)
    variants = jax.tree.map(lambda x: x[None], contexts.recency(20, GEOMETRY, capacity=20))
    with pytest.raises(ValueError, match=r"horizon must hold one sequence of at least 1 token to score, got shape \("):
        nll.variant_nll(model, {}, tree, variants, np.zeros(shape, np.int32), GEOMETRY)
