"""Self-play curriculum: a ladder of levels of difficulty, climbed and descended so that success stays near a target."""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Bound, PositiveInt, Share, require, settings


@settings("curriculum")
class CurriculumConfig:
    """How hard the variants of a step are.

    Example:
      >>> import lensjax as lx
      >>> lx.CurriculumConfig(high_lod_share=0.5)
      Traceback (most recent call last):
      ValueError: curriculum.high_lod_share is of curriculum.name self_play: name it, or leave it out, got 0.5
    """

    name: Literal["fixed", "self_play"] = "fixed"
    """`fixed`: the length goes from `hyper.context_start` to `hyper.context_end` with the steps. `self_play`: with the
    levels of a ladder, one up where `hyper.success_target` is exceeded, one down where it is missed."""
    levels: Annotated[int, Bound(2, 1024)] = 8
    """Levels of the ladder, evenly spaced from the mildest to the hardest."""
    patience: PositiveInt = 10
    """Steps at a level before it is left."""
    high_lod_share: Share | None = None
    """`hyper.high_lod_share` at the hardest level; None keeps it the same at all levels."""

    def _check(self) -> None:
        require(
            self.climbs or self.high_lod_share is None,
            f"curriculum.high_lod_share is of curriculum.name self_play: name it, or leave it out, got "
            f"{self.high_lod_share}",
        )

    @property
    def climbs(self) -> bool:
        """Whether there is a ladder."""
        return self.name == "self_play"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ladder:
    """The present level of n, and how often the policy has been right at each."""

    level: Array
    """int32[]: 0 is the mildest."""
    stayed: Array
    """int32[]: steps at this level since it was reached."""
    success: Array
    """float32[n]: debiased moving averages of the success rates; 0 where a level has seen none."""
    decay_products: Array
    """float32[n]: products of their decays so far; 1 where a level has seen none."""

    @property
    def rate(self) -> Array:
        """float32[]: success at the present level."""
        return jnp.take(self.success, self.level, mode="clip")


def init_ladder(levels: int) -> Ladder:
    """A ladder at its mildest level that has seen nothing."""
    zero = jnp.zeros((), jnp.int32)
    # Distinct buffers: a donated state may not hold one buffer twice.
    return Ladder(zero, jnp.copy(zero), jnp.zeros(levels), jnp.ones(levels))


def update_ladder(
    ladder: Ladder, success: ArrayLike, counts: ArrayLike, *, target: ArrayLike, beta: ArrayLike, patience: int
) -> Ladder:
    """Takes in the success rate of one step at the present level, and moves by at most one level.

        rate  = p + share (s - p),    share = (1 - beta) / (1 - beta P),    P the product of the level's decays before
        level = level + 1 where rate > target, level - 1 where rate < target, after `patience` steps at it

    Each level keeps its own average, and goes on with it when it is come back to. Where success falls with the level
    and crosses the target, the ladder ends up moving between the two levels on both sides of it.

    Args:
      ladder: the state so far.
      success: float32[], s in [0, 1]. A NaN stays in the average, and moves nothing.
      counts: bool[], whether there was anything to be right about; else nothing changes.
      target: float32[], in [0, 1].
      beta: float32[], decay of the averages in [0, 1).
      patience: static number of steps.

    Returns:
      The new state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lensjax.training.optim.ladder import init_ladder, update_ladder
      >>> ladder, step = init_ladder(3), {"target": 0.7, "beta": 0.9, "patience": 1}
      >>> up = update_ladder(ladder, 0.75, True, **step)
      >>> int(up.level), up.success.tolist()
      (1, [0.75, 0.0, 0.0])
    """
    counts = jnp.asarray(counts)
    decay = jnp.where(counts, beta, 1.0)
    before, old = jnp.take(ladder.decay_products, ladder.level, mode="clip"), ladder.rate
    share = jnp.where(counts, (1 - decay) / jnp.where(counts, 1 - decay * before, 1.0), 0.0)
    rate = jnp.where(counts, old + share * (jnp.asarray(success) - old), old)
    stayed = ladder.stayed + counts.astype(jnp.int32)
    direction = (rate > target).astype(jnp.int32) - (rate < target).astype(jnp.int32)
    moved = ladder.level + jnp.where(counts & (stayed >= patience), direction, 0)
    level = jnp.clip(moved, 0, ladder.success.shape[0] - 1)
    return Ladder(
        level=level,
        stayed=jnp.where(level == ladder.level, stayed, 0),
        success=ladder.success.at[ladder.level].set(rate),
        decay_products=ladder.decay_products.at[ladder.level].multiply(decay),
    )
