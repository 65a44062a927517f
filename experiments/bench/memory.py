"""What a training step holds at its peak, beside the base model's parameters and the activations of its contexts.

    python -m experiments.bench.memory demo                                       as `experiments.train demo`
    python -m experiments.bench.memory --checkpoint.path models/SmolLM2-135M      the base model of a checkpoint

All are sizes that the compiler plans (`memory_analysis` of the compiled program) for shapes: nothing is computed, no
parameter allocated. The peak is arguments + results + temporaries - what results and arguments share. Activations are
temporaries and results of a program that does nothing but read the V contexts of each sequence with the base model,
forwards. The step is that of preferences, or of the teacher where a config has no others.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments import command
from experiments.bench.programs import horizon_logits
from experiments.process import errors_end
from experiments.train import load_preset
from lensjax.models import Params
from lensjax.models.decision import split
from lensjax.runs import pretrained
from lensjax.runs.config import Config
from lensjax.training.steps import distill, preference
from lensjax.training.steps.train_state import init_train_state
from lensjax.training.steps.update import Learner


@dataclass(frozen=True)
class Plan:
    """Bytes of a compiled program on its device."""

    arguments: int
    results: int
    temporaries: int
    shared: int
    """Results that are written where a donated argument was."""

    @property
    def peak(self) -> int:
        """What is there at once at most."""
        return self.arguments + self.results + self.temporaries - self.shared


def main(words: list[str] | None = None) -> None:
    """Command line: that of `experiments.train`."""
    with errors_end():
        given = sys.argv[1:] if words is None else words
        config, _ = command.parse(given, Config(), load_preset=load_preset, description=__doc__)
        console = Console()
        for name, value in measure(pretrained.resolve(config)).items():
            shown = f"{value:12.2f}" if name == "ratio" else f"{value / 2**20:12.1f} MiB"
            console.out(f"  {name:<14}{shown}", highlight=False)


def measure(config: Config) -> dict[str, float]:
    """Bytes by name; `ratio` is that of the step's peak to the base model's parameters and the activations.

    Args:
      config: of a run that is resolved (`lensjax.runs.pretrained`).

    Returns:
      `base`, `state`, `activations`, `temporaries`, `peak`, `ratio`.
    """
    recipe, models = config.recipe, config.build_models()
    static: dict[str, Any] = {"recipe": recipe, "models": models}
    state, frozen = jax.eval_shape(functools.partial(init_train_state, **static), jax.random.key(0))
    if "base" in frozen:
        frozen = {**frozen, "base": _as_loaded(frozen["base"], config)}
    params = {**frozen, **state.params}
    batch = {"tokens": jax.ShapeDtypeStruct((config.batch_size, config.context.window), jnp.int32)}
    scored = jax.eval_shape(functools.partial(preference.score_batch, **static), params, state, batch)
    horizons = jax.eval_shape(lambda tokens: split(tokens, horizon=config.context.horizon).horizon, batch["tokens"])
    read = plan(functools.partial(horizon_logits, models.base), params["base"], scored.entries, horizons)
    train_step: Callable[..., Any] = functools.partial(preference.train_step, **static)
    learner: Learner = state
    if not config.steps:
        train_step = functools.partial(distill.distill_step, settings=config.distill, **static)
        start = functools.partial(distill.init_distill_state, recipe=recipe)
        learner, frozen = jax.eval_shape(lambda key, params: start(key, params=params), jax.random.key(0), params)
    step = plan(train_step, learner, batch, frozen, donate=0)
    base, activations = size(params["base"]), read.temporaries + read.results
    return {
        "base": base,
        "state": size(learner),
        "activations": activations,
        "temporaries": step.temporaries,
        "peak": step.peak,
        "ratio": step.peak / (base + activations),
    }


def plan(function: Callable[..., Any], *shapes: Any, donate: int | None = None) -> Plan:
    """The plan of a function for arguments of these shapes, of which one may be donated."""
    donated = () if donate is None else (donate,)
    found = jax.jit(function, donate_argnums=donated).lower(*shapes).compile().memory_analysis()
    assert found is not None
    return Plan(
        arguments=found.argument_size_in_bytes,
        results=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        shared=found.alias_size_in_bytes,
    )


def size(tree: Any) -> int:
    """Bytes of arrays, or of what has their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _as_loaded(base: Params, config: Config) -> Params:
    """The shapes of a base model as a checkpoint gives them: matrices in its dtype, vectors in float32."""
    kind = jnp.dtype(config.checkpoint.dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind if leaf.ndim > 1 else leaf.dtype), base)


if __name__ == "__main__":
    main()
