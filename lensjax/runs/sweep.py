"""Many settings and seeds of one run in one compiled program: the arms of a sweep are a batch axis.

What `Hyperparameters` holds differs from arm to arm as data. Arms that draw the same rollouts (same seed, same lengths,
same share of LOD 2) read the same scored variants: the base model's passes are paid once for all of them. Where the
policy draws rollouts itself, or its success decides how hard they are, only arms that are the same run share them. With
several devices each takes some of the arms, and nothing passes between them.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lensjax._settings import require, shown
from lensjax.evaluation import held_out
from lensjax.models import Models, Params
from lensjax.runs.config import Config
from lensjax.runs.engine import devices
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.metrics import Metrics
from lensjax.training.recipe import COMPILED, Recipe
from lensjax.training.scoring import Batch, ScoredVariants
from lensjax.training.steps import preference
from lensjax.training.steps.train_state import TrainState, init_train_state

Setting = dict[str, Any]
"""Changed fields of a config by dotted name; empty for the default."""
ROLLOUT_SETTINGS = ("context_start", "context_end", "high_lod_share")
"""What decides, beside the seed, which rollouts an arm draws; where the policy has a say, every hyperparameter does."""
_OWN = {"seed", "output_dir", "base_run"}


@dataclass(frozen=True)
class Sweep:
    """Which settings to compare; the preset with `changes` is the default, and the first of them."""

    preset: str
    """Name or path of a config, as for `python -m experiments.train`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What the default itself changes in the preset."""
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    one_at_a_time: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Each value of each field alone."""
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Every combination of values."""
    together: Sequence[Setting] = ()
    """Settings that change several fields at once."""

    def __post_init__(self) -> None:
        """Makes plain Python of what is given, which is written as JSON.

        Raises:
          ValueError: a field is not what it must be; names it, and the field of the configuration.
        """
        plain = {
            "preset": str(self.preset),
            "changes": _setting("changes", self.changes),
            "seeds": tuple(map(_seed, _several("seeds", self.seeds))),
            "one_at_a_time": _choices("one_at_a_time", self.one_at_a_time),
            "grid": _choices("grid", self.grid),
            "together": tuple(_setting("together", one) for one in _several("together", self.together)),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def settings(self) -> list[Setting]:
        """All settings, the default first, none twice.

        Raises:
          ValueError: a seed comes twice or not at all.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must name one or more different seeds, got {self.seeds}")
        settings: list[Setting] = [{}]
        settings += [{name: value} for name, values in self.one_at_a_time.items() for value in values]
        if self.grid:
            settings += [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        settings += [dict(setting) for setting in self.together]
        return [setting for i, setting in enumerate(settings) if setting not in settings[:i]]


def _setting(name: str, setting: Any) -> Setting:
    """Fields of a configuration by their dotted names."""
    is_one = isinstance(setting, Mapping) and all(isinstance(key, str) for key in setting)
    require(is_one, f"{name} of a sweep must give values by the names of fields, got {shown(setting)}")
    taken = sorted(_OWN & set(setting))
    require(not taken, f"{name} of a sweep cannot change {', '.join(taken)}, which the sweep itself gives each arm")
    return {str(key): _plain(value) for key, value in setting.items()}


def _choices(name: str, choices: Any) -> dict[str, tuple[Any, ...]]:
    found = {key: _several(f"{name} of {key}", values) for key, values in _setting(name, choices).items()}
    for key, values in found.items():
        require(bool(values), f"{name} of {key} must name one or more values, got none")
    return found


def _several(name: str, values: Any) -> tuple[Any, ...]:
    values = _plain(values)
    require(isinstance(values, list | tuple), f"{name} must be a sequence of values, got {shown(values)}")
    return tuple(map(_plain, values))


def _seed(seed: Any) -> int:
    require(type(seed) is int, f"seeds must be whole numbers, got {shown(seed)}")
    return int(seed)


def _plain(value: Any) -> Any:
    """Numbers of numpy as those of Python, and its arrays as lists of them."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value.tolist()
    return list(value) if isinstance(value, range) else value


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SweepState:
    """A arms of S seeds, which read R different draws of rollouts."""

    arms: TrainState
    """Leading axis A."""
    draw: Array
    """int32[A]: which of the draws each arm reads."""
    reader: Array
    """int32[R]: an arm that reads each draw."""
    row: Array
    """int32[R]: the row of the batch, one a seed, that each draw is of."""


def program(configs: Sequence[Config]) -> Recipe:
    """The recipe that all arms of one program share.

    Its hyperparameters only decide what is compiled in: the longest context of any arm, and each of what they can leave
    out (`recipe.COMPILED`) if any arm has it.

    Args:
      configs: the arms; they may differ in seed, output folder and hyperparameters.

    Returns:
      A `Recipe`.

    Raises:
      ValueError: there is no arm, they differ in what is compiled, or they train more than LensNet.
    """
    if not configs:
        raise ValueError("a sweep needs at least one arm, got none")
    first = configs[0]
    if len({structure(config) for config in configs}) > 1:
        raise ValueError("the arms of one program may differ in seed and hyperparameters only: split them up")
    if first.trainable != ("lens",):
        raise ValueError(f"a sweep trains LensNet alone, on one frozen base model; got trainable {first.trainable}")
    largest = {
        name: max(getattr(config.hyper, name) for config in configs)
        for name in ("context_start", "context_end", *COMPILED)
    }
    shared = structure(first).recipe
    return replace(shared, hyper=replace(shared.hyper, **largest))


def structure(config: Config) -> Config:
    """What arms must have in common to run in one program: all but seed, output folder and hyperparameters."""
    return replace(config, seed=0, output_dir="-", hyper=Hyperparameters())


def init(
    configs: Sequence[Config],
    keys: Mapping[int, Array],
    *,
    recipe: Recipe,
    models: Models,
    params: dict[str, Params],
) -> tuple[SweepState, dict[str, Params]]:
    """The arms before their first step; each begins as a run of its own does.

    Args:
      configs: the A arms.
      keys: for each of their seeds, in the order of the batch's rows, the key of `init_train_state`.
      recipe: `program(configs)`.
      models: static.
      params: parameters of `base` and `gist`, and of `lens` where the arms do not start from fresh ones.

    Returns:
      `SweepState`; and parameters of `base` and `gist`, which all arms share, as they are.
    """
    fresh = {seed: init_train_state(key, recipe=recipe, models=models, params=params)[0] for seed, key in keys.items()}
    arms = [replace(fresh[arm.seed], hyper=jax.tree.map(jnp.float32, arm.hyper)) for arm in configs]
    draws = [_draw(arm) for arm in configs]
    different = list(dict.fromkeys(draws))
    rows = list(keys)
    state = SweepState(
        arms=jax.tree.map(lambda *leaves: jnp.stack(leaves), *arms),
        draw=jnp.asarray([different.index(draw) for draw in draws], jnp.int32),
        reader=jnp.asarray([draws.index(draw) for draw in different], jnp.int32),
        row=jnp.asarray([rows.index(int(draw[0])) for draw in different], jnp.int32),
    )
    return state, {name: params[name] for name in ("base", "gist")}


def _draw(config: Config) -> tuple[float, ...]:
    """What an arm has in common with those that draw the same rollouts, the seed first."""
    # What a policy draws depends on what it has learned, and so on all that it learns with.
    every = [item.name for item in dataclasses.fields(Hyperparameters)]
    names = every if config.recipe.draws_by_policy else ROLLOUT_SETTINGS
    return (config.seed, *(getattr(config.hyper, name) for name in names))


def split(configs: Sequence[Config], parts: int) -> list[list[int]]:
    """Which arms each of some devices takes: equally many, those that read the same rollouts side by side.

    Args:
      configs: the arms.
      parts: devices.

    Returns:
      Places in `configs`, a list a device; where the number does not divide, the last arm comes more than once.
    """
    draws = [_draw(arm) for arm in configs]
    order = sorted(range(len(configs)), key=lambda place: draws.index(draws[place]))
    size = math.ceil(len(configs) / parts)
    order += order[-1:] * (size * parts - len(order))
    return [order[first : first + size] for first in range(0, len(order), size)]


def stack(states: Sequence[SweepState], mesh: Mesh) -> SweepState:
    """The states of as many devices as one, for functions of `devices.on_each`; leading axis: the device."""
    most = max(len(state.row) for state in states)

    def padded(state: SweepState) -> SweepState:
        # Devices run one program: those with fewer draws repeat one, which no arm reads.
        missing = (0, most - len(state.row))
        return replace(
            state, reader=jnp.pad(state.reader, missing, mode="edge"), row=jnp.pad(state.row, missing, mode="edge")
        )

    return devices.deal([padded(state) for state in states], mesh)


def step(
    state: SweepState,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    models: Models,
    at_once: int | None = None,
) -> tuple[SweepState, Metrics]:
    """One update of every arm; compile it once, with the state donated.

    Args:
      state: the state before the step.
      batch: `tokens` int32[S, B, T], one batch a seed.
      frozen: parameters of `base` and `gist`.
      recipe: `program` of the arms.
      models: static.
      at_once: arms that are computed together, by `vmap`; the others wait in the same program. None takes one after the
        other, which is the faster on a CPU, whose cores one arm keeps busy, and gives the numbers of a run of its own.

    Returns:
      The next state, and the metrics of `train_step`, each float32[A].
    """

    def score(one: tuple[Array, Array]) -> ScoredVariants:
        arm = jax.tree.map(lambda leaf: leaf[one[0]], state.arms)
        params = {**frozen, **arm.params} if recipe.context.asks_policy else frozen
        return preference.score_batch(params, arm, {"tokens": batch["tokens"][one[1]]}, recipe=recipe, models=models)

    scored = jax.lax.map(score, (state.reader, state.row), batch_size=at_once)

    def update(one: tuple[TrainState, Array]) -> tuple[TrainState, Metrics]:
        read = jax.tree.map(lambda leaf: leaf[one[1]], scored)
        return preference.lens_step(one[0], read, recipe=recipe, models=models)

    arms, metrics = jax.lax.map(update, (state.arms, state.draw), batch_size=at_once)
    return replace(state, arms=arms), metrics


def evaluate(
    state: SweepState,
    batch: Batch,
    key: Array,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    models: Models,
    at_once: int | None = None,
) -> Metrics:
    """`held_out.eval_step` of every arm on one held-out batch, each value float32[A]."""

    def one(arm: TrainState) -> Metrics:
        return held_out.eval_step(key, arm, batch, frozen, recipe=recipe, models=models)

    return jax.lax.map(one, state.arms, batch_size=at_once)
