"""How hard the variants of a step are: how long a working context is, and how much of it high gists may take.

The fixed curriculum goes with the step, the ladder of self-play with its level; both go from the same mildest to the
same hardest. What a task can make harder, such as how far back the answer lies, is a matter of its data.
"""

from collections.abc import Mapping

from jax import Array
from jax.typing import ArrayLike

from lensjax.training import adversary
from lensjax.training.adversary import RegretHead
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim import schedules
from lensjax.training.optim.ladder import Ladder, update_ladder
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ScoredVariants


def current_length(step: ArrayLike, hyper: Hyperparameters, *, recipe: Recipe) -> Array:
    """Entries of every working context at a step of the fixed curriculum, int32[]."""
    steps = recipe.optimizer.curriculum_steps
    return _length(step, recipe.steps // 2 if steps is None else steps, hyper, recipe)


def of_step(
    step: ArrayLike, hyper: Hyperparameters, ladder: Ladder | None, *, recipe: Recipe
) -> tuple[Array, ArrayLike]:
    """Entries of every working context, int32[], and the share of high levels, float32[], in the next step.

    Args:
      step: int32[].
      hyper: both ends of the length, and the share at the mildest level.
      ladder: its level decides; None leaves it to the step.
      recipe: curriculum and geometry.
    """
    if ladder is None:
        return current_length(step, hyper, recipe=recipe), hyper.high_lod_share
    levels = recipe.curriculum.levels
    start, end = hyper.high_lod_share, hardest_share(hyper, recipe)
    share = schedules.linear(ladder.level, start=start, end=end, steps=levels)
    return _length(ladder.level, levels, hyper, recipe), share


def climb(
    ladder: Ladder | None, report: Mapping[str, Array], hyper: Hyperparameters, *, recipe: Recipe
) -> Ladder | None:
    """The ladder after a step with this report, which says how often the policy was right; None without one."""
    if ladder is None:
        return None
    return update_ladder(
        ladder,
        report["mc/preference_success"],
        report["mc/preference_success_count"] > 0,
        target=hyper.success_target,
        beta=hyper.success_beta,
        patience=recipe.curriculum.patience,
    )


def learn_regrets(
    head: RegretHead | None, scored: ScoredVariants, *, recipe: Recipe
) -> tuple[RegretHead | None, dict[str, Array]]:
    """The adversary after a batch, and what the policy regrets in it, by name; nothing without an adversary."""
    if head is None or scored.features is None:
        return head, {}
    proposed = recipe.context.proposed_rollouts
    return adversary.take_in(head, scored.features, scored.nll[:, 1:], scored.distinct[:, 1:], proposed=proposed)


def hardest_share(hyper: Hyperparameters, recipe: Recipe) -> ArrayLike:
    """The share of high levels at the curriculum's end, float32[]: what is measured on held-out data."""
    share = recipe.curriculum.high_lod_share
    return hyper.high_lod_share if share is None else share


def _length(place: ArrayLike, places: int, hyper: Hyperparameters, recipe: Recipe) -> Array:
    return schedules.context_length(
        place,
        start=hyper.context_start,
        end=hyper.context_end,
        steps=places,
        geometry=recipe.geometry,
        capacity=recipe.capacity,
    )
