"""Terms over the entries of all variants: policy gradients, and what each span was worth."""

import jax
import jax.numpy as jnp
from jax import Array

from lensjax import losses
from lensjax._numerics import masked_mean
from lensjax.losses import credit
from lensjax.training import preferences
from lensjax.training.levels import compare_levels, conflicts, span_contrasts
from lensjax.training.scoring import ScoredVariants
from lensjax.training.terms.advantages import entry_mask, variant_advantages
from lensjax.training.terms.inputs import TermInputs


def span_term(inputs: TermInputs) -> Array:
    """Policy gradient of the entries, each against a baseline of its own; mean over the sequences that have any.

        -sum_vi a_vi A_vi d_vi s_vi / sum_vi a_vi,    d = +1 where the level is finer than that of the others, else -1

    A finer level that came out better asks for detail, and so does a coarser one that came out worse. a is the tokens
    covered: both sides of a difference weigh the same, and the level alone says nothing (see `span_targets`). A is that
    of `preferences.span_advantages`, or its sign beyond a threshold where `objective.group_reward` is contrastive.
    """

    def loss(scores: Array, advantages: Array, scored: ScoredVariants, compared: Array) -> tuple[Array, Array]:
        if inputs.objective.group_reward == "contrastive":
            gained, finer, where = span_contrasts(
                scored.nll, scored.contexts, compared, inputs.geometry, threshold=inputs.hyper.contrast_threshold
            )
        else:
            gained, finer, where = preferences.span_advantages(advantages, scored.contexts, compared, inputs.geometry)
        where = entry_mask(inputs, scores, finer, gained, where)
        return _policy_gradient(finer * scores, gained, scored, where), jnp.any(where)

    return masked_mean(*jax.vmap(loss)(inputs.scores, inputs.advantages, inputs.scored, inputs.compared))


def gtpo_term(inputs: TermInputs) -> Array:
    """Group-relative advantages on every entry, but where better and worse variants agree (GTPO).

        -sum_vi a_vi A'_vi log pi(d_vi) / sum_vi a_vi,    log pi(d) = log sigmoid(d s / temperature)

    An entry's action is its level, finer or coarser as in `span_term`; a span that all variants show alike has none. A'
    is the variant's advantage, but in conflict, where variants of both signs show the span at the same level: there
    `losses.credit.conflict_advantages` leaves nothing of a negative one and doubles a positive one. Variants whose
    policy is undecided, by its mean entropy over these entries above `hyper.entropy_limit`, are left out.

    The paper's limit is log 2 nats. A policy over many tokens whose entropy is below that gives one of them more than
    1/2, since entropy is at least -log max p; a choice between two always does, and never has more than log 2. So the
    limit means something here only below log 2, where it must stay above what the policy starts with, or nothing is
    ever learned: the default keeps all.

    References:
      Simoni et al., GTPO, arXiv:2508.03772 (abstract, and the authors' code for the limit).
    """
    advantages = variant_advantages(inputs, -inputs.scored.nll, inputs.compared)

    def loss(scores: Array, advantages: Array, scored: ScoredVariants, compared: Array) -> tuple[Array, Array]:
        levels = compare_levels(scored.contexts, compared, inputs.geometry)
        logits = jnp.where(levels.where, scores, 0.0) / inputs.temperature
        entropy = jax.vmap(masked_mean)(credit.bernoulli_entropy(logits), levels.where)
        where = levels.where & ~(entropy > inputs.hyper.entropy_limit)[:, None]
        each = jnp.broadcast_to(advantages[:, None], where.shape)
        gained = credit.conflict_advantages(each, conflicts(levels, advantages))
        where = entry_mask(inputs, scores, levels.finer, gained, where)
        return _policy_gradient(jax.nn.log_sigmoid(levels.finer * logits), gained, scored, where), jnp.any(where)

    return masked_mean(*jax.vmap(loss)(inputs.scores, advantages, inputs.scored, inputs.compared))


def _policy_gradient(log_probs: Array, advantages: Array, scored: ScoredVariants, where: Array) -> Array:
    """`losses.policy_gradient` of the entries of one sequence, each by the tokens that it covers; float32[]."""
    spans = jnp.where(where, scored.entries.spans, 0.0)
    share = spans / jnp.maximum(masked_mean(spans, where), 1)
    return losses.policy_gradient(*(leaf.ravel() for leaf in (log_probs, share * advantages, where)))


def attribution_term(inputs: TermInputs) -> Array:
    """`losses.attribution_loss` of what the scored variants say of each span; mean over the sequences that say any.

    The attribution of an entry is its advantage over the variants that show its span at another level, positive where
    it speaks for the finer one, as in `span_term`.
    """

    def loss(scores: Array, advantages: Array, scored: ScoredVariants, compared: Array) -> tuple[Array, Array]:
        gained, finer, where = preferences.span_advantages(advantages, scored.contexts, compared, inputs.geometry)
        spans = jnp.where(where, scored.entries.spans, 0.0)
        flat = (leaf.ravel() for leaf in (scores, finer * gained, where))
        return losses.attribution_loss(*flat, weights=spans.ravel()), jnp.any(where)

    return masked_mean(*jax.vmap(loss)(inputs.scores, inputs.advantages, inputs.scored, inputs.compared))
