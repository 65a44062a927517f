"""The phase of a run that trains GistNet through its base model, and where a GistNet begins beside a trained one."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lensjax.evaluation.held_out import mean_over_batches
from lensjax.models import Models, Params, gistnet
from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.engine import loop
from lensjax.training.steps import gists

CENTRE_BATCHES = 4
"""Batches of text whose tokens give the centre of scaled gists."""


def centred(config: Config, models: Models, params: dict[str, Params], *, seed: int) -> dict[str, Params]:
    """A fresh GistNet about the mean embedding of the text that a run trains on; others are as they were.

    Args:
      config: the run's.
      models: of its configuration.
      params: parameters of `base` and of a fresh `gist`.
      seed: chooses the windows, the same in every process.

    Returns:
      The parameters.
    """
    if config.gist.start != "scaled":
        return params
    some = data.fixed_batches(config, "train", batch_size=config.batch_size, count=CENTRE_BATCHES, seed=seed)
    means = [models.base.embed(params["base"], batch["tokens"].reshape(-1)).mean(axis=0) for batch in some]
    return {**params, "gist": gistnet.centred(params["gist"], jnp.stack(means))}


def phase(config: Config, models: Models, base: Params, validation: list[dict[str, Array]], key: Array) -> loop.Phase:
    """The phase.

    Args:
      config: the run's.
      models: of its configuration.
      base: parameters of the base model.
      validation: held-out batches.
      key: PRNG key of the cuts on which these are measured.
    """
    recipe, settings = config.recipe, config.gists
    measure = jax.jit(functools.partial(gists.gists_eval_step, recipe=recipe, settings=settings, models=models))
    keys = jax.random.split(key, len(validation))
    return loop.Phase(
        name="gists",
        steps=config.gists.steps,
        batch_size=config.batch_size,
        step=functools.partial(gists.gists_step, recipe=recipe, settings=settings, models=models),
        evaluate=lambda state: mean_over_batches(
            measure(one, {"base": base, **state.params}, batch) for one, batch in zip(keys, validation, strict=True)
        ),
        headline=("loss", "gists/nll", "gists/divergence"),
        monitor="loss",
    )
