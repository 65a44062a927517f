"""One run of the smallest size at which everything happens, shared by the tests of the training core.

Compiling is what these tests cost, so the configurations are few, each function of one is compiled at most once, and
XLA's optimisations, which take half of that time, are off.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax import _settings
from lensjax.models import GistModel, LensModel, Models, Params, decision
from lensjax.models.base_lm import BaseConfig
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training import scoring
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.metrics import Metrics
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import Batch, ContextConfig, ScoredVariants
from lensjax.training.steps import difficulty, preference
from lensjax.training.steps.train_state import TrainState, init_train_state
from tests.foreign import ForeignModel

VOCABULARY = 16
SMALL = Config(
    steps=12,
    batch_size=3,
    base=BaseConfig(vocab_size=VOCABULARY, dim=16, layers=1, heads=2, kv_heads=1, mlp_dim=32),
    gist=GistConfig(heads=2),
    lens=LensConfig(dim=16, layers=1, heads=2, mlp_dim=32),
    context=ContextConfig(window=36, block_size=2, max_lod=2, horizon=4, recent_tokens=8, rollouts=3),
    # A history of 32 tokens. Lengths 25 to 16; below 20 no cut does without LOD 2.
    hyper=Hyperparameters(context_start=0.8, context_end=0.5, high_lod_share=0.3),
    # A norm that is never reached: clipping would let the gradient of one part scale the others.
    optimizer=OptimizerConfig(warmup_steps=2, curriculum_steps=6, clip_norm=1e9),
    data=DataConfig(task="recall"),
)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` for functions that are slow to compile and quick to run."""
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):  # the option is gone after it
        quick["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=quick, **options)


class Run:
    """A configuration, its models, and what is compiled of them."""

    def __init__(self, make_models: Callable[[Config], Models] = Config.build_models, **changes: Any) -> None:
        self.config = _settings.replace(SMALL, **changes)
        self.recipe = self.config.recipe
        self._make_models = make_models

    @functools.cached_property
    def models(self) -> Models:
        return self._make_models(self.config)

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
        step = functools.partial(preference.train_step, recipe=self.recipe, models=self.models)
        return jit(step, donate_argnums=0)

    def state(self, seed: int = 0, *, step: int = 0, **hyper: float) -> TrainState:
        """A state that may be donated, at a step, with some hyperparameters changed as data."""
        state = jax.tree.map(jnp.copy, self._fresh(seed)[0])
        changed = {name: jnp.asarray(value, jnp.float32) for name, value in hyper.items()}
        return replace(state, step=jnp.asarray(step, jnp.int32), hyper=replace(state.hyper, **changed))

    def frozen(self, seed: int = 0) -> dict[str, Params]:
        """The parts that `state` does not train."""
        return self._fresh(seed)[1]

    def params(self, seed: int = 0) -> dict[str, Params]:
        """Of all parts; read only."""
        state, frozen = self._fresh(seed)
        return {**frozen, **state.params}

    @functools.cache  # noqa: B019
    def _fresh(self, seed: int) -> tuple[TrainState, dict[str, Params]]:
        return init_train_state(jax.random.key(seed), recipe=self.recipe, models=self.models)

    def history(
        self, state: TrainState, steps: int, frozen: dict[str, Params] | None = None
    ) -> tuple[list[TrainState], list[Metrics]]:
        """All states of a run, the first one included, and the reports of its steps; step i reads `batch(i)`."""
        # JAX's lowering of the gradient of bfloat16 attention does not pass under strict promotion.
        frozen = self.frozen() if frozen is None else frozen
        promotion = "standard" if self.config.dtype == "bfloat16" else "strict"
        states, reports = [jax.tree.map(jnp.copy, state)], []
        for index in range(steps):
            with jax.numpy_dtype_promotion(promotion):
                state, report = self.train_step(state, batch(index), frozen)
            states.append(jax.tree.map(jnp.copy, state))
            reports.append(report)
        return states, reports

    def observe(
        self, state: TrainState, tokens: Batch, frozen: dict[str, Params] | None = None
    ) -> tuple[ScoredVariants, np.ndarray, np.ndarray | None]:
        """What the objective of the next step is given: variants, and scores of the policy and of its anchor."""
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), tokens["tokens"].shape[0])
        length = difficulty.current_length(state.step, state.hyper, recipe=self.recipe)
        params = {**(self.frozen() if frozen is None else frozen), **state.params}
        scored = self.score_variants(params, tokens["tokens"], keys, length, state.hyper.high_lod_share)
        scores = self.policy_scores(params["lens"], scored.entries)
        anchor = None if state.anchor is None else self.policy_scores(state.anchor, scored.entries)
        return scored, scores, anchor

    @functools.cached_property
    def score_variants(self) -> Callable[..., ScoredVariants]:
        def score(params: Any, tokens: Any, keys: Any, length: Any, high_lod_share: Any) -> ScoredVariants:
            one = functools.partial(
                scoring.score_variants,
                models=self.models,
                context=self.recipe.context,
                capacity=self.recipe.capacity,
            )
            return jax.vmap(lambda row, key: one(key, params, row, length, high_lod_share))(tokens, keys)

        return jit(score)

    @functools.cached_property
    def policy_scores(self) -> Callable[..., Any]:
        return jit(functools.partial(decision.policy_scores, self.models.lens))


def batch(seed: int = 0, size: int = 3) -> Batch:
    """Random tokens."""
    tokens = np.random.default_rng(seed).integers(0, ForeignModel.vocab_size, (size, SMALL.context.window))
    return {"tokens": jnp.asarray(tokens, jnp.int32)}


def tiny_models(config: Config) -> Models:
    """Models whose base is no Flax module."""
    dim = ForeignModel.dim
    return Models(
        base=ForeignModel(),
        gist=GistModel(config.gist, dim, config.context.block_size),
        lens=LensModel(config.lens, dim, config.context.max_lod),
    )


# Everything is trained and every term is on.
FULL = Run(
    trainable=("base", "gist", "lens"),
    **{
        "hyper.kl_weight": 0.5,
        "hyper.smooth_weight": 0.5,
        "hyper.gist_delta_weight": 0.5,
        "hyper.temperature_end": 0.5,
        "hyper.collapse_weight": 0.7,
        "hyper.hard_negative_ratio": 0.5,
    },
)

# What is trained by default, and no KL.
LENS = Run()

# Another base model, and the other choice wherever the objective has one. It starts at the length of the history.
OTHER = Run(
    tiny_models,
    trainable=("lens", "base"),
    **{
        "gist.heads": 1,
        "hyper.kl_weight": 0.5,
        "hyper.context_start": 1.0,
        "hyper.anchor_beta": 0.75,
        "objective.anchor": "ema",
        "objective.targets": "worse_only",
        "objective.granularity": "pair",
        "objective.max_pairs": 2,
    },
)

HALF_PRECISION = Run(
    dtype="bfloat16",
    trainable=("gist", "lens"),
    **{"hyper.kl_weight": 0.5, "objective.anchor": "fixed", "base.gaussian_rope": True, "gist.pooling": "query"},
)

# The base model reads nothing of what is collapsed; the policy sees a map of it, and what the base model looks at.
OMISSION: dict[str, Any] = {
    "base.layers": 2,
    "lens.reads": "attention",
    "lens.recency": True,
    "context.max_lod": 1,
    "context.omit": True,
    "hyper.kl_weight": 0.5,
    "focus.start": "recency",
    "focus.steps": 2,
    "focus.margin": 0.01,
    "online.steps": 12,
    "online.refocus_steps": 2,
    "pretrain.steps": 12,
    "pretrain.rollout_weight": 0.5,
}
OMITTING = Run(trainable=("base", "gist", "lens"), **OMISSION)
