import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import _settings
from lensjax.runs import sweep
from lensjax.runs.engine import devices
from lensjax.training.recipe import Recipe
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import init_train_state
from tests.small import SMALL, batch, jit

STEPS = 50
DEFAULT = _settings.replace(SMALL, steps=STEPS)
SETTINGS = (
    {},
    {"hyper.temperature": 0.5, "hyper.learning_rate": 3e-3, "hyper.margin": 0.4},
    {"hyper.kl_weight": 0.5, "hyper.smooth_weight": 0.2, "hyper.adv_norm_beta": 0.5},
    {"hyper.context_end": 0.7},
)
SEEDS = (3, 8)
ARMS = [_settings.replace(DEFAULT, seed=seed, **changes) for changes in SETTINGS for seed in SEEDS]
KEYS = {seed: jax.random.key(seed) for seed in SEEDS}
PROGRAM = sweep.program(ARMS)


@functools.cache
def models():
    return DEFAULT.build_models()


@functools.cache
def params():
    return {name: getattr(models(), name).init(jax.random.key(i)) for i, name in enumerate(("base", "gist"))}


def tokens_of(seed, step):
    return batch(100 * seed + step)["tokens"]


def start():
    state, frozen = sweep.init(ARMS, KEYS, recipe=PROGRAM, models=models(), params=params())
    assert all(frozen[name] is part for name, part in params().items())
    return state


@functools.cache
def swept():
    """The arms after all their steps, and the metrics of each step, [A]."""
    step = jit(functools.partial(sweep.step, recipe=PROGRAM, models=models()), donate_argnums=0)
    state, reports = start(), []
    for index in range(STEPS):
        state, report = step(state, {"tokens": jnp.stack([tokens_of(seed, index) for seed in SEEDS])}, params())
        reports.append(jax.device_get(report))
    assert step._cache_size() == 1
    return state, reports


def arm_of(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state.arms)


@pytest.mark.slow
@pytest.mark.parametrize("index", [5, 6])
def test_an_arm_is_a_run_of_its_own(index):
    config = ARMS[index]
    step = jit(functools.partial(preference.train_step, recipe=config.recipe, models=models()), donate_argnums=0)
    state, _ = init_train_state(KEYS[config.seed], recipe=config.recipe, models=models(), params=params())
    swept_state, reports = swept()
    for done in range(STEPS):
        state, alone = step(state, {"tokens": tokens_of(config.seed, done)}, params())
        for name, value in alone.items():
            np.testing.assert_allclose(
                reports[done][name][index], value, atol=1e-6, rtol=1e-6, err_msg=f"{name} {done}"
            )
    for mine, theirs in zip(
        jax.tree.leaves(arm_of(swept_state, index).params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.slow
def test_settings_make_a_difference_and_seeds_too():
    _, reports = swept()
    losses = reports[-1]["mc/lens_loss"]
    assert len(set(losses.tolist())) == len(ARMS)


@pytest.mark.slow
def test_arms_computed_together_are_the_same_up_to_rounding():
    step = jit(functools.partial(sweep.step, recipe=PROGRAM, models=models(), at_once=8), donate_argnums=0)
    _, reports = swept()
    _, report = step(start(), {"tokens": jnp.stack([tokens_of(seed, 0) for seed in SEEDS])}, params())
    for name, values in report.items():
        np.testing.assert_allclose(values, reports[0][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_arms_that_draw_the_same_rollouts_share_them():
    state = start()
    assert state.reader.tolist() == [0, 1, 6, 7]  # two seeds, and both once more for the other length
    assert state.draw.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    assert state.row.tolist() == [0, 1, 0, 1]
    assert set(state.arms.params) == {"lens"}


def test_devices_take_equally_many_arms_that_read_the_same():
    seeds = [arm.seed for arm in ARMS]
    assert seeds == [3, 8] * 4
    assert sweep.split(ARMS, 2) == [[0, 2, 4, 1], [3, 5, 6, 7]]
    assert sweep.split(ARMS, 3) == [[0, 2, 4], [1, 3, 5], [6, 7, 7]]
    assert sweep.split(ARMS, 1) == [[0, 2, 4, 1, 3, 5, 6, 7]]


def test_the_states_of_several_devices_have_one_shape():
    parts = sweep.split(ARMS, 3)
    states = [
        sweep.init([ARMS[i] for i in part], KEYS, recipe=PROGRAM, models=models(), params=params())[0] for part in parts
    ]
    assert [state.row.tolist() for state in states] == [[0], [1], [0, 1]]
    stacked = sweep.stack(states, jax.make_mesh((1,), (devices.AXIS,)))
    assert stacked.row.tolist() == [[0, 0], [1, 1], [0, 1]]
    assert stacked.reader.tolist() == [[0, 0], [0, 0], [0, 1]]
    assert stacked.draw.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 1]]


def test_the_initial_state_of_an_arm_is_that_of_its_run():
    state = start()
    for index, config in enumerate(ARMS):
        alone, _ = init_train_state(KEYS[config.seed], recipe=PROGRAM, models=models(), params=params())
        alone = replace(alone, hyper=jax.tree.map(jnp.float32, config.hyper))
        jax.tree.map(np.testing.assert_array_equal, replace(arm_of(state, index), key=None), replace(alone, key=None))


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "a sweep needs at least one arm, got none"),
        (
            [DEFAULT, _settings.replace(DEFAULT, batch_size=4)],
            "may differ in seed and hyperparameters only: split them up",
        ),
        (
            [_settings.replace(DEFAULT, trainable=("base", "lens"))],
            r"one frozen base model; got trainable \('base', 'lens'\)",
        ),
    ],
)
def test_arms_that_do_not_fit_one_program_are_refused(arms, message):
    with pytest.raises(ValueError, match=message):
        sweep.program(arms)


def test_the_program_is_wide_enough_for_every_arm():
    assert PROGRAM.hyper.kl_weight == 0.5
    assert PROGRAM.capacity == max(config.capacity for config in ARMS)
    assert type(PROGRAM) is Recipe
