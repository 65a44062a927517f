"""The reward with omission: the base model reads the tokens of a cut, and nothing of what is left out."""

import jax
import numpy as np
import pytest

from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.training import nll
from tests import reference
from tests.small import jit
from tests.training.test_nll import (
    GEOMETRY,
    HISTORY,
    HORIZON,
    language_model,
    language_model_at_end,
    leaves_of,
    mean_gist,
    random_tokens,
    score,
)

OMITTING = Geometry(HISTORY, block_size=2, max_lod=1, recent_tokens=2, omit=True)


def measure(params, leaves, horizon, variants):
    """Losses of variants under the language model, and what a policy sees of them."""
    tree = trees.build(leaves, mean_gist, block_size=2, max_lod=1)
    return nll.variant_nll(language_model()[0], params, tree, variants, horizon, OMITTING)


score_omitting = jit(measure)


def omitting_variants(cuts):
    return reference.variants_of(cuts, window=HISTORY, capacity=OMITTING.rows(20))


@pytest.mark.parametrize("seed", range(3))
def test_with_omission_the_language_model_reads_the_tokens_alone(seed):
    rng, tokens = np.random.default_rng(seed), random_tokens(seed)
    cuts = [reference.random_cut(OMITTING, length, rng) for length in (20, 14, 6)]
    cuts.append([*((start, 1) for start in range(0, 24, 2)), *((token, 0) for token in range(24, HISTORY))])
    losses, entries = score_omitting(
        language_model()[1], leaves_of(tokens[:HISTORY]), tokens[HISTORY:], omitting_variants(cuts)
    )
    # A policy sees all rows, with the gists.
    assert [int(row.sum()) for row in entries.valid] == [len(cut) for cut in cuts]
    for cut, loss, row in zip(cuts, losses, entries.lods, strict=True):
        assert row[: len(cut)].tolist() == [lod for _, lod in cut]
        expected = reference.variant_loss(
            language_model_at_end,
            leaves_of(tokens),
            lambda children: children.mean(axis=0),
            reference.read(cut, OMITTING),
            tokens,
            horizon=HORIZON,
            block_size=2,
        )
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_with_omission_no_gradient_reaches_what_is_omitted():
    _, params = language_model()
    tokens, cut = random_tokens(2), reference.random_cut(OMITTING, 14, np.random.default_rng(2))
    variants = omitting_variants([cut])

    @jit
    @jax.grad
    def influence(leaves):
        return measure(params, leaves, tokens[HISTORY:], variants)[0].sum()

    size = np.abs(np.asarray(influence(leaves_of(tokens[:HISTORY])))).max(axis=-1)
    kept = [token for token, lod in cut if lod == 0]
    np.testing.assert_array_equal(size > 0, np.isin(np.arange(HISTORY), kept))


def test_with_omission_and_nothing_collapsed_it_is_the_ordinary_teacher_forced_loss():
    model, params = language_model()
    tokens = random_tokens(6)
    in_full = contexts.recency(HISTORY, OMITTING, capacity=HISTORY)
    variants = jax.tree.map(lambda leaf: leaf[None], in_full)
    (loss,), _ = score_omitting(params, leaves_of(tokens[:HISTORY]), tokens[HISTORY:], variants)
    ordinary = jit(lambda tokens: nll.sequence_nll(model, params, tokens))(tokens)
    assert float(loss) == pytest.approx(float(ordinary[-HORIZON:].mean()), rel=1e-5)


def test_recency_costs_the_same_with_and_without_omission():
    _, params = language_model()
    tokens = random_tokens(7)
    inputs = params, leaves_of(tokens[:HISTORY]), tokens[HISTORY:]
    one, other = (
        jax.tree.map(lambda leaf: leaf[None], contexts.recency(16, geometry, capacity=20))
        for geometry in (OMITTING, GEOMETRY)
    )
    np.testing.assert_allclose(score_omitting(*inputs, one)[0], score(*inputs, other), rtol=1e-6)
