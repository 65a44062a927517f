"""How far one sample moves a policy: the score function, the Fisher information along it, and the step they predict.

The policy's parameters are its logits, as those of a last layer that is all there is: then everything is in closed
form. Constants to the losses that use them: no gradient passes through any of these.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax.losses._variants import log_softmax


def softmax_curvature(logits: ArrayLike, where: ArrayLike) -> tuple[Array, Array]:
    """Of each choice i of a softmax policy: the square norm of its score function, and the curvature along it.

        u_i = grad log pi_i = e_i - pi,    |u_i|^2 = 1 - 2 pi_i + sum_k pi_k^2
        u_i^T F u_i = sum_k pi_k u_ik^2 - (sum_k pi_k u_ik)^2,    F = diag(pi) - pi pi^T

    Args:
      logits: float32[N], in nats.
      where: bool[N], choices there are.

    Returns:
      float32[N] square norms and float32[N] curvatures, both at least 0, and 0 where not valid.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import curvature
      >>> norms, curvatures = curvature.softmax_curvature(jnp.zeros(2), jnp.ones(2, bool))
      >>> norms.tolist(), curvatures.tolist()
      ([0.5, 0.5], [0.25, 0.25])
    """
    where = jnp.asarray(where)
    logits = jax.lax.stop_gradient(jnp.where(where, logits, 0.0))
    pi = jnp.where(where, jnp.exp(log_softmax(logits, where)), 0.0)
    squares, cubes = jnp.sum(pi**2), jnp.sum(pi**3)
    # Variances, which rounding alone makes negative.
    norms = jnp.maximum(1 - 2 * pi + squares, 0.0)
    curvatures = jnp.maximum(pi - 2 * pi**2 + cubes - (pi - squares) ** 2, 0.0)
    return jnp.where(where, norms, 0.0), jnp.where(where, curvatures, 0.0)


def bernoulli_curvature(logits: ArrayLike, actions: ArrayLike) -> tuple[Array, Array]:
    """Of an action of a Bernoulli policy: the square norm of its score function, and the curvature along it.

        u = a - p,    |u|^2,    u F u = |u|^2 p (1 - p),    p = sigmoid(logit)

    Args:
      logits: float32[...], in nats.
      actions: bool[...], a: what was done.

    Returns:
      float32[...] square norms and float32[...] curvatures, both at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import curvature
      >>> norms, curvatures = curvature.bernoulli_curvature(jnp.zeros(1), jnp.ones(1, bool))
      >>> norms.tolist(), curvatures.tolist()
      ([0.25], [0.0625])
    """
    p = jax.nn.sigmoid(jax.lax.stop_gradient(jnp.asarray(logits)))
    norms = jnp.square(jnp.asarray(actions).astype(jnp.float32) - p)
    return norms, norms * p * (1 - p)


def trusted(
    advantages: ArrayLike,
    square_norms: ArrayLike,
    curvatures: ArrayLike,
    *,
    step: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    shift: ArrayLike,
) -> Array:
    """The samples whose own step is predicted to stay where second-order models of it can be trusted (CAPO).

        low <= m_H <= high  and  m_F <= shift
        m_H = g^T d + 1/2 d^T H d = step A^2 |u|^2 + 1/2 step^2 A^3 (|u|^4 - u^T F u)
        m_F = 1/2 d^T F d         = 1/2 step^2 A^2 u^T F u

    for the step d = step A u up the gradient g = A u of the sample's objective A pi / pi_now, whose Hessian is
    H = A (u u^T - F). m_H is the predicted rise of the objective, m_F that of the divergence from the present policy.
    What is left out first: unlikely actions that are punished hard (m_H falls below 0), and large advantages.

    Args:
      advantages: float32[...], A.
      square_norms: float32[...], |u|^2 of the score functions u.
      curvatures: float32[...], u^T F u.
      step: float32[], above 0: by how much a unit of gradient moves a logit, in nats.
      low: float32[], least predicted rise of the objective, in the unit of the advantages.
      high: float32[], greatest.
      shift: float32[], at least 0: greatest predicted divergence, in nats.

    Returns:
      bool[...]. Where a value is NaN it is True: it is for the loss to say so.

    References:
      Melo et al., Stabilizing Policy Gradients (CAPO), arXiv:2510.00819: the two models in the last layer and the
      three bounds, as summaries of the paper give them. There each is of the step that Adam would take in the last
      layer's weights, a whole token batch at a time; the logits for the last layer and a gradient step for Adam's are
      chosen here.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.losses import curvature
      >>> norms, curvatures = curvature.bernoulli_curvature(jnp.array([0.0, 0.0, -2.0]), jnp.ones(3, bool))
      >>> advantages = jnp.array([1.0, 4.0, -3.0])
      >>> curvature.trusted(advantages, norms, curvatures, step=1.0, low=0.0, high=1.0, shift=0.1).tolist()
      [True, False, False]
    """
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages))
    norms, curvatures, step = jnp.asarray(square_norms), jnp.asarray(curvatures), jnp.asarray(step)
    moved = step * advantages
    rise = moved * advantages * norms + 0.5 * moved**2 * advantages * (norms**2 - curvatures)
    divergence = 0.5 * moved**2 * curvatures
    return ~((rise < low) | (rise > high) | (divergence > shift))
