"""An adversary of the policy: out of many candidate cuts, those that it expects the policy to be most wrong about.

It is a second, linear head on LensNet's features, fitted by ridge regression to the regret that was measured, in moving
moments: no learning rate, and no pass of the base model. A candidate costs one pass of LensNet.

    regret(v)    = mean over u of |nll_u - nll_v| [h_u and h_v are in the wrong order]
    predicted(v) = x_v . w,    w = (E[x x'] + RIDGE mean E[x^2] I)^-1 E[x regret]

with the policy's values h and features x. What it learns from are the variants that were measured, its own proposals
among them; to the policy its proposals are variants as others are. No gradient passes through any of this.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._numerics import masked_mean
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.tree import TreeState
from lensjax.context.working import WorkingContext
from lensjax.models import Models, Params
from lensjax.models.interfaces import features_of
from lensjax.training.agreement import variant_values

RIDGE = 1e-2
"""Of the regression, as a share of the features' mean square."""
BETA = 0.99
"""Decay of the moving moments."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RegretHead:
    """Moving moments of features and regrets; all 0 before the first update."""

    gram: Array
    """float32[F, F]: of x x'."""
    cross: Array
    """float32[F]: of x regret."""

    @property
    def weights(self) -> Array:
        """float32[F]: those of the regression; 0 before the first update."""
        # Both moments lack the same factor of debiasing, which drops out.
        scale = jnp.mean(jnp.diag(self.gram))
        ridge = jnp.where(scale > 0, RIDGE * scale, 1.0) * jnp.eye(self.cross.shape[0])
        return jnp.linalg.solve(self.gram + ridge, self.cross)


def init_head(models: Models) -> RegretHead:
    """A head that has seen nothing and expects no regret.

    Raises:
      ValueError: LensNet shows no features.
    """
    count = features_of(models.lens).feature_dim + 3
    return RegretHead(jnp.zeros((count, count)), jnp.zeros(count))


def features(models: Models, lens_params: Params, tree: TreeState, drawn: WorkingContext, geometry: Geometry) -> Array:
    """What the adversary knows of cuts: of LensNet's features the mean over what is free, its value h, h^2, 1.

    Args:
      models: LensNet must have features.
      lens_params: its parameters, constants.
      tree: the history.
      drawn: n cuts of it.
      geometry: the history.

    Returns:
      float32[n, F]; `values_of` finds h in it.
    """
    lens, lens_params = features_of(models.lens), jax.lax.stop_gradient(lens_params)

    def one(context: WorkingContext) -> tuple[Array, Array]:
        entries = jax.lax.stop_gradient(contexts.materialise(tree, context))
        scores, hidden = lens.apply_with_features(lens_params, entries)
        free = context.valid & geometry.is_free(context.start)
        return scores, jax.vmap(masked_mean, (1, None))(hidden, free)

    scores, pooled = jax.vmap(one)(drawn)
    values = variant_values(scores, drawn, geometry)
    return jnp.column_stack([pooled.astype(jnp.float32), values, values**2, jnp.ones_like(values)])


def values_of(known: Array) -> Array:
    """The policy's values of cuts, from their `features`: float32[..., F] to float32[...]."""
    return known[..., -3]


def regrets(values: ArrayLike, losses: ArrayLike, where: ArrayLike) -> Array:
    """What the order of the policy's values costs each variant beside the others, in nats.

        regret_v = mean over u != v of |nll_u - nll_v| w_uv,    w = 1 where h and nll rise together, 1/2 where h is tied

    Args:
      values: float32[n], h.
      losses: float32[n], nats per token.
      where: bool[n], variants that count.

    Returns:
      float32[n], 0 where not valid.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training.adversary import regrets
      >>> regrets(jnp.array([0.5, 0.0, -0.5]), jnp.array([2.0, 1.0, 3.0]), jnp.ones(3, bool)).tolist()
      [0.5, 0.5, 0.0]
    """
    values, losses, where = (jnp.asarray(x) for x in (values, losses, where))
    rise = losses[:, None] - losses[None, :]
    wrong = 0.5 + 0.5 * jnp.sign(values[:, None] - values[None, :]) * jnp.sign(rise)
    both = where[:, None] & where[None, :] & ~jnp.eye(len(losses), dtype=bool)
    total = jnp.sum(jnp.where(both, jnp.abs(rise) * wrong, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(both, axis=1, dtype=jnp.float32), 1)


def learn(head: RegretHead, known: ArrayLike, regret: ArrayLike, where: ArrayLike, *, beta: ArrayLike) -> RegretHead:
    """Takes in measured regrets; without any, nothing changes.

    Args:
      head: the state so far.
      known: float32[..., F], `features`.
      regret: float32[...].
      where: bool[...], variants that count.
      beta: float32[], decay in [0, 1).

    Returns:
      The new state.
    """
    where, known = jnp.asarray(where), jnp.asarray(known)
    count = jnp.sum(where, dtype=jnp.float32)
    x = jnp.where(where[..., None], known, 0.0).reshape(-1, known.shape[-1])
    y = jnp.where(where, jnp.asarray(regret), 0.0).ravel()
    decay = jnp.where(count > 0, beta, 1.0)
    share = (1 - decay) / jnp.maximum(count, 1)
    return RegretHead(decay * head.gram + share * x.T @ x, decay * head.cross + share * x.T @ y)


def propose(head: RegretHead, known: ArrayLike, distinct: ArrayLike, *, random: int, proposed: int) -> Array:
    """Which of the drawn cuts are variants: the first ones, as they come, and the most promising of the others.

    Args:
      head: what regret is expected.
      known: float32[n, F], `features` of all.
      distinct: bool[n], False for duplicates, which are proposed last.
      random: static number of those that are taken as they come.
      proposed: static number of the others that are taken.

    Returns:
      int32[random + proposed].
    """
    expected = jnp.where(jnp.asarray(distinct), jnp.asarray(known) @ head.weights, -jnp.inf)
    _, best = jax.lax.top_k(expected[random:], proposed)
    return jnp.concatenate([jnp.arange(random, dtype=jnp.int32), random + best.astype(jnp.int32)])


def take_in(
    head: RegretHead, known: Array, losses: Array, where: Array, *, proposed: int
) -> tuple[RegretHead, dict[str, Array]]:
    """`learn` from the rollouts of a batch, and what the policy regrets of random and of proposed ones.

    Args:
      head: the state so far.
      known: float32[B, N, F], `features`.
      losses: float32[B, N], nats per token.
      where: bool[B, N], rollouts that count.
      proposed: static; the last of the N are proposals.

    Returns:
      The new state, and scalars by name.
    """
    regret = jax.vmap(regrets)(values_of(known), losses, where)
    at_random = losses.shape[1] - proposed
    report = {
        "adversary/regret_random": masked_mean(regret[:, :at_random], where[:, :at_random]),
        "adversary/regret_proposed": masked_mean(regret[:, at_random:], where[:, at_random:]),
    }
    return learn(head, known, regret, where, beta=BETA), report
