"""The loss of the horizon's tokens, where the base model or GistNet is trained."""

import jax
from jax import Array

from lensjax._numerics import masked_mean
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.metrics import Metrics
from lensjax.training.scoring import ScoredVariants


def token_term(scored: ScoredVariants, hyper: Hyperparameters) -> tuple[Array, Metrics]:
    """token_loss_weight mean_v nll(v) + gist_delta_weight mean_v relu(nll(v) - nll(recency)), and both by name."""
    token_loss = masked_mean(scored.nll, scored.distinct)
    # Recency is a constant here: a worse one would be the cheapest way to a smaller difference.
    rises = jax.nn.relu(scored.nll - jax.lax.stop_gradient(scored.nll[:, :1]))
    gist_delta = masked_mean(rises, scored.distinct)
    loss = hyper.token_loss_weight * token_loss + hyper.gist_delta_weight * gist_delta
    return loss, {"token_loss": token_loss, "gist_delta_loss": gist_delta}
