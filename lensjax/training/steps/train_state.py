"""What moves during LensNet training, and what a step knows of those before it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax.models import Models, Params
from lensjax.training import adversary, stages
from lensjax.training.adversary import RegretHead
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.objective import Statistics
from lensjax.training.optim import moving, schedules
from lensjax.training.optim.ladder import Ladder, init_ladder
from lensjax.training.optim.moving import EmaMoments
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch
from lensjax.training.steps.update import Learner, init_learner, split_parts
from lensjax.training.terms.advantages import informative_share


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState(Learner):
    """Everything that moves during training, and the hyperparameters, so that one `vmap` runs many settings.

    Example:
      >>> import functools, jax, lensjax as lx
      >>> config = lx.Config()
      >>> init = functools.partial(lx.init_train_state, recipe=config.recipe, models=config.build_models())
      >>> state, frozen = jax.eval_shape(init, jax.random.key(0))
      >>> sorted(state.params), sorted(frozen), state.hyper.margin.dtype
      (['lens'], ['base', 'gist'], dtype('float32'))
    """

    normaliser: EmaMoments
    """Moving moments of the advantage deltas."""
    anchor: Params | None
    """The anchor policy's parameters; None when the KL term is off."""
    demand: EmaMoments
    """Moving moments of the net demand for detail."""
    hyper: Hyperparameters
    """float32[] each."""
    ladder: Ladder | None
    """Level of the self-play curriculum; None with the fixed one."""
    head: RegretHead | None
    """What the adversary expects; None where none proposes rollouts."""


def init_train_state(
    key: Array,
    *,
    recipe: Recipe,
    models: Models,
    params: dict[str, Params] | None = None,
    tx: optax.GradientTransformation | None = None,
) -> tuple[TrainState, dict[str, Params]]:
    """A state before the first step, of the parts that are trained; the others stay beside it, frozen.

    Args:
      key: PRNG key, consumed.
      recipe: its `hyper` becomes arrays.
      models: each draws its own parameters.
      params: parameters of any of `base`, `gist`, `lens` to start from, and of further parts that `recipe.trainable`
        names; of the three, those that are missing are drawn. What is trained is copied, what is frozen is not.
      tx: the optimizer, as for `train_step`.

    Returns:
      `TrainState` at step 0 with parameters of `recipe.trainable`, and parameters of the other parts, for the steps.

    Raises:
      ValueError: a trainable part has no parameters, or `params` has a part that nothing trains or reads.

    Example:
      >>> import jax, lensjax as lx
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), lens=lx.LensConfig(dim=16, layers=1))
      >>> recipe, models = config.recipe, config.build_models()
      >>> state, frozen = lx.init_train_state(jax.random.key(0), recipe=recipe, models=models)
      >>> int(state.step), list(state.params), list(frozen)
      (0, ['lens'], ['base', 'gist'])
    """
    start = params or {}
    drawn = {"base": models.base.init, "gist": models.gist.init, "lens": models.lens.init}
    run_key, *part_keys = jax.random.split(key, 1 + len(drawn))
    if unknown := set(start) - set(drawn) - set(recipe.trainable):
        raise ValueError(f"params may hold {', '.join(drawn)} and trainable parts, got {', '.join(sorted(unknown))}")
    if missing := set(recipe.trainable) - set(drawn) - set(start):
        raise ValueError(f"params must hold {', '.join(sorted(missing))}, which recipe.trainable names")
    fresh = {
        name: init(part_key)
        for (name, init), part_key in zip(drawn.items(), part_keys, strict=True)
        if name not in start
    }
    trained, frozen = split_parts({**start, **fresh}, recipe.trainable)
    state = TrainState(
        **vars(init_learner(run_key, trained, tx=make_optimizer(recipe.optimizer) if tx is None else tx)),
        normaliser=moving.init_moments(),
        anchor=moving.init_anchor((trained | frozen)["lens"]) if recipe.has_anchor else None,
        demand=moving.init_moments(),
        hyper=jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), recipe.hyper),
        ladder=init_ladder(recipe.curriculum.levels) if recipe.curriculum.climbs else None,
        head=adversary.init_head(models) if recipe.context.proposed_rollouts else None,
    )
    return state, frozen


def sequence_keys(state: Learner, batch: Batch) -> Array:
    """The key of each sequence in the next step, [B]."""
    return jax.random.split(jax.random.fold_in(state.key, state.step), batch["tokens"].shape[0])


def objective_key(key: Array) -> Array:
    """Randomness of the objective in a step with this key, whose `split` the sequences of the batch take."""
    # `fold_in` with a small number would give the key of a sequence.
    return jax.random.fold_in(key, 2**31 - 1)


def statistics(state: TrainState, *, recipe: Recipe) -> Statistics:
    """What the objective knows of the steps before this one."""
    second = stages.second_stage(state.hyper.stage_boundary, recipe.steps)
    return Statistics(
        state.normaliser,
        state.demand,
        temperature(state, recipe=recipe),
        informative_share=informative_share(state.step, state.hyper, settings=recipe.objective, steps=recipe.steps),
        is_second=None if recipe.objective.stages == "one" else state.step >= second,
    )


def temperature(state: TrainState, *, recipe: Recipe) -> Array:
    """Temperature of the step; float32[]."""
    return schedules.linear(
        state.step, start=state.hyper.temperature, end=state.hyper.temperature_end, steps=recipe.steps
    )
