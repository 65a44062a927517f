"""Key tokens: by hand, with a base model whose losses are known; what chooses them, and what they weigh."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.context import working as contexts
from lensjax.evaluation import held_out
from lensjax.models import Models
from lensjax.models.decision import build_tree, split
from lensjax.training import key_tokens, nll
from lensjax.training.key_tokens import KeyConfig
from lensjax.training.scoring import ContextConfig, score_variants
from lensjax.training.steps import online
from lensjax.training.steps.online import OnlineConfig
from tests.foreign import ForeignModel
from tests.small import SMALL, Run, batch, jit, tiny_models

HISTORY, SHORT = 16, 4
CLUES = jnp.asarray([3, 3, 13, 9])
"""Where the history helps each token of the horizon."""
KNOWN = {"without": jnp.asarray([-5.0, -5.0, -5.0, -2.5]), "with": jnp.asarray([-1.0, -2.5, -1.0, -1.0])}
"""Log-probability of each token of the horizon without its clue and with it."""
WINDOW = split(jnp.ones(HISTORY + 4, jnp.int32), horizon=4)


@dataclass(frozen=True)
class Clued:
    """Gives each token of the horizon, all of which are 1, the log-probability that is known."""

    vocab_size: int = 2
    dim: int = 1

    def init(self, key):
        return KNOWN

    def embed(self, params, tokens):
        return jnp.zeros((len(tokens), 1)) + sum(leaf.sum() for leaf in params.values())

    def logits(self, params, entries, rows):
        step = entries.positions[rows].astype(jnp.int32) - (HISTORY - 1)
        reads = jnp.any(
            (entries.positions.astype(jnp.int32)[None, :] == CLUES[step][:, None]) & entries.valid[None, :], axis=1
        )
        log_p = jnp.where(reads, params["with"][step], params["without"][step])
        return jnp.stack([jnp.log1p(-jnp.exp(log_p)), log_p], axis=1)


def gain(short=SHORT, model=None, params=KNOWN, window=WINDOW):
    return jit(lambda params: key_tokens.token_gain(model or Clued(), params, window, short=short))(params)


# Which they are.


def test_the_gain_by_hand():
    # The third clue is at 13: the last 4 of 16 tokens hold it.
    found = gain()
    np.testing.assert_allclose(found.gain, [4, 2.5, 0, 1.5], atol=1e-5)
    np.testing.assert_allclose(found.long, [-1, -2.5, -1, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [True, False, False, False]),
        ({"beta": -3.0}, [True, True, False, False]),
        ({"alpha": 1.0}, [True, False, False, True]),
        ({"alpha": 5.0}, [False] * 4),
    ],
)
def test_key_tokens_by_hand(settings, expected):
    assert key_tokens.is_key(gain(), KeyConfig(**settings)).tolist() == expected


@pytest.mark.parametrize(("short", "has_clue"), [(3, True), (2, False)])
def test_the_short_history_is_its_last_tokens(short, has_clue):
    assert (gain(short).gain[2] == 0) == has_clue


def test_both_readings_are_those_of_the_tokens_at_their_true_positions():
    model, geometry = ForeignModel(), SMALL.geometry
    params, tokens = model.init(jax.random.key(0)), batch()["tokens"][0]
    window = split(tokens, horizon=4)
    found = gain(9, model, params, window)

    @jit
    def readings(params):
        tree = build_tree(MODELS, {"base": params, "gist": {}}, window.history, geometry)
        near = contexts.materialise(tree, contexts.recency(9, geometry, capacity=9))
        return nll.sequence_nll(model, params, tokens)[-4:], nll.token_nll(model, params, near, window.horizon)

    whole, near = readings(params)
    np.testing.assert_allclose(found.long, -whole, rtol=1e-5)
    np.testing.assert_allclose(found.gain, near - whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("short", [0, HISTORY])
def test_a_short_history_is_neither_empty_nor_the_whole(short):
    with pytest.raises(ValueError, match="short must be at least 1 and below the 16 tokens"):
        key_tokens.token_gain(Clued(), KNOWN, WINDOW, short=short)


def test_it_is_always_shorter_than_the_contexts():
    assert [KeyConfig().tokens(length) for length in (56, 3, 1)] == [28, 1, 1]
    with pytest.raises(ValueError, match=r"context\.key\.short must be in \(0, 1\), got 1.0"):
        KeyConfig(short=1.0)
    # Of the shorter end of the curriculum, whichever it is: 16 of 32 tokens.
    assert SMALL.recipe.short == 8
    swapped = {"hyper.context_start": 0.5, "hyper.context_end": 0.8}
    assert _settings.replace(SMALL, **swapped).recipe.short == 8


# What they weigh.


@pytest.mark.parametrize(
    ("key", "weights"), [([1, 0, 1, 0], [0.5, 0, 0.5, 0]), ([0, 0, 0, 1], [0, 0, 0, 1]), ([0] * 4, [0.25] * 4)]
)
def test_weights_sum_to_one_and_are_equal_where_there_is_no_key_token(key, weights):
    found = key_tokens.key_weights(jnp.asarray(key, bool))
    assert found.tolist() == weights and found.dtype == jnp.float32 and found.sum() == 1


def test_the_loss_on_key_tokens_by_hand():
    losses = jnp.asarray([[1.0, 2.0, 6.0], [0.0, 9.0, 1.0]])
    assert key_tokens.key_nll(losses, jnp.asarray([True, False, True])).tolist() == [3.5, 0.5]
    assert np.isnan(key_tokens.key_nll(losses, jnp.zeros(3, bool))).all()


def test_no_gradient_reaches_the_base_model_through_the_choice():
    grads = jax.grad(lambda params: sum(each.sum() for each in key_tokens.token_gain(Clued(), params, WINDOW, short=4)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jit(grads)(KNOWN)))


# The reward.


class Mean:
    def init(self, key):
        return {}

    def apply(self, params, children):
        return jnp.mean(children, axis=1)


class Zero:
    def init(self, key):
        return {}

    def apply(self, params, entries):
        return jnp.zeros(entries.valid.shape)


MODELS = Models(ForeignModel(), Mean(), Zero())
CLUED = Models(Clued(), Mean(), Zero())
CONTEXT = ContextConfig(
    window=20, block_size=2, max_lod=1, horizon=4, recent_tokens=2, rollouts=2, reward="key", key=KeyConfig()
)


def recency_loss(length, context=CONTEXT, short=SHORT, params=KNOWN):
    """Of the variant that comes first, at a number of entries."""
    score = functools.partial(score_variants, models=CLUED, context=context, capacity=16, short=short)
    scored = jit(score)(jax.random.key(0), {"base": params, "gist": {}}, jnp.ones(20, jnp.int32), length, 0.0)
    return float(scored.nll[0])


def test_the_reward_is_the_loss_on_key_tokens():
    # The clue of the only key token is at 3.
    assert recency_loss(12) == pytest.approx(5, abs=1e-5) and recency_loss(13) == pytest.approx(1, abs=1e-5)
    assert recency_loss(13, replace(CONTEXT, reward="mean"), None) == pytest.approx((1 + 2.5 + 1 + 1) / 4, abs=1e-5)


def test_what_recency_happens_to_show_does_not_choose_the_key_tokens():
    # The last token is a key token too, with its clue at 9: recency has it from 7 entries on, the other from 13.
    context = replace(CONTEXT, key=KeyConfig(alpha=1.0))
    found = {length: recency_loss(length, context) for length in (9, 12, 16)}
    assert found == pytest.approx({9: (5 + 1) / 2, 12: (5 + 1) / 2, 16: (1 + 1) / 2}, abs=1e-5)
    # Told by what recency shows at 9 entries it would be none, and recency look worse than it is.
    assert recency_loss(9, context, short=9) == pytest.approx(5, abs=1e-5)


def test_without_key_tokens_all_are_rewarded():
    context = replace(CONTEXT, key=KeyConfig(alpha=9.0))
    mean = recency_loss(13, replace(CONTEXT, reward="mean"), None)
    assert recency_loss(13, context) == pytest.approx(mean, abs=1e-6)


def test_the_weights_of_the_reward_are_constants():
    def loss(params, context):
        score = functools.partial(score_variants, models=CLUED, context=context, capacity=16, short=SHORT)
        return score(jax.random.key(0), {"base": params, "gist": {}}, jnp.ones(20, jnp.int32), 13, 0.0).nll[0]

    grads = jit(jax.grad(loss), static_argnums=1)(KNOWN, CONTEXT)
    # The loss is minus the log-probability of the first token, with its clue: d/d log p of log(1 - p) drops out.
    np.testing.assert_allclose(grads["with"], [-1, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(grads["without"], 0, atol=1e-5)


def test_key_tokens_are_told_by_a_length_that_has_to_be_given():
    with pytest.raises(ValueError, match=r"short must be given where context\.reward is key"):
        recency_loss(12, short=None)


@pytest.mark.parametrize("part", ["base", "gist"])
def test_what_is_trained_on_all_tokens_is_not_weighed(part):
    with pytest.raises(ValueError, match=r"context\.reward must be mean where trainable names base or gist"):
        _settings.replace(SMALL, trainable=("lens", part), **{"context.reward": "key"})


# In training, and held out.

# Half of all tokens: the models know nothing.
ANY = {"gist.heads": 1, "context.key.alpha": 0.0, "context.key.beta": -100.0}
KEYED, PLAIN = Run(tiny_models, **{"context.reward": "key", **ANY}), Run(tiny_models, **ANY)


@functools.cache
def expected():
    """Losses of the tokens of each variant at the curriculum's end, float[B, V, H], and bool[B, H]."""
    state, keys = PLAIN.state(), jax.random.split(jax.random.key(3), 3)

    @jit
    @jax.vmap
    def look(tokens, key):
        window, params, recipe = split(tokens, horizon=4), PLAIN.params(), PLAIN.recipe
        shape = {"models": PLAIN.models, "context": recipe.context, "capacity": recipe.capacity}
        scored = score_variants(key, params, tokens, 16, state.hyper.high_lod_share, **shape)
        losses = jax.vmap(lambda one: nll.token_nll(PLAIN.models.base, params["base"], one, window.horizon))
        found = key_tokens.token_gain(PLAIN.models.base, params["base"], window, short=8)
        return losses(scored.entries), found.gain > 0

    return jax.device_get(look(batch()["tokens"], keys))


@functools.cache
def report(run):
    step = jit(functools.partial(held_out.eval_step, recipe=run.recipe, models=run.models))
    found = step(jax.random.key(3), run.state(), batch(), run.frozen())
    return {name: float(value) for name, value in found.items() if value.ndim == 0}


def test_variants_are_scored_on_key_tokens():
    _, is_key = expected()
    assert 0 < is_key.mean() < 1
    state, keys = KEYED.state(), jax.random.split(jax.random.key(3), 3)
    score = functools.partial(
        score_variants, models=KEYED.models, context=KEYED.recipe.context, capacity=KEYED.recipe.capacity, short=8
    )
    many = jit(jax.vmap(lambda tokens, key: score(key, KEYED.params(), tokens, 16, state.hyper.high_lod_share).nll))
    by_hand = [
        [row[key].mean() if key.any() else row.mean() for row in rows] for rows, key in zip(*expected(), strict=True)
    ]
    np.testing.assert_allclose(many(batch()["tokens"], keys), by_hand, rtol=1e-5)


@pytest.mark.slow
def test_losses_held_out_are_plain_whatever_is_rewarded_and_those_on_key_tokens_have_their_names():
    losses, is_key = expected()
    keyed, plain = report(KEYED), report(PLAIN)
    for name in ("nll_policy", "nll_baseline", "nll_rollout_mean", "nll_policy_key", "nll_baseline_key"):
        assert keyed[name] == pytest.approx(plain[name], rel=1e-5), name
    assert keyed["mc/adv_delta_mean"] != pytest.approx(plain["mc/adv_delta_mean"], rel=1e-3)
    assert keyed["nll_baseline"] == pytest.approx(losses[:, 0].mean(), rel=1e-5)
    assert keyed["nll_baseline_key"] == pytest.approx(losses[:, 0][is_key].mean(), rel=1e-5)
    assert keyed["key_token_share"] == pytest.approx(is_key.mean())


@pytest.mark.slow
def test_training_goes_on_with_it():
    state, found = KEYED.train_step(KEYED.state(step=3), batch(), KEYED.frozen())
    assert np.isfinite([float(found[name]) for name in ("loss", "grad_norm", "nll_baseline")]).all()
    assert int(state.step) == 4


@pytest.mark.slow
def test_episodes_are_rewarded_for_key_tokens():
    settings = OnlineConfig(steps=12, refocus_steps=2, episodes=2)
    states = {
        run: online.init_online_state(
            jax.random.key(0), recipe=run.recipe, settings=settings, models=run.models, params=run.params()
        )
        for run in (KEYED, PLAIN)
    }
    played = {
        run: jit(functools.partial(online.roll_out, recipe=run.recipe, settings=settings, models=run.models))(
            {**states[run][1], **states[run][0].params}, states[run][0], batch()
        )
        for run in (KEYED, PLAIN)
    }
    _, is_key = expected()
    first = jax.tree.map(lambda leaf: leaf[:, 0, 0], played[PLAIN].entries)
    window = split(batch()["tokens"], horizon=4)
    base, params = PLAIN.models.base, PLAIN.params()["base"]
    losses = jit(jax.vmap(lambda one, horizon: nll.token_nll(base, params, one, horizon)))(first, window.horizon)
    by_hand = [
        row[key].mean() if key.any() else row.mean() for row, key in zip(np.asarray(losses), is_key, strict=True)
    ]
    np.testing.assert_allclose(played[KEYED].nll[:, 0, 0], by_hand, rtol=1e-5)
    np.testing.assert_allclose(played[PLAIN].nll[:, 0, 0], losses.mean(axis=1), rtol=1e-5)
