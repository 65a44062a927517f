"""The steps lower for GPUs and TPUs, on a machine that has neither: `jax.export` checks every operation they use.

Lowering is not compiling: that a program fits a device, and what it takes there, only the device's compiler tells.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import export

from lensjax.session import Session
from lensjax.session.history import Found
from lensjax.training.steps import distill, gists, online, preference, pretrain
from lensjax.training.steps.gists import GistTrainingConfig
from lensjax.training.steps.online import OnlineConfig
from lensjax.training.steps.pretrain import PretrainConfig
from lensjax.training.steps.train_state import init_train_state
from lensjax.training.teachers import DistillConfig
from tests import lowered
from tests.small import FULL, HALF_PRECISION, OMITTING, Run, batch

pytestmark = pytest.mark.slow

PLATFORMS = ("cuda", "tpu")
KEY = jax.random.key(0)


def by_preferences(run: Run):
    step = functools.partial(preference.train_step, recipe=run.recipe, models=run.models)
    return step, init_train_state(KEY, recipe=run.recipe, models=run.models)


def by_next_tokens(run: Run):
    static = {"recipe": run.recipe, "settings": PretrainConfig(steps=9, rollout_weight=1.0), "models": run.models}
    return functools.partial(pretrain.pretrain_step, **static), pretrain.init_pretrain_state(KEY, **static)


def of_gists(run: Run):
    static = {"recipe": run.recipe, "settings": GistTrainingConfig(steps=9), "models": run.models}
    step = functools.partial(gists.gists_step, **static)
    return step, gists.init_gists_state(KEY, recipe=run.recipe, params=run.params())


def by_teacher(run: Run):
    static = {"recipe": run.recipe, "settings": DistillConfig(steps=9, looks=2), "models": run.models}
    step = functools.partial(distill.distill_step, **static)
    return step, distill.init_distill_state(KEY, recipe=run.recipe, params=run.params())


def by_episodes(run: Run):
    static = {"recipe": run.recipe, "settings": OnlineConfig(steps=9), "models": run.models}
    step = functools.partial(online.online_step, **static)
    return step, online.init_online_state(KEY, params=run.params(), **static)


@pytest.mark.parametrize(
    ("make", "run"),
    [
        (by_preferences, FULL),
        (by_preferences, HALF_PRECISION),
        (by_next_tokens, FULL),
        (by_next_tokens, HALF_PRECISION),
        (of_gists, OMITTING),
        (by_teacher, OMITTING),
        (by_episodes, FULL),
    ],
)
def test_a_step_lowers_for_accelerators(make, run):
    step, (state, frozen) = make(run)
    shapes = jax.eval_shape(lambda *leaves: leaves, state, batch(), frozen)
    # The gradient of bfloat16 attention mixes dtypes inside JAX.
    with jax.numpy_dtype_promotion("standard"):
        exported = export.export(jax.jit(step, donate_argnums=0), platforms=PLATFORMS)(*shapes)
    assert exported.platforms == PLATFORMS
    after = jax.tree.unflatten(exported.out_tree, exported.out_avals)[0]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes[0])
    ]


@pytest.mark.parametrize("make", [by_preferences, by_next_tokens])
@pytest.mark.parametrize(("kernel", "platform"), [("cudnn", "cuda"), ("splash", "tpu")])
def test_a_step_calls_the_fused_kernel(make, kernel, platform):
    def fused(config):
        models = config.build_models()
        base, lens = (replace(model, kernel=kernel) for model in (models.base, models.lens))
        return replace(models, base=base, lens=lens)

    run = Run(fused, dtype="bfloat16", trainable=("base", "gist", "lens"), **{"base.layers": 2})
    with lowered.as_if_there_were_cudnn(), jax.numpy_dtype_promotion("standard"):
        step, (state, frozen) = make(run)
        shapes = jax.eval_shape(lambda *leaves: leaves, state, batch(), frozen)
        calls = lowered.custom_calls(step, *shapes, platform=platform)
    # By preferences the base model's last layer is asked for a few rows alone, and LensNet's only one for all; next
    # tokens are read from whole windows and from rollouts.
    layers = {by_preferences: 2, by_next_tokens: 4}[make]
    if kernel == "cudnn":
        assert calls == dict.fromkeys(lowered.CUDNN, layers)
    else:  # one kernel forward and two for the gradient; layers of one shape share them
        assert calls["tpu_custom_call"] == 3 * 2


@pytest.mark.parametrize("run", [FULL, OMITTING])
def test_a_session_lowers_for_accelerators(run):
    session = Session(run.models, run.params(), run.config.session)
    shapes = jax.eval_shape(session.steps.init, jax.random.key(0))
    count, interval = jax.ShapeDtypeStruct((), jnp.int32), session.config.interval
    chunk = jax.ShapeDtypeStruct((interval,), jnp.int32)
    held = jax.ShapeDtypeStruct((session.config.geometry.history + interval,), jnp.int32)
    rows = len(shapes.context.start)
    found = Found(
        jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows, run.models.base.dim), jnp.float32)
    )
    for function, inputs in (
        (session._read, (chunk, count)),
        (session._decide, (held if session.steps.reads_base else None,)),
        (session._show, (found,)),
    ):
        exported = export.export(function, platforms=PLATFORMS)(session.params, shapes, *inputs)
        assert exported.platforms == PLATFORMS
