"""All policies where what is collapsed is omitted: one budget, counted in what the base model reads."""

import functools
from dataclasses import replace

import jax
import numpy as np

from lensjax.context import working as contexts
from lensjax.evaluation import compare, held_out, rivals
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.metrics import MAY_BE_UNDEFINED
from tests import reference
from tests.small import OMITTING, batch, jit

RECIPE, MODELS, SHAPE, GEOMETRY = OMITTING.recipe, OMITTING.models, OMITTING.config.context, OMITTING.config.geometry
LENGTH, DRAWS, KEY = 18, 3, jax.random.key(5)


@functools.cache
def compared():
    options = {"length": LENGTH, "draws": DRAWS, "oracle_rounds": 1, "recipe": RECIPE}
    run = jit(functools.partial(compare.measure, MODELS, **options))
    return jax.device_get(run(OMITTING.params(), batch()["tokens"][0], np.asarray([6]), KEY))


def measured():
    return {name: one for name, one in compared().policies.items() if name != compare.FULL}


def test_every_policy_has_exactly_the_entries():
    found = measured()
    assert {"recency", "uniform", "random", "recent_random", "snapkv", "lookup", "lensnet_1", "oracle"} <= set(found)
    for name, one in found.items():
        assert one.entries.tolist() == [LENGTH, LENGTH], name
        assert np.isfinite(one.nll) and (one.hit in (0, 1) or name in ("random", "recent_random"))
    assert found["answer"].hit == 1 and found["recency"].hit == 0


def test_every_context_is_a_legal_cut_of_the_whole_history():
    geometry = replace(GEOMETRY, sink_blocks=1)

    @jit
    def check(params, tokens, key):
        window = split(tokens, horizon=SHAPE.horizon)
        shown = rivals.causal(
            MODELS, params, window.history, key, geometry, length=LENGTH, draws=DRAWS, high_lod_share=0.3
        )
        of_horizon = rivals.hindsight(MODELS, params, window, np.asarray([6]), geometry, length=LENGTH)
        # As if the first draw were the best.
        losses = {name: np.arange(many.valid.shape[0], dtype=np.float32) for name, many in shown.items()}
        options = {"length": LENGTH, "rounds": 1}
        of_horizon["oracle"], _ = rivals.searched(MODELS, params, window, shown, losses, geometry, **options)
        each = functools.partial(contexts.invariants, geometry=geometry, length=LENGTH)
        return {name: jax.vmap(each)(many) for name, many in (shown | of_horizon).items()}

    for name, holds in check(OMITTING.params(), batch()["tokens"][0], KEY).items():
        assert all(np.all(ok) for ok in holds.values()), (name, holds)


def test_recency_is_the_base_model_on_the_last_tokens_and_a_start_of_the_search():
    base, params = MODELS.base, OMITTING.params()["base"]

    @jit
    def sliding_window(tokens):
        window = split(tokens, horizon=SHAPE.horizon)
        last = window.history[-LENGTH:]
        places = np.arange(SHAPE.history - LENGTH, SHAPE.history)
        return nll.token_nll(base, params, contexts.in_full(base.embed(params, last), places), window.horizon).mean()

    found = measured()
    np.testing.assert_allclose(found["recency"].nll, sliding_window(batch()["tokens"][0]), rtol=1e-5)
    assert found["oracle"].nll <= min(one.nll for name, one in found.items() if "random" not in name) + 1e-6


def test_a_policy_that_nothing_convinces_stays_at_recency():
    focus = RECIPE.focus.__class__(start="recency", margin=2.5, steps=2)
    recipe = RECIPE.__class__(**{**vars(RECIPE), "focus": focus})

    @jit
    def pick(params, tokens):
        options = {"length": LENGTH, "draws": DRAWS, "oracle_rounds": 0, "recipe": recipe}
        return compare.measure(MODELS, params, tokens, None, KEY, **options).focus

    picked = pick(OMITTING.params(), batch()["tokens"][0])
    jax.tree.map(np.testing.assert_array_equal, picked, contexts.recency(LENGTH, GEOMETRY, capacity=LENGTH))


def test_what_a_focus_does_is_told_by_what_is_read():
    run = jit(functools.partial(compare.measure_foreign, MODELS, length=LENGTH, recipe=RECIPE))
    tokens = batch()["tokens"]
    recency = contexts.recency(LENGTH, GEOMETRY, capacity=LENGTH)
    # Another block of two in the place of the oldest one.
    cut = np.asarray([0, 0] + [1] * 14 + [0] * 16, np.int32)
    other = contexts.from_cut(cut, GEOMETRY, capacity=LENGTH)
    for own, changed in ((recency, 0), (other, 1)):
        found = replace(compared(), focus=own)
        foreign, share = jax.device_get(run(OMITTING.params(), tokens[0], None, found, recency))
        assert foreign.entries.tolist() == [LENGTH, LENGTH] and share == changed
        np.testing.assert_allclose(foreign.nll, measured()["recency"].nll, rtol=1e-5)
    shown = reference.entries_of(contexts.read(compared().focus, GEOMETRY))
    last = reference.entries_of(contexts.read(recency, GEOMETRY))
    expected = reference.edit_distance(tuple(shown), tuple(last)) / LENGTH
    assert compared().divergence == np.float32(expected)
    assert -1 <= compared().correlation <= 1
    full = compared().policies[compare.FULL]
    assert full.entries.tolist() == [SHAPE.history, SHAPE.history] and full.hit == 1


def test_held_out_measurements_are_finite_and_maps_have_the_length():
    state = OMITTING.state()
    rows = batch() | {"answers": np.full((3, 1), 6, np.int32)}
    measure = jit(functools.partial(held_out.eval_step, recipe=RECIPE, models=MODELS))
    report = measure(KEY, state, rows, OMITTING.frozen())
    assert not [name for name, value in report.items() if not np.isfinite(value).all() and name not in MAY_BE_UNDEFINED]
    assert 0 <= float(report["hit_rate"]) <= 1
    draw = jit(functools.partial(held_out.variant_maps, recipe=RECIPE, models=MODELS))
    maps = draw(state, rows["tokens"], KEY, OMITTING.frozen())
    lengths = (np.asarray(maps["cuts"]) == 0).sum(axis=-1)
    assert (lengths == lengths[..., :1]).all()


def test_the_tree_of_a_comparison_holds_what_the_policy_reads():
    tree = jax.eval_shape(
        lambda params, tokens: build_tree(MODELS, params, tokens, GEOMETRY),
        OMITTING.params(),
        batch()["tokens"][0, : SHAPE.history],
    )
    assert [level.shape for level in tree.states] == [(32, 8), (16, 8)]
