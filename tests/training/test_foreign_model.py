"""A base model that is written against the protocols alone: checked, trained, evaluated, and read as a stream."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lensjax as lx
from lensjax.context import working as contexts
from lensjax.evaluation import compare, held_out
from lensjax.models import LanguageModel, StreamingLanguageModel
from tests import foreign, reference
from tests.foreign import ForeignModel
from tests.small import OTHER, SMALL, batch, jit

MODEL, PARAMS = ForeignModel(), ForeignModel().init(jax.random.key(0))
ANSWERS = jnp.asarray([[0], [2], [4]], jnp.int32)


@pytest.mark.slow
def test_it_passes_mypy_as_a_streaming_language_model():
    api = pytest.importorskip("mypy.api")
    source = Path(foreign.__file__)
    assert "\nmodel: StreamingLanguageModel = ForeignModel()\n" in source.read_text()
    # Strict, whatever this project allows itself.
    report, errors, status = api.run(["--strict", "--config-file=", str(source)])
    assert status == 0, report + errors


def test_it_has_the_methods_of_the_protocols():
    assert isinstance(MODEL, LanguageModel) and isinstance(MODEL, StreamingLanguageModel)
    assert hash(MODEL) == hash(ForeignModel()) and OTHER.models.base == MODEL


def random_entries(count=9, seed=0):
    """Tokens and gists, as a loop would read them."""
    rng = np.random.default_rng(seed)
    spans = rng.choice([1.0, 2.0, 4.0], count).astype(np.float32)
    positions = (np.cumsum(spans) - spans + (spans - 1) / 2).astype(np.float32)
    entries = contexts.in_full(rng.normal(size=(count, MODEL.dim)).astype(np.float32), positions)
    return replace(entries, spans=jnp.asarray(spans))


def test_its_logits_are_those_of_a_loop():
    entries = random_entries()
    found = jax.jit(MODEL.logits)(PARAMS, entries, jnp.arange(9))
    for row in range(9):
        read = (np.asarray(leaf)[: row + 1] for leaf in (entries.embeddings, entries.positions, entries.spans))
        np.testing.assert_allclose(found[row], reference.logits_at_end(PARAMS, *read), rtol=1e-4, atol=1e-5)


def test_its_cache_gives_the_logits_of_all_at_once():
    entries, whole = random_entries(), jax.jit(MODEL.logits)(PARAMS, random_entries(), jnp.arange(9))
    extend = jax.jit(MODEL.extend)

    def rows(start):
        return jax.tree.map(lambda leaf: leaf[start : start + 4], entries)

    first, cache = extend(PARAMS, MODEL.init_cache(9), rows(0), 4)
    # Of the next four only one is real, and it is forgotten again.
    second, cache = extend(PARAMS, cache, rows(4), 1)
    again, cache = extend(PARAMS, MODEL.truncate(cache, jnp.asarray(4)), rows(4), 4)
    np.testing.assert_allclose(jnp.concatenate([first, again]), whole[:8], rtol=1e-5)
    np.testing.assert_allclose(second[0], whole[4], rtol=1e-5)
    assert int(cache.length) == 8


def test_it_is_trained():
    state, losses = OTHER.state(step=6, learning_rate=0.03), []
    first = jax.tree.map(jnp.copy, state.params)
    for _ in range(6):
        state, report = OTHER.train_step(state, batch(), OTHER.frozen())
        assert np.isfinite([float(report[name]) for name in ("loss", "grad_norm", "token_loss")]).all()
        losses.append(float(report["nll_baseline"]))
    assert losses[-1] < losses[0] - 0.1
    for part in ("base", "lens"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), first[part], state.params[part])
        assert all(jax.tree.leaves(moved)), part


def test_it_is_evaluated_as_in_training():
    state, rows = OTHER.state(), batch() | {"answers": ANSWERS}
    step = jit(functools.partial(held_out.eval_step, recipe=OTHER.recipe, models=OTHER.models))
    report = step(jax.random.key(0), state, rows, OTHER.frozen())
    assert {"nll_policy", "nll_oracle", "hit_rate"} <= set(report)
    assert all(np.isfinite(float(report[name])) for name in ("nll_policy", "nll_baseline", "nll_rollout_mean"))


@pytest.mark.slow
def test_it_is_evaluated_beside_the_policies_that_need_no_attention():
    measure = functools.partial(compare.measure, OTHER.models, length=16, draws=2, oracle_rounds=1, recipe=OTHER.recipe)
    found = jit(lambda params, tokens, answers, key: measure(params, tokens, answers, key).policies)(
        OTHER.params(), batch()["tokens"][0], ANSWERS[0], jax.random.key(1)
    )
    assert {"recency", "random", "bm25", "lensnet_1", "oracle"} <= set(found)
    # What scores by attention is for models that show it.
    assert not {"snapkv", "key_norm"} & set(found)
    assert all(np.isfinite(one.nll) for one in found.values())
    assert float(found["oracle"].nll) <= min(float(found[name].nll) for name in ("recency", "random", "bm25"))


def test_it_is_read_as_a_stream():
    """Up to the budget nothing is compressed: the losses are those of all tokens at once."""
    params = OTHER.params()
    config = lx.SessionConfig(SMALL.geometry, budget=20, interval=4)
    session = lx.Session(OTHER.models, params, config)
    tokens = np.asarray(batch()["tokens"][0])
    state, losses = session.append(session.init(), tokens[:20])

    @jit
    def at_once(tokens):
        entries = contexts.in_full(MODEL.embed(params["base"], tokens), jnp.arange(20))
        logits = MODEL.logits(params["base"], entries, jnp.arange(19))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])

    assert losses[0] == pytest.approx(np.log(MODEL.vocab_size), rel=1e-5)
    np.testing.assert_allclose(losses[1:], at_once(tokens[:20]), rtol=1e-4)

    # Behind it gists stand in for tokens, and what comes next is read after them.
    state, losses = session.append(state, tokens[20:24])
    assert int(state.context.length) == 20 and bool((state.context.lod > 0).any())
    state, (loss,) = session.append(state, tokens[24:25])
    logits = jit(MODEL.logits)(params["base"], state.view.entries, state.context.length[None] - 1)
    np.testing.assert_allclose(session.predict(state), logits[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite([*losses, loss]).all()
