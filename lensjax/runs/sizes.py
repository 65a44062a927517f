"""Whether a run fits into memory: the shapes of its phases, before anything is read, allocated or written."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lensjax import _settings
from lensjax.models import HyperLoRAModel, Models
from lensjax.runs.config import Config
from lensjax.runs.engine import memory
from lensjax.training.steps import adaptation, distill, gists, online, preference, pretrain
from lensjax.training.steps.train_state import init_train_state

HELD_OUT = 2
"""Splits whose batches are in memory while a run lasts: validation and test."""
ADVICE = "the sizes of base, gist and lens, batch_size, eval_batches, context.window or context.rollouts"

_Program = tuple[str, int, Any, Callable[..., Any]]
"""Name and batch size of a phase, shapes of its state and of what is frozen, and its step."""


def require_room(config: Config, models: Models, hypernet: HyperLoRAModel | None, *, devices: int) -> None:
    """Checks that each phase of a run has room.

    Args:
      config: the run, resolved (`lensjax.runs.pretrained`).
      models: its models.
      hypernet: what adapts LensNet, where it is trained.
      devices: how many share a batch.

    Raises:
      ValueError: a phase takes more memory than there is; says what takes how much.
    """
    # Most runs of a process are of one shape, and to trace their steps takes a second.
    _require_room(replace(config, seed=0, output_dir="-"), models, hypernet, devices)


@functools.cache
def _require_room(config: Config, models: Models, hypernet: HyperLoRAModel | None, devices: int) -> None:
    example = config.context.window * jnp.dtype(jnp.int32).itemsize
    flat = _settings.replace(
        config, **{f"{part}.layers": min(getattr(config, part).layers, 2) for part in ("base", "gist", "lens")}
    )
    # One layer's products are as large as another's, and each layer takes time to trace.
    flat_models = models if flat == config else flat.build_models()
    flat_hypernet = hypernet if flat == config else flat.build_hypernet(flat_models)
    whole, traced = _programs(config, models, hypernet), _programs(flat, flat_models, flat_hypernet)
    for (name, batch_size, (state, frozen), _), (_, _, (flat_state, flat_frozen), step) in zip(
        whole, traced, strict=True
    ):
        batch = {"tokens": jax.ShapeDtypeStruct((batch_size, config.context.window), jnp.int32)}
        memory.require_room(
            state,
            batch,
            frozen,
            phase=name,
            activations=functools.partial(memory.largest_product, step, flat_state, batch, flat_frozen),
            held_out=HELD_OUT * config.eval_batches * config.batch_size * example,
            devices=devices,
            split=config.shard_parameters,
            advice=ADVICE,
        )


def _programs(config: Config, models: Models, hypernet: HyperLoRAModel | None) -> Iterator[_Program]:
    """The phases of a run, as `lensjax.runs.fit` trains them."""
    recipe, size, key = config.recipe, config.batch_size, jax.random.key(0)
    static: dict[str, Any] = {"recipe": recipe, "models": models}

    def shapes(start: Callable[..., Any], **more: Any) -> Any:
        return jax.eval_shape(functools.partial(start, recipe=recipe, **more), key)

    if config.pretrains:
        of = static | {"settings": config.pretrain}
        started = shapes(pretrain.init_pretrain_state, models=models, settings=config.pretrain)
        yield "pretrain", config.pretrain.batch_size, started, functools.partial(pretrain.pretrain_step, **of)
    if not config.trains_lens:
        return
    parts = {name: jax.eval_shape(getattr(models, name).init, key) for name in ("base", "gist", "lens")}
    if config.checkpoint.path is not None:
        parts["base"] = jax.tree.map(functools.partial(_as_loaded, dtype=config.checkpoint.dtype), parts["base"])

    def from_parts(start: Callable[..., Any], **more: Any) -> Any:
        return jax.eval_shape(lambda params: start(key, recipe=recipe, params=params, **more), parts)

    if config.gists.steps:
        of = static | {"settings": config.gists}
        yield (
            "gists",
            size,
            from_parts(gists.init_gists_state, lora_rank=config.gists.lora_rank),
            functools.partial(gists.gists_step, **of),
        )
    if config.distill.steps:
        of = static | {"settings": config.distill}
        yield "distill", size, from_parts(distill.init_distill_state), functools.partial(distill.distill_step, **of)
    if config.steps and hypernet is None:
        started = from_parts(init_train_state, models=models)
        yield "lens", size, started, functools.partial(preference.train_step, **static)
    if config.steps and hypernet is not None:
        of = static | {"hypernet": hypernet}
        started = from_parts(adaptation.init_adaptation_state, models=models, hypernet=hypernet)
        yield "lens", size, started, functools.partial(adaptation.adaptation_step, **of)
    if config.online.steps:
        of = static | {"settings": config.online}
        started = from_parts(online.init_online_state, models=models, settings=config.online)
        yield "online", size, started, functools.partial(online.online_step, **of)


def _as_loaded(leaf: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    """A parameter as a checkpoint gives it: matrices in its dtype, vectors in float32."""
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if leaf.ndim > 1 else leaf.dtype)
