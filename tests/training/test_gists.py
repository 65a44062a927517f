"""GistNet through a frozen base: what it is taught, and that nothing else is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import rollouts
from lensjax.context import working as contexts
from lensjax.models import Models, hyperlora, lora
from lensjax.models.decision import build_tree, split
from lensjax.training import nll
from lensjax.training.steps import gists
from lensjax.training.steps.gists import GistTrainingConfig
from tests import reference
from tests.small import Run, batch, jit, tiny_models

STEPS = 40
PLAIN = {"optimizer.schedule": "constant", "gist.start": "scaled", "gist.layers": 1}
RUN = Run(**PLAIN)
OMITTING = Run(**PLAIN, **{"context.max_lod": 1, "context.omit": True, "hyper.context_start": 0.75})
SETTINGS = GistTrainingConfig(steps=STEPS, learning_rate=0.01, kl_weight=0.5)


@functools.cache
def compiled(run=RUN, settings=SETTINGS, models=None):
    static = {"recipe": run.recipe, "settings": settings, "models": models or run.models}
    return jit(functools.partial(gists.gists_step, **static), donate_argnums=0)


def fresh(run=RUN, seed=0):
    return gists.init_gists_state(jax.random.key(seed), recipe=run.recipe, params=run.params())


@functools.cache
def measured(run=RUN, settings=SETTINGS):
    """The loss of each sequence of a batch under the cuts of step 0, and its gradient for all parts that are given."""

    def loss(params, tokens, keys):
        one = functools.partial(gists.gists_loss, recipe=run.recipe, settings=settings, models=run.models)
        reports = jax.vmap(lambda row, key: one(key, params, row))(tokens, keys)
        return jnp.mean(reports["loss"]), reports

    return jit(jax.value_and_grad(loss, has_aux=True))


def keys(seed=0, count=3):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), count)


def train(state, frozen, settings):
    reports = []
    for _ in range(STEPS):
        state, report = compiled(settings=settings)(state, batch(), frozen)
        reports.append({name: float(value) for name, value in report.items()})
    return state, reports


@pytest.mark.slow
def test_it_learns_what_it_is_weighed_for():
    (state, frozen), names = fresh(), ("gists/token_loss", "gists/divergence")
    state, first = train(state, frozen, SETTINGS)
    # Teaching GistNet to help with the next token alone has led away from the full context.
    _, second = train(state, frozen, dataclasses.replace(SETTINGS, kl_weight=1000.0))
    for name, reports in zip(names, (first, second), strict=True):
        losses = [report[name] for report in reports]
        assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5]) - 1e-3, name
    assert set(first[0]) == {"loss", *names, "gists/nll", "grad_norm", "lr"}
    assert first[0]["loss"] == pytest.approx(first[0][names[0]] + 0.5 * first[0][names[1]], rel=1e-6)


@pytest.mark.parametrize("run", [RUN, OMITTING], ids=["gists", "omission"])
def test_gistnet_moves_whole_and_nothing_else_has_a_gradient(run):
    (state, frozen) = fresh(run)
    before = jax.tree.map(np.asarray, state.params)
    assert set(state.params) == {"gist"} and set(frozen) == {"base"} and frozen["base"] is run.params()["base"]
    after, _ = compiled(run)(state, batch(), frozen)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), after.params, before)
    assert all(jax.tree.leaves(moved)) and set(after.params) == {"gist"} and int(after.step) == 1
    _, grads = measured(run)(run.params(), batch()["tokens"], keys())
    for part, leaves in grads.items():
        sizes = [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)]
        assert all(sizes) if part == "gist" else not any(sizes), part


def test_a_low_rank_change_of_the_base_model_is_trained_beside_it():
    start, frozen = gists.init_gists_state(jax.random.key(0), recipe=RUN.recipe, params=RUN.params(), lora_rank=2)
    (plain, _) = fresh()
    jax.tree.map(np.testing.assert_array_equal, {"gist": start.params["gist"]}, plain.params)
    assert set(start.params) == {"gist", "lora"} and frozen["base"] is RUN.params()["base"]
    # Random factors, whose gradients are all there; at the start one of each pair is 0.
    random = np.random.default_rng(0)
    deltas = jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape).astype("f"), start.params["lora"])
    (_, report), grads = measured()({**RUN.params(), "lora": deltas}, batch()["tokens"], keys())
    for part, leaves in grads.items():
        sizes = [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)]
        assert all(sizes) if part in ("gist", "lora") else not any(sizes), part
    (_, same), _ = measured()({**RUN.params(), "lora": start.params["lora"]}, batch()["tokens"], keys())
    (_, without), _ = measured()(RUN.params(), batch()["tokens"], keys())
    for name, value in without.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-6, atol=1e-9)
        assert np.abs(np.asarray(report[name]) - value).min() > 1e-5
    state, before = start, jax.tree.map(np.asarray, start.params["lora"])
    for _ in range(2):
        state, _ = compiled()(state, batch(), frozen)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params["lora"], before)
    assert all(jax.tree.leaves(moved))


def test_the_teacher_is_the_base_model_without_its_change():
    models, params, geometry = RUN.models, RUN.params(), RUN.recipe.geometry
    deltas = lora.init(jax.random.key(0), params["base"], rank=2)
    deltas = jax.tree.map(lambda leaf: leaf + 0.5, deltas)
    changed = {**params, "base": hyperlora.adapt(params["base"], deltas)}
    context = contexts.recency(32, geometry, capacity=32)
    loss = functools.partial(gists.context_loss, context=context, geometry=geometry, kl_weight=1.0, models=models)
    found = jit(loss)({**params, "lora": deltas}, batch()["tokens"][0])
    alone = jit(loss)(changed, batch()["tokens"][0])
    # Of the whole window in full, too: another model reads it.
    assert float(found["gists/divergence"]) > 1e-3 > 1e-6 > float(alone["gists/divergence"])
    assert float(found["gists/nll"]) == pytest.approx(float(alone["gists/nll"]), rel=1e-6)


def test_the_loss_beside_a_slow_one():
    """Token by token, each entry read by a whole pass of its own."""
    models, params, geometry, horizon = RUN.models, RUN.params(), RUN.recipe.geometry, RUN.recipe.context.horizon
    (_, reports), _ = measured()(params, batch()["tokens"], keys())
    gist = jit(lambda children: models.gist.apply(params["gist"], children[None])[0])

    @jit
    def logs(embeddings, positions, spans):
        entries = contexts.in_full(embeddings, positions)
        entries = dataclasses.replace(entries, spans=spans)
        rows = jnp.arange(positions.shape[0])
        return jax.nn.log_softmax(models.base.logits(params["base"], entries, rows))

    for row, key in enumerate(keys()):
        tokens = np.asarray(batch()["tokens"][row])
        draw = functools.partial(rollouts.sample_of_any_length, geometry=geometry, capacity=RUN.recipe.capacity)
        shown = reference.entries_of(jit(draw)(key, RUN.recipe.hyper.high_lod_share))
        assert any(lod for _, lod in shown)
        leaves = np.asarray(models.base.embed(params["base"], tokens))

        def node(start, lod, leaves=leaves):
            if lod == 0:
                return leaves[start]
            width = 2 ** (lod - 1)
            return np.asarray(gist(jnp.stack([node(start + width * child, lod - 1) for child in range(2)])))

        read = [*shown, *((token, 0) for token in range(32, len(tokens) - 1))]
        spans = np.asarray([2**lod for _, lod in read], np.float32)
        places = np.asarray([start for start, _ in read], np.float32) + (spans - 1) / 2
        seen = np.asarray(logs(np.stack([node(*entry) for entry in read]), places, spans))
        whole = np.asarray(logs(leaves[:-1], np.arange(35.0, dtype=np.float32), np.ones(35, np.float32)))

        losses = [-seen[i, tokens[start + 1]] for i, (start, lod) in enumerate(read) if lod == 0]
        behind, full = seen[len(shown) - 1 :], whole[31:]
        divergence = np.mean([np.sum(np.exp(p) * (p - q)) for p, q in zip(full, behind, strict=True)])
        own = [-behind[i, tokens[32 + i]] for i in range(horizon)]
        found = {name: float(values[row]) for name, values in reports.items()}
        assert found["gists/token_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found["gists/nll"] == pytest.approx(np.mean(own), rel=1e-5)
        assert found["gists/divergence"] == pytest.approx(divergence, abs=1e-6) and divergence > 1e-5
        assert found["loss"] == pytest.approx(np.mean(losses) + 0.5 * divergence, rel=1e-5)


def test_of_the_full_context_there_is_nothing_to_follow():
    models, params, geometry = RUN.models, RUN.params(), RUN.recipe.geometry
    tokens = batch()["tokens"][0]

    @jit
    def loss(context):
        return gists.context_loss(params, tokens, context, geometry, kl_weight=1.0, models=models)

    report = loss(contexts.recency(32, geometry, capacity=32))
    assert float(report["gists/divergence"]) == pytest.approx(0, abs=1e-6)
    whole = jit(functools.partial(nll.sequence_nll, models.base, params["base"]))(tokens)
    assert float(report["gists/token_loss"]) == pytest.approx(float(whole.mean()), rel=1e-5)
    assert float(report["gists/nll"]) == pytest.approx(float(whole[-4:].mean()), rel=1e-5)
    short = loss(contexts.recency(9, geometry, capacity=32))
    assert float(short["gists/divergence"]) > 1e-5


def test_gists_are_read_where_the_recipe_omits():
    geometry, recipe = gists.gist_geometry(OMITTING.recipe), OMITTING.recipe
    assert recipe.geometry.omit and not geometry.omit and geometry.history == 32
    # 32 tokens in blocks of 2: three quarters are 24 entries, eight collapses.
    assert gists.gist_capacity(recipe) == 24
    tokens, params = batch()["tokens"][0], OMITTING.params()

    @jit
    def both(context):
        read = gists.context_loss(params, tokens, context, geometry, kl_weight=0.0, models=OMITTING.models)
        window = split(tokens, horizon=4)
        tree = build_tree(OMITTING.models, params, window.history, geometry)
        one = jax.tree.map(lambda leaf: leaf[None], context)
        losses, _ = nll.variant_nll(OMITTING.models.base, params["base"], tree, one, window.horizon, geometry)
        return read["gists/nll"], losses[0], read["gists/divergence"]

    cut = np.zeros(32, np.int32)
    cut[2:8] = 1
    read, expected, divergence = both(contexts.from_cut(cut, geometry, capacity=29))
    assert float(read) == pytest.approx(float(expected), rel=1e-6) and float(divergence) == 0


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_how_many_at_once_changes_nothing_but_memory(at_once):
    state, frozen = fresh()
    _, expected = compiled()(state, batch(), frozen)
    state, _ = fresh()
    _, found = compiled(settings=dataclasses.replace(SETTINGS, at_once=at_once))(state, batch(), frozen)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=2e-4, abs=1e-7), name


def test_it_is_one_program_and_each_step_draws_other_cuts(compiles):
    (state, frozen) = fresh()
    state, _ = compiled()(state, batch(), frozen)
    losses = []
    with compiles() as names:
        for _ in range(3):
            state, report = compiled()(state, batch(), frozen)
            losses.append(float(report["gists/token_loss"]))
    assert names == [] and len(set(losses)) == 3 and not jax.tree.leaves(frozen)[0].is_deleted()


def test_any_base_model_will_do():
    run = Run(tiny_models, **{"gist.heads": 1})
    assert isinstance(run.models, Models)
    after, report = compiled(run)(*_with_batch(run))
    assert np.isfinite(float(report["loss"])) and int(after.step) == 1


def _with_batch(run):
    state, frozen = fresh(run)
    return state, batch(), frozen


def test_a_length_that_no_context_with_gists_has_is_refused():
    changes = {"context.max_lod": 1, "context.omit": True, "hyper.context_start": 0.4, "hyper.context_end": 0.4}
    with pytest.raises(ValueError, match=r"hyper\.context_start asks for 12 entries, which no cut of 32 tokens"):
        gists.gist_capacity(Run(**changes).recipe)
