"""Preference terms by name; `lens_objective(..., term=)` takes one that is not among them."""

import functools
from collections.abc import Mapping

from lensjax import losses
from lensjax.training.terms import entries, pairs
from lensjax.training.terms.groups import grpo_term, over_groups
from lensjax.training.terms.inputs import Term

TERMS: Mapping[str, Term] = {
    "spans": functools.partial(pairs.pair_term, form="logistic"),
    "mse": functools.partial(pairs.pair_term, form="squared"),
    "span_advantages": entries.span_term,
    "a_star_po": over_groups(losses.a_star_po),
    "copg": over_groups(losses.copg),
    "cpl": over_groups(losses.cpl, lambda inputs, key: {"alpha": inputs.hyper.beta, "bias": inputs.hyper.cpl_bias}),
    "disco": over_groups(losses.disco, lambda inputs, key: {"tau": inputs.temperature}),
    "grpo": grpo_term,
    "gtpo": entries.gtpo_term,
    "hinge": over_groups(losses.hinge),
    "info_nca": over_groups(
        losses.info_nca, lambda inputs, key: {"alpha": inputs.hyper.reward_temperature, "beta": inputs.hyper.beta}
    ),
    "info_nce": over_groups(losses.info_nce, lambda inputs, key: {"tau": inputs.temperature}),
    "ipo": over_groups(losses.ipo),
    "logistic": over_groups(
        losses.logistic,
        lambda inputs, key: {"beta": inputs.hyper.beta, "gap_range": inputs.gap_range, **inputs.softening},
    ),
    "pg_rank": over_groups(
        losses.pg_rank,
        lambda inputs, key: {"beta": inputs.hyper.beta, "key": key, "samples": inputs.objective.rankings},
    ),
    "plackett_luce": over_groups(losses.plackett_luce),
    "rpo": over_groups(losses.rpo, lambda inputs, key: {"beta": inputs.hyper.beta, "weight": inputs.hyper.rpo_weight}),
}
"""By the `name` of an `ObjectiveConfig`."""
