"""The numbers that an ablation sweeps: data of a training step, not code."""

from typing import Annotated

from lensjax._settings import Bound, Decay, NonNegative, Positive, Share, settings


@settings("hyper", is_pytree=True)
class Hyperparameters:
    """What an ablation sweeps. Floats in a `Recipe`; float32 scalars, or a batch of them, in a `TrainState`.

    Example:
      >>> import jax, jax.numpy as jnp, lensjax as lx
      >>> batch = jax.tree.map(lambda value: jnp.full(3, value), lx.Hyperparameters(margin=0.25))
      >>> batch.margin.tolist()
      [0.25, 0.25, 0.25]
    """

    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    temperature: Positive = 1.0
    """Temperature of the preference scale g, of the Bernoulli policy in the KL, and of `disco` and `info_nce` (tau)."""
    temperature_end: Positive = 1.0
    """Temperature at the last step; linear in between."""
    beta: Positive = 1.0
    """Scale of the variants' values in the objectives over groups (alpha of `cpl`)."""
    reward_temperature: Positive = 1.0
    """Temperature of the rewards in `info_nca` (alpha), in nats."""
    cpl_bias: Positive = 0.5
    """Weight of the worse variant in `cpl` (lambda)."""
    clip: Annotated[float, Bound(0, 1, low_excluded=True, high_excluded=True)] = 0.2
    """How far from 1 the ratio of `grpo` counts (epsilon)."""
    rpo_weight: NonNegative = 0.1
    """Weight of the better variant's own value in `rpo` (eta)."""
    label_smoothing: Annotated[float, Bound(0, 0.5, high_excluded=True)] = 0.0
    """Probability that a preference is the wrong way round, in `spans` and `logistic`."""
    gap_margin: NonNegative = 0.0
    """How far beyond 0 the difference that a preference of strength 1 asks for must be, in `spans` (by normalised
    advantages) and `logistic` (by nats). Both are left out of the compiled step where they are 0 in the `Recipe`."""
    adv_norm_beta: Decay = 0.9
    """Decay of the advantage normaliser's moving averages."""
    collapse_weight: NonNegative = 1.0
    """Weight of entries whose target is to collapse."""
    rank_weight: NonNegative = 0.5
    margin: NonNegative = 0.1
    """Margin of the rank loss."""
    budget_weight: NonNegative = 0.1
    smooth_weight: NonNegative = 0.0
    budget_smooth_beta: Decay = 0.9
    attribution_weight: NonNegative = 0.0
    """Weight of what the scored variants say of each span, beside the preference term (T-REG). 0 in the `Recipe` leaves
    the term out of the compiled step."""
    gate: Share = 0.0
    """Largest share of good rollouts with which a sequence learns from the teacher, for `objective.gate`: 0 where none
    is good enough."""
    gate_gain: NonNegative = 0.0
    """By how many nats per token a good rollout is below recency."""
    kl_weight: NonNegative = 0.0
    """0 in the `Recipe` leaves the term, and the anchor's forward pass, out of the compiled step."""
    anchor_beta: Decay = 0.99
    """Decay of the policy anchor's parameters when the anchor is an EMA."""
    hard_negative_ratio: Share = 1.0
    """Share kept of the pairs that do not hold the best variant, largest difference first."""
    stage_boundary: Share = 0.5
    """Share of the run that its first stage takes, for `objective.stages` and for the anchor `stage`."""
    easy_quantile: Share = 0.5
    """Share of the pairs of a batch that are not easy, for `objective.stages`: 0 makes all easy, 1 none."""
    high_lod_share: Share = 0.1
    """Probability of each block of LOD 2 or above that the target length leaves open."""
    own_temperature: Positive = 0.1
    """Of the swaps of `context.own_rollouts`, in units of scores: how far the policy's own draws explore."""
    context_start: Annotated[float, Bound(0, 1, low_excluded=True)] = 0.8
    """Length of a working context at step 0, as a fraction of the history. The larger of the two lengths in the
    `Recipe` is the compiled capacity, which bounds them in a state."""
    context_end: Annotated[float, Bound(0, 1, low_excluded=True)] = 0.75
    """Length of a working context at the end of the curriculum, as a fraction of the history."""
    success_target: Share = 0.7
    """Share of the differences between best and worst variants, in nats, in which the policy should ask for the best
    one, which `curriculum` self_play keeps to."""
    success_beta: Decay = 0.9
    """Decay of each level's moving average of that share."""
    token_loss_weight: NonNegative = 1.0
    """Weight of mean_v nll(v) when the base model or GistNet is trained."""
    gist_delta_weight: NonNegative = 0.0
    """Weight of relu(nll(v) - nll(baseline)) when the base model or GistNet is trained."""
    outcome_width: Positive = 0.05
    """Rewards that round to the same multiple of it are one outcome where `objective.group_baseline` is blended, in
    nats."""
    blend_sharpness: NonNegative = 4.0
    """How suddenly a blended baseline goes over to the batch as a group agrees, per bit."""
    blend_entropy: NonNegative = 1.0
    """Entropy of the outcomes of a group at which group and batch count alike, in bits."""
    contrast_threshold: NonNegative = 0.01
    """Difference up to which a level is neither rewarded nor punished where `objective.group_reward` is contrastive, in
    nats per token."""
    entropy_limit: Positive = 0.7
    """Mean entropy of the policy over a variant's entries above which `gtpo` leaves the variant out, in nats; from
    log 2 = 0.693 on none."""
    trust_step: Positive = 1.0
    """By how much a unit of gradient is taken to move a logit where `objective.mask` is trust, in nats."""
    trust_low: Annotated[float, Bound()] = 0.0
    """Least predicted rise of the objective by one action's step that is trusted, in the unit of the advantages."""
    trust_high: Annotated[float, Bound()] = 1.0
    """Greatest one that is."""
    trust_shift: NonNegative = 0.1
    """Greatest predicted divergence of the policy by one action's step that is trusted, in nats."""
    informative_start: Annotated[float, Bound(0, 1, low_excluded=True)] = 0.2
    """Share of a sequence's entries that `objective.mask informative` leaves at step 0."""
    informative_end: Annotated[float, Bound(0, 1, low_excluded=True)] = 1.0
    """That share at the last step; linear in between."""
