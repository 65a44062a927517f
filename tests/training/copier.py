"""A base model that copies, by hand, and windows in which it is known what it copies."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.models.decision import Window


@dataclass(frozen=True)
class Copier:
    """An induction head: a row looks at what followed its own token before, or else at the first one, and says that."""

    vocab_size: int

    @property
    def dim(self):
        return self.vocab_size

    def init(self, key):
        return {}

    def embed(self, params, tokens):
        return jax.nn.one_hot(tokens, self.vocab_size)

    def attention(self, params, entries, rows):
        keys = jnp.pad(entries.embeddings[:-1], ((1, 0), (0, 0)))
        logits = 12 * entries.embeddings[rows] @ keys.T + 6 * jnp.eye(1, keys.shape[0])
        is_earlier = jnp.arange(keys.shape[0])[None] < jnp.asarray(rows)[:, None]
        weights = jax.nn.softmax(jnp.where(is_earlier, logits, -1e9))
        return weights[None, None], jnp.ones((1, 1, keys.shape[0]))

    def logits(self, params, entries, rows):
        weights, _ = self.attention(params, entries, rows)
        return 8 * weights[0, 0] @ entries.embeddings


@dataclass(frozen=True)
class Mean:
    """Gists without parameters."""

    def init(self, key):
        return {}

    def apply(self, params, children):
        return jnp.mean(children, axis=1)


def copied(vocabulary, history, block, seed=0):
    """Tokens that are all others, behind which comes what follows the last one in a block of 4."""
    tokens = np.random.default_rng(seed).permutation(vocabulary)[:history].astype(np.int32)
    start = 4 * block
    tokens[-1] = tokens[start]
    return Window(jnp.asarray(tokens), jnp.asarray(tokens[start + 1 : start + 4]))
