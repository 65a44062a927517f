"""Key tokens: those of the horizon that the history far back helps to predict.

    LSD(t) = log p(t | whole history) - log p(t | its last S tokens)     long-short difference
    LCL(t) = log p(t | whole history)                                    long-context likelihood
    t is a key token where LSD(t) > alpha and LCL(t) > beta

Most tokens of ordinary text do not depend on old context, and a mean over all of them hides those that do.

Theirs are the definition, alpha = 2 and beta = -2 nats, and the form of the short context: tokens that are scored
together share one, and read it and those of them that come before (K = 4,096 tokens shared by 1,024). Ours is which
model decides (the base model that is measured, where they prefer a stronger one), that both readings have the tokens at
their true positions, and S: a share of the budget. At S = budget the key tokens would be those on which recency is
unlucky, and whatever else shows something older would look good. So S is smaller, and no loss of a context that is
compared takes part in the choice.

The weights are constants: 1 / n on each of n key tokens. LongCE weighs all tokens by min(exp(LSD), 5) instead. Where
LSD > 2 that is 5 throughout, and the many tokens whose LSD is near 0 would bring back most of their noise.

References:
  Fang et al., What is Wrong with Perplexity for Long-context Language Modeling?, arXiv:2410.23771; numbers from their
  code (`find_key_token` of LongPPL, `loss_weight` of LongCE).
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Bound, NonNegative, settings
from lensjax.context import working as contexts
from lensjax.models import LanguageModel, Params
from lensjax.models.decision import Window
from lensjax.training import nll


@settings("context.key")
class KeyConfig:
    """What makes a token of the horizon a key token.

    Example:
      >>> from lensjax.training.key_tokens import KeyConfig
      >>> KeyConfig().tokens(56)
      28
    """

    alpha: NonNegative = 2.0
    """Nats by which the whole history must help, beside a short one."""
    beta: Annotated[float, Bound()] = -2.0
    """Log-probability, in nats, that the whole history must give it."""
    short: Annotated[float, Bound(0, 1, low_excluded=True, high_excluded=True)] = 0.5
    """Length of the short history, as a fraction of the entries of a working context: below what recency shows."""

    def tokens(self, length: int) -> int:
        """Tokens of the short history beside working contexts of so many entries; at least 1."""
        return max(1, int(self.short * length))


class TokenGain(NamedTuple):
    """What the whole history is worth to each token of the horizon."""

    gain: Array
    """float32[H]: log-probability that it adds to that of a short one (LSD), in nats."""
    long: Array
    """float32[H]: log-probability that it gives (LCL)."""


def token_gain(base: LanguageModel, params: Params, window: Window, *, short: int) -> TokenGain:
    """Reads the whole history, and its last tokens alone, each followed by the horizon.

    Args:
      base: the base model.
      params: its parameters; no gradient reaches them.
      window: history and horizon.
      short: tokens of the short history S, fewer than a working context has entries (see the module).

    Returns:
      `TokenGain`.

    Raises:
      ValueError: the short history is empty, or no shorter than the whole.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> from lensjax.models.decision import split
      >>> from lensjax.training import key_tokens
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1))
      >>> base, window = config.build_models().base, split(jnp.arange(40), horizon=8)
      >>> read = jax.jit(lambda params: key_tokens.token_gain(base, params, window, short=8))
      >>> found = read(base.init(jax.random.key(0)))
      >>> bool(jnp.all(jnp.abs(found.gain) < 0.5))  # a fresh model gains little
      True
    """
    count = window.history.shape[0]
    if not 1 <= short < count:
        raise ValueError(f"short must be at least 1 and below the {count} tokens of the history, got {short}")
    fixed = jax.lax.stop_gradient(params)

    def log_p(first: int) -> Array:
        embeddings = base.embed(fixed, window.history[first:])
        entries = contexts.in_full(embeddings, jnp.arange(first, count))
        return -nll.token_nll(base, fixed, entries, window.horizon)

    long = log_p(0)
    return TokenGain(long - log_p(count - short), long)


def is_key(found: TokenGain, settings: KeyConfig) -> Array:
    """Which tokens of the horizon are key tokens, bool[H].

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training.key_tokens import KeyConfig, TokenGain, is_key
      >>> gain, long = jnp.array([3.0, 3.0, 1.0]), jnp.array([-1.0, -2.5, -1.0])
      >>> is_key(TokenGain(gain, long), KeyConfig()).tolist()  # helped; still not likely; hardly helped
      [True, False, False]
    """
    return (found.gain > settings.alpha) & (found.long > settings.beta)


def find(base: LanguageModel, params: Params, window: Window, settings: KeyConfig, *, short: int) -> Array:
    """`is_key` of `token_gain`, bool[H]."""
    return is_key(token_gain(base, params, window, short=short), settings)


def key_weights(key: ArrayLike) -> Array:
    """Weights of the tokens of a horizon that sum to 1: equal on key tokens and 0 elsewhere, without any all equal.

    Args:
      key: bool[H].

    Returns:
      float32[H].

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training.key_tokens import key_weights
      >>> key_weights(jnp.array([True, False, True, False])).tolist(), key_weights(jnp.zeros(2, bool)).tolist()
      ([0.5, 0.0, 0.5, 0.0], [0.5, 0.5])
    """
    key = jnp.asarray(key)
    among = key | ~jnp.any(key)
    return among.astype(jnp.float32) / jnp.sum(among, dtype=jnp.float32)


def key_nll(losses: ArrayLike, key: ArrayLike) -> Array:
    """Mean loss of the key tokens, NaN where there are none.

    Args:
      losses: float32[..., H].
      key: bool[H].

    Returns:
      float32[...].

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.training.key_tokens import key_nll
      >>> float(key_nll(jnp.array([1.0, 2.0, 6.0]), jnp.array([True, False, True])))
      3.5
    """
    mean = nll.mean_nll(jnp.asarray(losses), key_weights(key))
    return jnp.where(jnp.any(jnp.asarray(key)), mean, jnp.nan)
