"""The steps of training with omission and a LensNet that reads the base model: one program, exact budgets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import working as contexts
from lensjax.training.metrics import HISTOGRAMS, MAY_BE_UNDEFINED
from lensjax.training.recipe import Recipe
from lensjax.training.steps import difficulty, online, preference, pretrain
from tests.small import OMITTING, SMALL, batch, jit

CONFIG, RECIPE, MODELS, GEOMETRY = OMITTING.config, OMITTING.recipe, OMITTING.models, OMITTING.config.geometry
STEPS = 3


def trained(step, state, frozen, compiles):
    """The first state and the last one, and all reports; one program, which is compiled once."""
    first, reports = jax.tree.map(jnp.copy, state), []
    state, report = step(state, batch(0), frozen)
    with compiles() as names:
        for index in range(1, STEPS):
            reports.append(report)
            state, report = step(state, batch(index), frozen)
    assert names == []
    return first, state, [*reports, report]


def assert_finite(reports):
    for report in reports:
        undefined = [name for name, value in report.items() if not np.isfinite(value).all()]
        assert set(undefined) <= set(MAY_BE_UNDEFINED)


def moved(first, last):
    pairs = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), first, last)
    return {jax.tree_util.keystr(path): changed for path, changed in jax.tree_util.tree_leaves_with_path(pairs)}


def test_train_step(compiles):
    step = functools.partial(preference.train_step, recipe=RECIPE, models=MODELS)
    first, last, reports = trained(jit(step, donate_argnums=0), OMITTING.state(), {}, compiles)
    assert_finite([{name: x for name, x in report.items() if name not in HISTOGRAMS} for report in reports])
    # The token loss alone trains GistNet, and the base model reads no gist.
    found = moved(first.params, last.params)
    assert all(changed == (not name.startswith("['gist']")) for name, changed in found.items()), found
    lengths = {float(report["context_length"]) for report in reports}
    assert lengths <= {float(GEOMETRY.length(length)) for length in range(GEOMETRY.shortest, 33)}


def test_all_variants_have_the_length_and_the_policy_sees_a_map_and_what_the_base_model_looks_at():
    state = OMITTING.state()
    for step in (0, 3, 11):
        scored, scores, _ = OMITTING.observe(OMITTING.state(step=step), batch())
        length = int(difficulty.current_length(jnp.int32(step), state.hyper, recipe=RECIPE))
        check = functools.partial(contexts.invariants, geometry=GEOMETRY, length=length)
        for name, ok in jax.vmap(jax.vmap(check))(scored.contexts).items():
            assert np.all(ok), name
        assert (contexts.entry_count(scored.contexts, GEOMETRY) == length).all()
        # Each block is read or mapped.
        np.testing.assert_array_equal(scored.contexts.length, length + (32 - length) // 2)
        # Of five blocks, for two queries, two layers and two heads.
        assert scored.entries.states.shape == (*scored.entries.valid.shape, 5 * 8)
        assert np.asarray(scored.entries.states)[np.asarray(scored.contexts.valid)].any(axis=-1).mean() > 0.9
        assert (np.asarray(scores)[np.asarray(scored.contexts.valid)] != 0).all()


def test_pretrain_step(compiles):
    settings = CONFIG.pretrain
    static = {"recipe": RECIPE, "settings": settings, "models": MODELS}
    state, frozen = pretrain.init_pretrain_state(jax.random.key(0), **static)
    step = jit(functools.partial(pretrain.pretrain_step, **static), donate_argnums=0)
    _, _, reports = trained(step, state, frozen, compiles)
    assert_finite(reports)


@pytest.mark.parametrize("start", ["recency", "uniform"])
def test_online_step(start, compiles):
    config = _settings.replace(CONFIG, **{"focus.start": start})
    static = {"recipe": config.recipe, "settings": config.online, "models": MODELS}
    state, frozen = online.init_online_state(jax.random.key(1), params=OMITTING.params(), **static)
    episodes = jit(functools.partial(online.roll_out, **static))({**frozen, **state.params}, state, batch())
    seen = jax.tree.leaves(episodes, is_leaf=lambda node: isinstance(node, contexts.WorkingContext))
    (seen,) = [leaf for leaf in seen if isinstance(leaf, contexts.WorkingContext)]
    assert (contexts.entry_count(seen, GEOMETRY) == config.budget).all()
    cold = seen.start.reshape(-1, *seen.start.shape[-2:])[:, 0]
    recency = contexts.recency(config.budget, GEOMETRY, capacity=config.budget).start
    assert np.array_equal(cold, np.broadcast_to(recency, cold.shape)) == (start == "recency")
    step = jit(functools.partial(online.online_step, **static), donate_argnums=0)
    _, _, reports = trained(step, state, frozen, compiles)
    assert_finite(reports)


def test_settings_that_need_omission_are_refused_without_it():
    with pytest.raises(ValueError, match=r"focus\.start recency needs context\.omit"):
        _settings.replace(SMALL, **{"focus.start": "recency"})
    with pytest.raises(ValueError, match=r"context\.max_lod must be 1 with context\.omit .*, got 2"):
        _settings.replace(SMALL, **{"context.omit": True})
    with pytest.raises(ValueError, match=r"context\.sink_blocks must be 0 without context\.omit .*, got 1"):
        _settings.replace(SMALL, **{"context.sink_blocks": 1})
    with pytest.raises(ValueError, match=r"must hold a block behind context\.sink_blocks, .*, at least 54, got 36"):
        _settings.replace(CONFIG, **{"context.sink_blocks": 20})
    assert isinstance(RECIPE, Recipe) and RECIPE.geometry.omit
