"""A small causal language model that may think before it answers.

    prompt -> h;  tokens of a thought are sampled one by one, each from what was read before it
    answer logits = (1 - g) answer_head(h) + g answer_head(h'),  g = sigmoid(mlp(h, h')),  h' after the thought

Thoughts of one prompt are branches: a token of a thought sees the prompt and the tokens before it in its own thought.
Functions are for one prompt; `jax.vmap` them. Letters: P tokens in a prompt, L in a thought, n thoughts of a prompt, D
width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Layers, Width, require, settings
from lensjax.models import Functional, Params
from lensjax.models.nn.layers import linear, rms_norm
from lensjax.models.nn.transformer import Memory, Transformer, TransformerConfig

_POSITION_STD = 1.0
"""Of fresh embeddings of tokens and places alike: which place a token names is half of the task."""


@settings("model")
class ModelConfig:
    """Sizes of the language model."""

    dim: Width = 64
    layers: Layers = 1
    heads: Width = 4
    mlp_dim: Width = 128

    def _check(self) -> None:
        require(self.dim % self.heads == 0, f"model.dim must be a multiple of model.heads {self.heads}, got {self.dim}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """A prompt that was read."""

    hidden: Array
    """float32[P, D]."""
    memory: Memory
    """Keys and values of all layers, with room for a thought."""


class ThoughtLM(nnx.Module):
    """The modules of `ThoughtModel`."""

    def __init__(self, config: ModelConfig, vocab_size: int, capacity: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(_POSITION_STD)
        self.embedding = nnx.Embed(vocab_size, config.dim, embedding_init=init, rngs=rngs)
        self.places = nnx.Embed(capacity, config.dim, embedding_init=init, rngs=rngs)
        stack = TransformerConfig(
            dim=config.dim,
            heads=config.heads,
            kv_heads=config.heads,
            mlp_dim=config.mlp_dim,
            layers=config.layers,
            causal=True,
            dtype=jnp.float32,
        )
        self.transformer = Transformer(stack, rngs=rngs)
        self.norm = rms_norm(config.dim, rngs)
        # Near uniform at first: nothing is sure before it is learned.
        small = {"dtype": jnp.float32, "rngs": rngs, "gain": 0.1, "bias": True}
        self.answer = linear(config.dim, vocab_size, **small)
        self.thought = linear(config.dim, vocab_size, **small)
        self.gate_hidden = linear(2 * config.dim, config.dim, dtype=jnp.float32, rngs=rngs, bias=True)
        self.gate = linear(config.dim, 1, **small)


@dataclass(frozen=True)
class ThoughtModel(Functional[ThoughtLM]):
    """The language model as pure functions."""

    config: ModelConfig
    vocab_size: int
    prompt_length: int
    """P."""
    thought_length: int
    """L."""

    def _build(self, rngs: nnx.Rngs) -> ThoughtLM:
        return ThoughtLM(self.config, self.vocab_size, self.prompt_length + self.thought_length, rngs=rngs)

    def read(self, params: Params, prompt: ArrayLike) -> Reading:
        """Reads a prompt int32[P]."""
        head_dim = self.config.dim // self.config.heads
        shape = (self.config.layers, self.prompt_length + self.thought_length, self.config.heads, head_dim)
        hidden, memory = self._extend(params, (jnp.zeros(shape), jnp.zeros(shape)), self.embed(params, prompt, 0), 0)
        return Reading(hidden, memory)

    def embed(self, params: Params, tokens: ArrayLike, place: ArrayLike) -> Array:
        """What the first layer reads of tokens int32[R] from a place on, the prompt's first being 0; float32[R, D]."""
        lm, tokens = self._bind(params), jnp.asarray(tokens)
        return lm.embedding(tokens) + lm.places(jnp.asarray(place, jnp.int32) + jnp.arange(len(tokens)))

    def extend(self, params: Params, memory: Memory, tokens: ArrayLike, place: ArrayLike) -> tuple[Array, Memory]:
        """Reads further tokens int32[R] of one thought; float32[R, D], and the longer memory."""
        return self._extend(params, memory, self.embed(params, tokens, place), place)

    def branches(self, params: Params, reading: Reading, embeddings: ArrayLike) -> Array:
        """Reads whole thoughts side by side, float32[n, L, D] from `embed`; float32[n, L, D] after each token."""
        start = self.prompt_length
        return jax.vmap(lambda one: self._extend(params, reading.memory, one, start)[0])(jnp.asarray(embeddings))

    def thought_log_probs(self, params: Params, hidden: ArrayLike) -> Array:
        """The policy: log-probabilities of the next thought token, float32[D] to float32[vocabulary]."""
        return jax.nn.log_softmax(self._bind(params).thought(jnp.asarray(hidden)))

    def answer_log_probs(
        self, params: Params, before: ArrayLike, after: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The answer, from the prompt alone or mixed with what was thought.

        Args:
          params: from `init`.
          before: float32[D], after the prompt.
          after: float32[D], after the thought; None without one.

        Returns:
          Log-probabilities float32[vocabulary], and float32[], the share of the thought (0 without one).
        """
        lm, before = self._bind(params), jnp.asarray(before)
        logits = lm.answer(before)
        if after is None:
            return jax.nn.log_softmax(logits), jnp.zeros(())
        both = jnp.concatenate([before, jnp.asarray(after)])
        share = jax.nn.sigmoid(lm.gate(jax.nn.relu(lm.gate_hidden(both)))[0])
        return jax.nn.log_softmax((1 - share) * logits + share * lm.answer(jnp.asarray(after))), share

    def attention(self, params: Params, prompt: ArrayLike) -> Array:
        """What the last token of a prompt int32[P] attends to, float32[layers, heads, P]."""
        rows = jnp.asarray([self.prompt_length - 1])
        weights, _ = self._bind(params).transformer.attention(self.embed(params, prompt, 0), rotary=None, rows=rows)
        return weights[:, :, 0]

    def _extend(self, params: Params, memory: Memory, embeddings: Array, place: ArrayLike) -> tuple[Array, Memory]:
        lm, slots = self._bind(params), jnp.asarray(place, jnp.int32) + jnp.arange(embeddings.shape[0])
        hidden, memory = lm.transformer.extend(embeddings, memory, rotary=None, slots=slots)
        return lm.norm(hidden), memory
