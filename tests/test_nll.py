import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax import context as contexts
from lensjax import nll
from lensjax import tree as trees
from lensjax.config import BaseConfig
from lensjax.lengths import CutGeometry
from lensjax.models import BaseModel
from tests import reference

HORIZON = 3
WINDOW = 32
VOCABULARY = 13


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


def random_tokens(seed=0, window=WINDOW, vocabulary=VOCABULARY):
    return np.random.default_rng(seed).integers(0, vocabulary, window).astype(np.int32)


def random_cuts(max_lod=2, seed=0, length=20):
    """Three random cuts of one length, each with entries of every level."""
    geometry = CutGeometry(window=WINDOW, block_size=2, max_lod=max_lod, recent_tokens=HORIZON + 3)
    rng, cuts = np.random.default_rng(seed), []
    while len(cuts) < 3:
        cut = reference.random_cut(geometry, length, rng)
        if {lod for _, lod in cut} == set(range(max_lod + 1)):
            cuts.append(cut)
    return cuts


def as_variants(cuts, capacity=24):
    rows = [reference.context_of(cut, window=WINDOW, capacity=capacity) for cut in cuts]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@jax.jit
def score(params, leaves, tokens, variants):
    """Losses of variants under the language model."""
    tree = trees.build(leaves, mean_gist, block_size=2, max_lod=3)
    return nll.variant_losses(language_model()[0], params, tree, variants, tokens, horizon=HORIZON)[0]


def losses_of(cuts, tokens, capacity=24):
    _, params = language_model()
    return score(params, leaves_of(tokens), tokens, as_variants(cuts, capacity))


# (a) With nothing collapsed it is the ordinary loss.


def test_nothing_collapsed_is_the_ordinary_teacher_forced_loss():
    model, params = language_model()
    tokens = random_tokens()
    everything = [(token, 0) for token in range(WINDOW)]
    loss = losses_of([everything] * 3, tokens, capacity=WINDOW)[0]

    # The usual way: logits of every position, shifted against the tokens by one.
    @jax.jit
    def all_logits(tokens):
        ones = jnp.ones(WINDOW)
        index = jnp.arange(WINDOW)
        return model.apply(params, model.embed(params, tokens), index.astype(jnp.float32), ones, index)

    log_p = np.asarray(jax.nn.log_softmax(all_logits(tokens)), np.float64)
    per_token = -log_p[np.arange(WINDOW - 1), tokens[1:]]
    np.testing.assert_allclose(loss, per_token[-HORIZON:].mean(), rtol=1e-5)
    ordinary = jax.jit(lambda tokens: nll.sequence_losses(model, params, tokens))(tokens)
    np.testing.assert_allclose(ordinary, per_token, rtol=1e-5)
    # Not by accident: the unshifted and the doubly shifted loss are others.
    assert abs(-log_p[np.arange(WINDOW), tokens][-HORIZON:].mean() - loss) > 0.1
    assert abs(-log_p[np.arange(WINDOW - 2), tokens[2:]][-HORIZON:].mean() - loss) > 0.1


class Successor:
    """Predicts token + `step` with near certainty from the entry of the token alone."""

    def __init__(self, step):
        self.step = step

    def embed(self, params, tokens):
        return jax.nn.one_hot(tokens, VOCABULARY)

    def apply(self, params, embeddings, positions, spans, rows):
        return 20.0 * jnp.roll(embeddings, self.step, axis=-1)[rows]


@pytest.mark.parametrize(("step", "is_right"), [(1, True), (0, False), (2, False)])
def test_the_target_of_an_entry_is_the_next_token(step, is_right):
    tokens = (np.arange(WINDOW) % VOCABULARY).astype(np.int32)  # each token's successor is the next number
    model = Successor(step)

    @jax.jit
    def loss(tokens):
        tree = trees.build(model.embed(None, tokens), mean_gist, block_size=2, max_lod=1)
        baseline = contexts.baseline(20, window=WINDOW, capacity=24)
        variants = jax.tree.map(lambda x: x[None], baseline)
        return nll.variant_losses(model, None, tree, variants, tokens, horizon=HORIZON)[0]

    expected = 0.0 if is_right else 20.0
    np.testing.assert_allclose(loss(tokens), [expected], atol=1e-4)


# (b) Nothing leaks from later entries.


def test_no_gradient_from_entries_that_end_after_the_target():
    model, params = language_model()
    tokens = random_tokens(2)
    cut = random_cuts()[0]
    tree = trees.build(leaves_of(tokens), mean_gist, block_size=2, max_lod=2)
    read = contexts.materialise(tree, reference.context_of(cut, window=WINDOW, capacity=24))

    @jax.jit
    @jax.jacrev
    def influence(embeddings):
        changed = dataclasses.replace(read, embeddings=embeddings)
        return nll.token_losses(model, params, changed, tokens[-HORIZON:])

    size = np.abs(np.asarray(influence(read.embeddings))).max(axis=-1)
    assert size.shape == (HORIZON, 24)
    for i, target in enumerate(range(WINDOW - HORIZON, WINDOW)):
        for j, entry in enumerate(cut):
            is_readable = reference.covered(entry, 2).stop <= target
            assert (size[i, j] > 0) == is_readable, f"loss of token {target}, entry {entry}"
        assert not size[i, len(cut) :].any(), "padding"


def test_no_gradient_from_the_last_token():
    model, tokens = reference.TinyModel(), random_tokens(3, vocabulary=7)
    params = model.init(jax.random.key(0))
    variants = as_variants(random_cuts(seed=3))

    @jax.jit
    @jax.grad
    def influence(leaves):
        tree = trees.build(leaves, mean_gist, block_size=2, max_lod=3)
        return nll.variant_losses(model, params, tree, variants, tokens, horizon=HORIZON)[0].sum()

    size = np.abs(np.asarray(influence(model.embed(params, tokens)))).max(axis=-1)
    assert size[-1] == 0
    assert (size[:-1] > 0).all()  # every other token is read, in full or in a gist


# (c) The order of the variants does not matter.


def test_permuting_variants_permutes_losses():
    tokens, cuts = random_tokens(4), random_cuts(seed=4)
    losses = np.asarray(losses_of(cuts, tokens))
    assert len(set(losses.tolist())) == 3
    order = [2, 0, 1]
    np.testing.assert_array_equal(losses_of([cuts[i] for i in order], tokens), losses[order])


# (d) The slow reference, which reads a truncated context for every target.


def language_model_at_end(embeddings, positions, spans):
    model, params = language_model()
    run = _apply_last(model)
    return run(params, *(np.asarray(x, np.float32) for x in (embeddings, positions, spans)))


@functools.cache
def _apply_last(model):
    def last(params, embeddings, positions, spans):
        rows = jnp.full(1, embeddings.shape[0] - 1)
        return model.apply(params, embeddings, positions, spans, rows)[0]

    return jax.jit(last)


@pytest.mark.parametrize("max_lod", [1, 2, 3])
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
def scored_by_tiny_model(geometry, horizon):
    model = reference.TinyModel()

    @jax.jit
    def score(params, tokens, variants):
        tree = trees.build(
            model.embed(params, tokens), mean_gist, block_size=geometry.block_size, max_lod=geometry.max_lod
        )
        return nll.variant_losses(model, params, tree, variants, tokens, horizon=horizon)[0]

    return score


@settings(max_examples=16)
@given(
    shape=st.sampled_from([(CutGeometry(23, 3, 2, 6), 5), (CutGeometry(27, 2, 3, 4), 1)]),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_base_model_agrees_with_the_slow_reference(shape, depth, seed):
    geometry, horizon = shape
    model = reference.TinyModel()
    params = model.init(jax.random.key(0))
    tokens = random_tokens(seed, geometry.window, model.vocab_size)
    length = geometry.length(geometry.window - round(depth * (geometry.window - geometry.shortest)))
    cut = reference.random_cut(geometry, length, np.random.default_rng(seed))
    context = reference.context_of(cut, window=geometry.window, capacity=geometry.window)
    (loss,) = scored_by_tiny_model(geometry, horizon)(params, tokens, jax.tree.map(lambda x: x[None], context))
    expected = reference.variant_loss(
        functools.partial(model.logits_at_end, params),
        np.asarray(params["table"])[tokens],
        lambda children: children.mean(axis=0),
        cut,
        tokens,
        horizon=horizon,
        block_size=geometry.block_size,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# The rest of the contract.


def test_padding_changes_nothing():
    tokens, cuts = random_tokens(5), random_cuts(seed=5, length=24)
    padded, unpadded = (losses_of(cuts, tokens, capacity=capacity) for capacity in (WINDOW, 24))
    np.testing.assert_allclose(padded, unpadded, rtol=1e-5)


def test_logits_are_computed_at_the_horizon_alone():
    model, params = language_model()
    tree = trees.build(jnp.zeros((WINDOW, 16)), mean_gist, block_size=2, max_lod=1)
    variants = jax.tree.map(lambda x: x[None], contexts.baseline(23, window=WINDOW, capacity=23))
    program = str(
        jax.make_jaxpr(lambda tokens: nll.variant_losses(model, params, tree, variants, tokens, horizon=HORIZON)[0])(
            random_tokens()
        )
    )
    assert f"[1,{HORIZON},{VOCABULARY}]" in program
    assert f"23,{VOCABULARY}]" not in program


def test_horizon_rows_by_hand():
    assert nll.horizon_rows(10, horizon=3).tolist() == [6, 7, 8]


@pytest.mark.parametrize(("horizon", "capacity"), [(0, 20), (20, 20), (32, 40)])
def test_a_horizon_that_does_not_fit_is_refused(horizon, capacity):
    model = reference.TinyModel()
    tree = trees.init(capacity=WINDOW, dim=5, block_size=2, max_lod=1)
    variants = jax.tree.map(lambda x: x[None], contexts.baseline(20, window=WINDOW, capacity=capacity))
    with pytest.raises(ValueError, match=f"horizon must be at least 1 and below both .*got {horizon}"):
        nll.variant_losses(model, {}, tree, variants, np.zeros(WINDOW, np.int32), horizon=horizon)
