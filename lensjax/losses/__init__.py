"""Losses: pure functions of scores; none calls a model.

Every loss takes `(scores, ..., where, *, hyperparameters)` with one axis of entries, and returns one float32 scalar;
callers `vmap` over pairs or variants. Where nothing is valid a loss is 0 with gradient 0, and a NaN in a valid score
stays a NaN.
"""

from lensjax.losses.preference import preference_entry_losses, preference_loss, rank_loss
from lensjax.losses.regularizers import budget_balance, budget_loss, budget_smoothing_loss, policy_kl

__all__ = [
    "budget_balance",
    "budget_loss",
    "budget_smoothing_loss",
    "policy_kl",
    "preference_entry_losses",
    "preference_loss",
    "rank_loss",
]
