"""Thoughts of one prompt: drawn, scored by a model, and how hard a prompt is without them.

Functions are for one prompt; `jax.vmap` them. Letters are those of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from experiments.quiet_star.model import ThoughtModel
from lensjax.models import Params
from lensjax.models.nn.transformer import Memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredThoughts:
    """What a model makes of a prompt and thoughts about it, its own or others."""

    policy: Array
    """float32[n, L, V]: log-probabilities of the next thought token, before each of them."""
    log_probs: Array
    """float32[n, L]: of the thoughts' tokens."""
    features: Array
    """float32[n, L, D]: mean of what was read before each token, the value network's state."""
    without: Array
    """float32[V]: log-probabilities of the answer, from the prompt alone."""
    informed: Array
    """float32[n, V]: with each thought."""
    share: Array
    """float32[n]: weight of the thought in the mixed answer."""


def sample(model: ThoughtModel, params: Params, prompt: Array, key: Array, *, count: int) -> Array:
    """Draws thoughts from the policy, token by token.

    Args:
      model: static.
      params: of the model.
      prompt: int32[P].
      key: PRNG key, consumed.
      count: n.

    Returns:
      int32[n, L].
    """
    keys = jax.random.split(key, (count, model.thought_length))
    return jax.vmap(
        lambda row: _drawn(model, params, prompt, lambda logits, i: jax.random.categorical(row[i], logits))
    )(keys)


def greedy(model: ThoughtModel, params: Params, prompt: Array) -> Array:
    """The thought of which each token is the most probable one; int32[1, L]."""
    return _drawn(model, params, prompt, lambda logits, _: jnp.argmax(logits))[None]


def score(model: ThoughtModel, params: Params, prompt: Array, thoughts: Array) -> ScoredThoughts:
    """What a model makes of thoughts; differentiable by its parameters.

    Args:
      model: static.
      params: of the model.
      prompt: int32[P].
      thoughts: int32[n, L].

    Returns:
      `ScoredThoughts`.
    """
    reading = model.read(params, prompt)
    embeddings = jax.vmap(lambda tokens: model.embed(params, tokens, model.prompt_length))(thoughts)
    hidden = model.branches(params, reading, embeddings)
    before = reading.hidden[-1]
    starts = jnp.broadcast_to(before, hidden[:, :1].shape)
    states = jnp.concatenate([starts, hidden[:, :-1]], axis=1)
    policy = model.thought_log_probs(params, states)
    informed, share = jax.vmap(lambda after: model.answer_log_probs(params, before, after))(hidden[:, -1])
    return ScoredThoughts(
        policy=policy,
        log_probs=jnp.take_along_axis(policy, thoughts[..., None], axis=-1)[..., 0],
        features=_means_so_far(reading.hidden, hidden[:, :-1]),
        without=model.answer_log_probs(params, before)[0],
        informed=informed,
        share=share,
    )


def answer_log_prob(log_probs: ArrayLike, answer: ArrayLike) -> Array:
    """What baking raises and the reward compares: log-probability of the answer int32[], float32[..., V] to [...]."""
    return jnp.asarray(log_probs)[..., jnp.asarray(answer)]


def coherence(log_probs: ArrayLike) -> Array:
    """How well the tokens of a thought follow from the prompt and each other, as the policy sees it.

        exp(mean_a log pi(token_a))

    Args:
      log_probs: float32[..., L], of the thought's tokens.

    Returns:
      float32[...] in (0, 1].
    """
    return jnp.exp(jnp.mean(jnp.asarray(log_probs), axis=-1))


def difficulty(without: ArrayLike, attention: ArrayLike, answer: ArrayLike | None = None) -> Array:
    """How hard a prompt is to answer without a thought: the mean of two or three parts, each from 0 to 1.

    Entropy of the answer, as a share of the uniform one's; dispersion of the attention, alike, mean over heads; and
    where the answer is known 1 - p(answer), which rises with the loss.

    Args:
      without: float32[V], log-probabilities of the answer.
      attention: float32[layers, heads, P], of the prompt's last token.
      answer: int32[]; None where it must not be known.

    Returns:
      float32[] in [0, 1].
    """
    without, attention = jnp.asarray(without), jnp.asarray(attention)
    safe = jnp.where(attention > 0, attention, 1.0)
    parts = [
        -jnp.sum(jnp.exp(without) * without) / jnp.log(float(without.shape[-1])),
        -jnp.mean(jnp.sum(safe * jnp.log(safe), axis=-1)) / jnp.log(float(attention.shape[-1])),
    ]
    if answer is not None:
        parts.append(-jnp.expm1(answer_log_prob(without, answer)))
    return jnp.clip(jnp.mean(jnp.stack(parts)), 0.0, 1.0)


def _drawn(model: ThoughtModel, params: Params, prompt: Array, choose: Callable[[Array, Array], Array]) -> Array:
    reading = model.read(params, prompt)

    def step(carry: tuple[Array, Memory], index: Array) -> tuple[tuple[Array, Memory], Array]:
        hidden, memory = carry
        token = choose(model.thought_log_probs(params, hidden), index).astype(jnp.int32)
        read, memory = model.extend(params, memory, token[None], model.prompt_length + index)
        return (read[0], memory), token

    places = jnp.arange(model.thought_length)
    return jax.lax.scan(step, (reading.hidden[-1], reading.memory), places)[1]


def _means_so_far(prompt: Array, thought: Array) -> Array:
    """Mean over the prompt [P, D] and the first 0, 1, ... tokens of each thought [n, L - 1, D]; [n, L, D]."""
    first = jnp.broadcast_to(jnp.sum(prompt, axis=0), (thought.shape[0], 1, prompt.shape[1]))
    sums = jnp.cumsum(jnp.concatenate([first, thought], axis=1), axis=1)
    counts = prompt.shape[0] + jnp.arange(sums.shape[1], dtype=jnp.float32)
    return sums / counts[None, :, None]
