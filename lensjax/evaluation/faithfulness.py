"""Faithfulness: whether thoughts, or a focus, change the answer, help, and are about what they help with.

Four measurements, all of which have to be above a threshold. *Divergence*: the answer path differs from the one
without. *Ablation*: the score falls without. *Correlation*: what looks better scores better. *Counterfactual*: the
score falls with another example's. The last one tells what is about the example from what helps whatever it says, such
as more computation, or a habit that suits all examples.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Bound, Decay, NonNegative, settings
from lensjax.training import agreement
from lensjax.training.metrics import Metrics


@settings("faithfulness")
class FaithfulnessConfig:
    """What each measurement must be above; ablation and counterfactual in units of the score."""

    # At its highest value a measurement could not be above the threshold.
    divergence: Decay = 0.30
    ablation: NonNegative = 0.02
    correlation: Annotated[float, Bound(-1, 1, high_excluded=True)] = 0.5
    counterfactual: NonNegative = 0.02


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """The four measurements; a NaN is one that is not defined."""

    divergence: Array
    """float32[]: mean of `divergence` over the examples."""
    ablation: Array
    """float32[]: `gain` over the scores without."""
    correlation: Array
    """float32[]: see `correlation`."""
    counterfactual: Array
    """float32[]: `gain` over the scores with another example's."""


def edit_distance(one: ArrayLike, one_length: ArrayLike, other: ArrayLike, other_length: ArrayLike) -> Array:
    """Fewest insertions, deletions and substitutions that turn one sequence into another (Levenshtein).

    Args:
      one: int32[M], of which the first `one_length` count.
      one_length: int32[], at most M.
      other: int32[N].
      other_length: int32[], at most N.

    Returns:
      int32[].

    References:
      Wagner and Fischer, The String-to-String Correction Problem (1974), algorithm X.
    """
    one, other = jnp.asarray(one), jnp.asarray(other)
    columns = jnp.arange(other.shape[0] + 1, dtype=jnp.int32)

    def next_row(row: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        index, symbol = item
        substituted = row[:-1] + (other != symbol).astype(jnp.int32)
        reached = (row + 1).at[1:].min(substituted)
        # Insertions run along the row: min over k <= j of reached[k] + (j - k), without a loop.
        inserted = jax.lax.cummin(reached - columns) + columns
        return jnp.where(index < one_length, inserted, row), None

    indices = jnp.arange(one.shape[0], dtype=jnp.int32)
    row, _ = jax.lax.scan(next_row, columns, (indices, one))
    return row[jnp.asarray(other_length)]


def divergence(one: ArrayLike, one_length: ArrayLike, other: ArrayLike, other_length: ArrayLike) -> Array:
    """Edit distance as a share of the longer sequence: 0 where they are equal, 1 where they share nothing.

    Args:
      one: int32[M], the answer path with thoughts, of which the first `one_length` count.
      one_length: int32[], at most M.
      other: int32[N], the answer path without.
      other_length: int32[], at most N.

    Returns:
      float32[] in [0, 1]; 0 where both are empty.
    """
    longer = jnp.maximum(jnp.asarray(one_length), jnp.asarray(other_length))
    distance = edit_distance(one, one_length, other, other_length)
    return distance.astype(jnp.float32) / jnp.maximum(longer, 1).astype(jnp.float32)


def gain(scores: ArrayLike, control: ArrayLike) -> Array:
    """How much higher the scores are than those of a control on the same examples, on average.

    Args:
      scores: float32[S] or bool[S], higher is better: correctness, a log-probability.
      control: float32[S] or bool[S], without thoughts (ablation) or with another example's (counterfactual).

    Returns:
      float32[].
    """
    return jnp.mean(jnp.asarray(scores).astype(jnp.float32) - jnp.asarray(control).astype(jnp.float32))


def correlation(values: ArrayLike, scores: ArrayLike) -> Array:
    """Pearson correlation of what should tell good from bad with what came of it; point-biserial for correctness.

    Args:
      values: float32[S], such as the coherence or the utility of the thoughts.
      scores: float32[S] or bool[S], higher is better.

    Returns:
      float32[]; NaN where one side is constant (a standard deviation below `agreement.MIN_STD`), for then nothing can
      be said.
    """
    values, scores = (jnp.asarray(side).astype(jnp.float32) for side in (values, scores))
    # As differences from the first: rounding must not give a spread to what is constant.
    values, scores = values - values[0], scores - scores[0]
    correlation, is_defined = agreement.correlation(values, scores, jnp.ones(values.shape, bool))
    return jnp.where(is_defined, correlation, jnp.nan)


def passed(evidence: Evidence, thresholds: FaithfulnessConfig) -> dict[str, Array]:
    """Whether each measurement is above its threshold, and whether all are; bool[] by name. NaN is not."""
    checks = {name: getattr(evidence, name) > limit for name, limit in dataclasses.asdict(thresholds).items()}
    return checks | {"all_passed": jnp.all(jnp.stack(list(checks.values())))}


def metrics(evidence: Evidence, thresholds: FaithfulnessConfig, *, prefix: str) -> Metrics:
    """The measurements by the names under which they are logged, and 1 or 0 for whether all of them pass.

    Args:
      evidence: the measurements.
      thresholds: what they must be above.
      prefix: before every name, such as `rl/`.

    Returns:
      `anti_theater_{divergence,ablation,correlation,counterfactual,all_passed}`, float32[] each.
    """
    report = {field.name: getattr(evidence, field.name) for field in dataclasses.fields(evidence)}
    report["all_passed"] = passed(evidence, thresholds)["all_passed"].astype(jnp.float32)
    return {f"{prefix}anti_theater_{name}": value for name, value in report.items()}
