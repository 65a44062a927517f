"""Everything that a training step compiles, as one static value."""

import dataclasses
from typing import Literal

from lensjax._settings import Count, require, settings
from lensjax.context.allocator import FocusConfig
from lensjax.context.geometry import Geometry
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.ladder import CurriculumConfig
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig
from lensjax.training.teachers import DistillConfig
from lensjax.training.terms.inputs import ObjectiveConfig

Part = Literal["base", "gist", "lens", "hypernet"]
SOFTENING = ("label_smoothing", "gap_margin")
"""Hyperparameters that soften a logistic loss."""
COMPILED = ("kl_weight", "attribution_weight", *SOFTENING)
"""Hyperparameters that leave something out of the compiled step where they are 0 in a `Recipe`."""


@settings()
class Recipe:
    """How LensNet is trained. Frozen and hashable: bind it with `functools.partial` before `jax.jit`.

    Example:
      >>> import lensjax as lx
      >>> recipe = lx.Recipe(context=lx.ContextConfig(window=64, horizon=8, max_lod=1))
      >>> recipe.geometry.history, recipe.capacity
      (56, 42)
    """

    steps: Count = 1000
    """LensNet training steps on preferences; 0 leaves them out."""
    trainable: tuple[Part, ...] = ("lens",)
    """What those steps train; `hypernet` adapts LensNet to each document."""
    context: ContextConfig = dataclasses.field(default_factory=ContextConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    focus: FocusConfig = dataclasses.field(default_factory=FocusConfig)
    hyper: Hyperparameters = dataclasses.field(default_factory=Hyperparameters)
    """Where a `TrainState` starts. What they compile: the capacity, and what `COMPILED` names."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    """A stage of its own; and the teacher of `objective.gate`, its temperature and sharpness."""
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)

    def _check(self) -> None:
        require(
            self.steps == 0 or self.steps > self.optimizer.warmup_steps,
            f"steps must be above optimizer.warmup_steps {self.optimizer.warmup_steps}, got {self.steps}",
        )
        require(
            0 < len(self.trainable) == len(set(self.trainable)),
            f"trainable must name one or more different parts of base, gist, lens, hypernet, got {self.trainable}",
        )
        require(
            self.focus.start == "uniform" or self.context.omit,
            "focus.start recency needs context.omit: without omission every context covers the whole history",
        )
        compared = self.context.rollouts + (self.context.local_edits == 0)
        require(
            self.objective.keep is None or self.objective.keep <= compared,
            f"objective.keep must be at most the {compared} variants that are compared (lower it, or raise "
            f"context.rollouts), got {self.objective.keep}",
        )
        held = compared if self.objective.keep is None else self.objective.keep
        require(
            self.objective.group_baseline != "sets" or self.objective.set_size < held,
            f"objective.set_size must be below the {held} variants that are compared, for there to be more than one "
            f"set (lower it, or raise context.rollouts or objective.keep), got {self.objective.set_size}",
        )
        require(
            self.objective.mask != "trust" or self.hyper.trust_low < self.hyper.trust_high,
            f"hyper.trust_low must be below hyper.trust_high {self.hyper.trust_high} with objective.mask trust, got "
            f"{self.hyper.trust_low}",
        )
        # Values are relative to the anchor's: a margin over the policy of the step before is wanted anew at each step.
        require(
            not self.objective.is_over_groups or self.hyper.kl_weight == 0 or self.objective.anchor != "previous",
            f"objective.name {self.objective.name} with hyper.kl_weight {self.hyper.kl_weight} compares values with "
            "the anchor's, and objective.anchor previous moves along with the policy, so that nothing is there to "
            "converge to: set objective.anchor to fixed, ema or stage, or hyper.kl_weight to 0",
        )
        require(
            self.hyper.gist_delta_weight == 0 or bool({"base", "gist"} & set(self.trainable)),
            "hyper.gist_delta_weight must be 0 where trainable names neither base nor gist, whose loss it weighs, got "
            f"{self.hyper.gist_delta_weight}",
        )
        require(
            self.context.reward == "mean" or not {"base", "gist"} & set(self.trainable),
            "context.reward must be mean where trainable names base or gist, whose loss is of all tokens, got "
            f"{self.context.reward}",
        )
        for name in SOFTENING:
            require(
                getattr(self.hyper, name) == 0 or self.objective.name in ("spans", "logistic"),
                f"hyper.{name} must be 0 where objective.name is {self.objective.name}, which has no logistic loss "
                f"that it could soften: set objective.name to spans or logistic, got {getattr(self.hyper, name)}",
            )
        require(
            self.hyper.attribution_weight == 0 or self.objective.name != "span_advantages",
            "hyper.attribution_weight must be 0 where objective.name is span_advantages, which learns from nothing but "
            f"the advantages of spans, got {self.hyper.attribution_weight}",
        )
        for name in ("context_start", "context_end"):
            self.geometry.length_of_fraction(getattr(self.hyper, name), name=f"hyper.{name}")
        self._check_weights()
        self._check_curriculum()
        if "hypernet" in self.trainable:
            self._check_hypernet()

    def _check_weights(self) -> None:
        context = self.context
        require(
            self.objective.pair_weights == "none" or context.proposed_rollouts == 0,
            "context.proposed_rollouts must be 0 where objective.pair_weights is importance, which must know how "
            f"probable a rollout was: set one of them back, got {context.proposed_rollouts}",
        )
        require(
            self.objective.group_weights == "none" or not context.asks_policy,
            "context.own_rollouts and context.proposed_rollouts must be 0 where objective.group_weights is importance, "
            f"which takes all rollouts as drawn alike, got {context.own_rollouts} and {context.proposed_rollouts}",
        )

    def _check_curriculum(self) -> None:
        require(
            not self.curriculum.climbs or self.optimizer.curriculum_steps is None,
            "optimizer.curriculum_steps must be None with curriculum.name self_play, whose ladder decides how hard a "
            f"step is, got {self.optimizer.curriculum_steps}",
        )
        require(
            self.curriculum.high_lod_share is None or self.context.max_lod > 1,
            "curriculum.high_lod_share needs context.max_lod above 1, a level that it is a share of, got "
            f"{self.curriculum.high_lod_share}",
        )

    def _check_hypernet(self) -> None:
        context = self.context
        require(
            context.rollouts >= 2,
            f"context.rollouts must be at least 2 for the hypernetwork, which compares them, got {context.rollouts}",
        )
        require(
            self.objective.name == "spans",
            f"objective.name must be spans for the hypernetwork, which learns from them, got {self.objective.name}",
        )
        require(
            self.objective.pair_weights == "none",
            "objective.pair_weights must be none for the hypernetwork, which learns from pairs of equal weight, got "
            f"{self.objective.pair_weights}",
        )
        require(
            self.objective.gate == "none",
            "objective.gate must be none for the hypernetwork, which learns from the preferences of every document, "
            f"got {self.objective.gate}",
        )
        require(
            not self.curriculum.climbs,
            "curriculum.name must be fixed for the hypernetwork, whose support is as long as the step says, got "
            f"{self.curriculum.name}",
        )
        require(
            not context.asks_policy,
            "context.own_rollouts and context.proposed_rollouts must be 0 for the hypernetwork, whose policy differs "
            f"from document to document, got {context.own_rollouts} and {context.proposed_rollouts}",
        )
        shortest = context.block_size * (context.sink_blocks + 1) + context.recent_tokens + 2 * context.horizon
        require(
            context.window >= shortest,
            "context.window must hold a block, context.recent_tokens and two horizons for the hypernetwork, which "
            f"reads what was measured one horizon before the cursor: at least {shortest}, got {context.window}",
        )
        earlier = dataclasses.replace(self.geometry, history=context.history - context.horizon)
        for name in ("context_start", "context_end"):
            where = (
                f"hyper.{name} (one context.horizon before the cursor, where the hypernetwork's support is measured)"
            )
            earlier.length_of_fraction(getattr(self.hyper, name), name=where)

    @property
    def geometry(self) -> Geometry:
        """The history, and the cuts that it allows."""
        return self.context.geometry

    @property
    def capacity(self) -> int:
        """Entries that the longest working context of the curriculum holds: the static size W."""
        return self.geometry.length_of_fraction(max(self.hyper.context_start, self.hyper.context_end))

    @property
    def budget(self) -> int:
        """Entries of a working context at the end of the curriculum."""
        return self.geometry.length_of_fraction(self.hyper.context_end)

    @property
    def short(self) -> int:
        """Tokens of the short history that key tokens are told by: fewer than the curriculum's shortest context has.

        The lengths are those of the `Recipe`, so that a token is key at every step, and whatever a sweep makes of them.
        """
        shortest = min(self.hyper.context_start, self.hyper.context_end)
        return self.context.key.tokens(self.geometry.length_of_fraction(shortest))

    @property
    def draws_by_policy(self) -> bool:
        """Whether what a step draws depends on what the policy has learned."""
        return self.context.asks_policy or self.curriculum.climbs

    @property
    def has_anchor(self) -> bool:
        """Whether the KL term is compiled in: a weight of 0 costs no second forward pass."""
        return self.hyper.kl_weight > 0

    @property
    def is_softened(self) -> bool:
        """Whether label smoothing and margins by strength are compiled in."""
        return any(getattr(self.hyper, name) > 0 for name in SOFTENING)

    @property
    def has_attribution(self) -> bool:
        """Whether the attribution of spans is compiled in beside the preference term."""
        return self.hyper.attribution_weight > 0

    @property
    def measured(self) -> "Recipe":
        """The recipe that held-out metrics are of: every pair of every sequence, whatever is learned from when."""
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, stages="one", gate="none"))

    @property
    def past(self) -> "Recipe":
        """The recipe at the cursor one horizon earlier, whose window is this one's history.

        See `lensjax.training.steps.adaptation`.
        """
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(Recipe)}
        earlier = dataclasses.replace(self.context, window=self.context.history)
        return Recipe(**{**fields, "context": earlier, "trainable": ("lens",)})
