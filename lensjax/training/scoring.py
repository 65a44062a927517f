"""One window to its scored variants: recency and rollouts of the history, and their NLL on the horizon."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lensjax._settings import Bound, Count, PositiveInt, Variants, at_least, require, settings
from lensjax.context import allocator
from lensjax.context import working as contexts
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import HIGHEST_LOD, Geometry
from lensjax.context.rollouts import collapses_for_length, is_distinct, sample_cut, sample_rollouts
from lensjax.context.working import Entries, WorkingContext
from lensjax.models import Models, Params
from lensjax.models.decision import Window, build_tree, policy, split
from lensjax.training import adversary, key_tokens, nll, own_rollouts
from lensjax.training.adversary import RegretHead
from lensjax.training.key_tokens import KeyConfig


@settings("context")
class ContextConfig:
    """A training window, and the variants drawn of its history.

    Example:
      >>> import lensjax as lx
      >>> context = lx.ContextConfig(window=64, block_size=4, horizon=8, recent_tokens=4)
      >>> context.history, context.geometry.shortest
      (56, 8)
    """

    window: PositiveInt = 256
    """Tokens in a training window [T]: a history, and the horizon behind it."""
    block_size: Annotated[int, at_least(2)] = 8
    """Children per gist [K]."""
    max_lod: Annotated[int, Bound(1, HIGHEST_LOD)] = 2
    """Highest level of detail [L]."""
    horizon: PositiveInt = 32
    """Tokens behind the cursor, on which every variant is scored and which no policy sees [H]."""
    omit: bool = False
    """Whether the base model reads nothing of what is collapsed, rather than its gist; `max_lod` is 1 then."""
    sink_blocks: Count = 0
    """With omission, first blocks of the history, which stay in full in every variant: attention sinks."""
    recent_tokens: PositiveInt = 8
    """Last tokens of the history, which stay at LOD 0 in every variant: the query."""
    rollouts: Variants = 4
    """Random variants per sequence [N]."""
    local_edits: Count = 0
    """Above 0 the rollouts of a sequence are one random cut and N - 1 that differ from it by so many swaps: then a
    preference concerns few spans. The baseline, which differs from them everywhere, is in no pair."""
    own_rollouts: Count = 0
    """Of the rollouts but the first, how many the policy itself draws, at `hyper.own_temperature`; the others then draw
    each legal swap alike, so that all probabilities are known. Needs `local_edits`. Held-out variants stay random."""
    proposed_rollouts: Count = 0
    """Of the rollouts, how many an adversary chooses out of `candidates` random ones: those that it expects the policy
    to be most wrong about. Held-out variants stay random."""
    candidates: Variants = 32
    """Cuts that the adversary chooses from; each costs a pass of LensNet, and none of the base model."""
    reward: Literal["mean", "key"] = "mean"
    """Whose loss a variant is rewarded for: `mean` of all tokens of the horizon, or `key` of those that old history
    helps to predict, of all where there are none. Losses in the rows of training are then of these."""
    key: KeyConfig = field(default_factory=KeyConfig)
    """What makes a key token, for the reward and for what is measured."""

    def _check(self) -> None:
        require(
            self.local_edits == 0 or self.rollouts >= 2,
            "context.rollouts must be at least 2 where context.local_edits compares them with each other, got "
            f"{self.rollouts}",
        )
        require(
            self.own_rollouts == 0 or self.local_edits > 0,
            "context.own_rollouts needs context.local_edits, the swaps that the policy draws: set context.local_edits "
            f"to 1 or more, or context.own_rollouts to 0, got {self.own_rollouts}",
        )
        require(
            self.own_rollouts < self.rollouts,
            f"context.own_rollouts must be below context.rollouts {self.rollouts}, whose first is the random cut that "
            f"they start from, got {self.own_rollouts}",
        )
        require(
            self.proposed_rollouts < self.rollouts,
            f"context.proposed_rollouts must be below context.rollouts {self.rollouts}, of which one at least is drawn "
            f"at random, got {self.proposed_rollouts}",
        )
        require(
            self.proposed_rollouts <= self.candidates,
            f"context.candidates must be at least context.proposed_rollouts {self.proposed_rollouts}, which are chosen "
            f"of them, got {self.candidates}",
        )
        require(
            self.proposed_rollouts == 0 or self.own_rollouts == 0,
            "context.own_rollouts must be 0 with context.proposed_rollouts, how probable which are nobody knows, got "
            f"{self.own_rollouts}",
        )
        require(
            not self.omit or self.max_lod == 1,
            f"context.max_lod must be 1 with context.omit (a block is read or not), got {self.max_lod}",
        )
        require(
            self.omit or self.sink_blocks == 0,
            f"context.sink_blocks must be 0 without context.omit (a context shows the whole history), got "
            f"{self.sink_blocks}",
        )
        shortest = self.block_size * (self.sink_blocks + 1) + self.recent_tokens + self.horizon
        block = "a block behind context.sink_blocks" if self.sink_blocks else "a block"
        require(
            self.window >= shortest,
            f"context.window must hold {block}, context.recent_tokens and context.horizon, at least {shortest}, got "
            f"{self.window}",
        )

    @property
    def asks_policy(self) -> bool:
        """Whether LensNet has a say in which variants are drawn."""
        return self.own_rollouts > 0 or self.proposed_rollouts > 0

    @property
    def history(self) -> int:
        """Tokens before the cursor [C]: all that a policy may look at."""
        return self.window - self.horizon

    @property
    def geometry(self) -> Geometry:
        """The history, and the cuts that it allows."""
        return Geometry(self.history, self.block_size, self.max_lod, self.recent_tokens, self.omit, self.sink_blocks)


Batch = dict[str, Array]
"""`tokens` int32[B, T]; where answers are known also `answers` int32[B, A], first tokens of the blocks to be shown."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredVariants:
    """The variants of one sequence, and what each was worth.

    Example:
      >>> import dataclasses, lensjax as lx
      >>> [field.name for field in dataclasses.fields(lx.ScoredVariants)]
      ['contexts', 'distinct', 'entries', 'nll', 'worth', 'log_ratio', 'features']
    """

    contexts: WorkingContext
    """V working contexts, recency first."""
    distinct: Array
    """bool[V]: False for duplicates of an earlier variant."""
    entries: Entries
    """What models read of them, leading axis V."""
    nll: Array
    """float32[V]: nats per token on the horizon, of those that `ContextConfig.reward` names."""
    worth: Array | None = None
    """float32[N]: what a teacher says that each node of the history is worth in full (`lessons.node_worths`); None
    without `objective.gate`."""
    log_ratio: Array | None = None
    """float32[V]: log of how probable the policy finds a variant, beside what drew it (`own_rollouts.draw`); 0 for
    recency and the first rollout. None where the policy draws none."""
    features: Array | None = None
    """float32[N, F]: what an adversary knew of each rollout, its proposals last. None without one."""


def reward_weights(
    models: Models, params: dict[str, Params], window: Window, context: ContextConfig, short: int | None
) -> Array | None:
    """Weights of the tokens of the horizon in the reward, constants.

    Args:
      models: the base model is called.
      params: parameters of `base`; no gradient reaches them.
      window: history and horizon.
      context: what is rewarded.
      short: tokens of the short history that key tokens are told by; may be None where all tokens are rewarded.

    Returns:
      float32[H] that sum to 1, or None where all weigh the same.

    Raises:
      ValueError: key tokens are rewarded, and `short` is None.
    """
    if context.reward == "mean":
        return None
    if short is None:
        raise ValueError("short must be given where context.reward is key: pass recipe.short")
    return key_tokens.key_weights(key_tokens.find(models.base, params["base"], window, context.key, short=short))


def score_variants(
    key: Array,
    params: dict[str, Params],
    tokens: Array,
    length: ArrayLike,
    high_lod_share: ArrayLike,
    *,
    models: Models,
    context: ContextConfig,
    capacity: int,
    short: int | None = None,
    own_temperature: ArrayLike | None = None,
    head: RegretHead | None = None,
) -> ScoredVariants:
    """Draws the variants of one history and measures each on the horizon behind it.

    Args:
      key: PRNG key, consumed.
      params: parameters of `base` and `gist`, and of `lens` where `context.asks_policy`.
      tokens: int32[T].
      length: int32[], entries of every variant, at most `capacity`; may be traced.
      high_lod_share: float32[], see `rollouts.sample_cut`.
      models: base model and GistNet are called.
      context: the window, what is rewarded, and how variants are drawn.
      capacity: static number of entries W.
      short: static, see `reward_weights`; read where key tokens are rewarded.
      own_temperature: float32[], above 0, of the policy's own draws, through which no gradient passes.
      head: the adversary, which proposes rollouts.

    Returns:
      `ScoredVariants` with V = N + 1.

    Raises:
      ValueError: the policy draws rollouts and `own_temperature` is None, or the adversary does and `head` is None.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lensjax as lx
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), context=lx.ContextConfig(window=64, max_lod=1))
      >>> models, shape = config.build_models(), {"context": config.context, "capacity": config.capacity}
      >>> params = {name: getattr(models, name).init(jax.random.key(0)) for name in ("base", "gist")}
      >>> score = jax.jit(functools.partial(lx.score_variants, models=models, **shape))
      >>> scored = score(jax.random.key(1), params, jnp.arange(64), config.budget, 0.0)
      >>> scored.contexts.length.tolist(), scored.nll.shape
      ([18, 18, 18, 18, 18], (5,))
    """
    geometry = context.geometry
    window = split(tokens, horizon=context.horizon)
    tree = build_tree(models, params, window.history, geometry)
    recency = contexts.recency(length, geometry, capacity=capacity)
    log_ratio = known = None
    at_random = context.rollouts - context.proposed_rollouts
    rollouts = at_random + context.candidates if context.proposed_rollouts else context.rollouts
    if context.own_rollouts:
        if own_temperature is None:
            raise ValueError("own_temperature must be given where context.own_rollouts is above 0")
        drawn, ratios = own_rollouts.draw(
            key,
            policy(models.lens, jax.lax.stop_gradient(params["lens"]), tree),
            length,
            high_lod_share,
            rollouts=context.rollouts,
            own=context.own_rollouts,
            draws=context.local_edits,
            temperature=own_temperature,
            geometry=geometry,
            capacity=capacity,
        )
        log_ratio = jnp.append(0.0, ratios)
    elif context.local_edits:
        drawn, distinct = local_rollouts(
            key,
            length,
            high_lod_share,
            rollouts=rollouts,
            edits=context.local_edits,
            geometry=geometry,
            capacity=capacity,
        )
    else:
        drawn, distinct = sample_rollouts(
            key, length, high_lod_share, rollouts=rollouts, geometry=geometry, capacity=capacity
        )
    if context.proposed_rollouts:
        if head is None:
            raise ValueError("head must be given where context.proposed_rollouts is above 0")
        known = adversary.features(models, params["lens"], tree, drawn, geometry)
        chosen = adversary.propose(head, known, distinct, random=at_random, proposed=context.proposed_rollouts)
        drawn, known = jax.tree.map(lambda leaf: leaf[chosen], (drawn, known))
    variants = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), recency, drawn)
    weights = reward_weights(models, params, window, context, short)
    measured, entries = nll.variant_nll(models.base, params["base"], tree, variants, window.horizon, geometry, weights)
    # A rollout may be recency, too: where nothing has to be collapsed each of them is.
    cuts = jax.vmap(lambda variant: contexts.to_cut(variant, geometry))(variants)
    return ScoredVariants(variants, is_distinct(cuts), entries, measured, log_ratio=log_ratio, features=known)


def local_rollouts(
    key: Array,
    length: ArrayLike,
    high_lod_share: ArrayLike,
    *,
    rollouts: int,
    edits: int,
    geometry: Geometry,
    capacity: int,
) -> tuple[WorkingContext, Array]:
    """Draws one random working context, and N - 1 that a few random swaps make of it.

    Independent rollouts differ nearly everywhere, and which of the spans made one the better takes many of them to
    learn. These differ in a few spans, so that a preference says something of each.

    Args:
      key: PRNG key, consumed.
      length: int32[], entries of every context; may be traced.
      high_lod_share: float32[], of the first one; see `rollouts.sample_cut`.
      rollouts: N, static.
      edits: static number of swaps, of one expansion and the collapse that pays for it; fewer where no more are legal.
      geometry: the window.
      capacity: static number of entries W, at least the length.

    Returns:
      A `WorkingContext` with a leading axis N, and bool[N]: which of them differ from all before them.
    """
    cut_key, swap_key = jax.random.split(key)
    first = sample_cut(cut_key, collapses_for_length(length, geometry), high_lod_share, geometry)
    centre, settings = allocator.from_cut(first, geometry), FocusConfig(max_edits=edits, cooldown=0)

    def swapped(scores: Array) -> Array:
        return allocator.to_cut(allocator.swap(centre, scores, geometry, settings=settings)[0], geometry)

    # The allocator makes the swaps that random scores of blocks ask for. A gist of gists has the best score of its
    # blocks, and so is opened down to the tokens: halfway the model sees little more, and no preference comes of it.
    scores = [jax.random.uniform(swap_key, (rollouts - 1, geometry.blocks(1)))]
    for lod in range(2, geometry.max_lod + 1):
        members = scores[-1][:, : geometry.blocks(lod) * geometry.block_size]
        scores.append(members.reshape(rollouts - 1, geometry.blocks(lod), geometry.block_size).max(axis=-1))
    others = jax.vmap(swapped)(jnp.concatenate(scores, axis=1))
    cuts = jnp.concatenate([first[None], others])
    to_context = jax.vmap(lambda cut: contexts.from_cut(cut, geometry, capacity=capacity))
    return to_context(cuts), is_distinct(cuts)
