"""Losses: pure functions of scores; none calls a model.

Every loss takes `(scores, ..., where, *, hyperparameters)` with one axis of entries, of variants (`groups`, `pairs` and
`ranking`) or of nodes (`distillation`), and returns one float32 scalar; callers `vmap` over pairs, variants or groups.
Where nothing is valid a loss is 0 with gradient 0, and a NaN in a valid score stays a NaN.
"""

from lensjax.losses.attribution import attribution_loss
from lensjax.losses.distillation import listwise_distillation
from lensjax.losses.groups import a_star_po, copg, disco, grpo, info_nca, info_nce
from lensjax.losses.pairs import cpl, hinge, ipo, logistic, rpo
from lensjax.losses.policy import clipped_surrogate, policy_gradient, value_loss
from lensjax.losses.preference import preference_entry_losses, preference_loss, rank_loss
from lensjax.losses.ranking import pg_rank, plackett_luce
from lensjax.losses.regularizers import budget_balance, budget_loss, budget_smoothing_loss, policy_kl

__all__ = [
    "a_star_po",
    "attribution_loss",
    "budget_balance",
    "budget_loss",
    "budget_smoothing_loss",
    "clipped_surrogate",
    "copg",
    "cpl",
    "disco",
    "grpo",
    "hinge",
    "info_nca",
    "info_nce",
    "ipo",
    "listwise_distillation",
    "logistic",
    "pg_rank",
    "plackett_luce",
    "policy_gradient",
    "policy_kl",
    "preference_entry_losses",
    "preference_loss",
    "rank_loss",
    "rpo",
    "value_loss",
]
