"""GistNet, trained through a base model that stays as it is.

    L = mean over tokens in full, in the context or behind it, of -log p(next token | context with gists)
        + kl_weight * mean over the horizon of KL(p(. | whole window in full) || p(. | context with gists))

of one random cut of each history, of any length. The base model was trained on tokens: a gist has to become something
that it can read. The first term says so at every token of the context, the second at the horizon says what of the full
context the gists should have kept. Nothing but GistNet has a gradient. Where it is asked for, a low-rank change of the
base model's queries and values has one, too (`lensjax.models.lora`): gists are read with it, the whole window is not.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lensjax._settings import Count, NonNegative, Positive, PositiveInt, require, settings
from lensjax.context import rollouts
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.context.geometry import Geometry
from lensjax.context.working import WorkingContext
from lensjax.models import Models, Params, hyperlora, lora
from lensjax.models.decision import split
from lensjax.training import nll
from lensjax.training.metrics import Metrics
from lensjax.training.optim import schedules
from lensjax.training.optim.optimizer import make_optimizer
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import Batch
from lensjax.training.steps.update import Learner, gradient_step, init_learner, split_parts

TRAINED = ("gist",)
LORA_STREAM = 2**31
"""What the key of fresh deltas is folded with: no step's number."""


@settings("gists")
class GistTrainingConfig:
    """Training of GistNet.

    Example:
      >>> from lensjax.training.steps.gists import GistTrainingConfig
      >>> GistTrainingConfig(at_once=0)
      Traceback (most recent call last):
      ValueError: gists.at_once must be at least 1, got 0
    """

    steps: Count = 0
    """0 leaves it out."""
    learning_rate: Positive = 1e-4
    kl_weight: NonNegative = 1.0
    """Weight of the divergence from what the full context predicts; 0 saves reading it."""
    at_once: PositiveInt | None = None
    """Sequences whose activations are held at a time, None for the whole batch. Fewer take less memory, and the base
    model reads each context once more on the way back."""
    lora_rank: Count = 0
    """Above 0, of a change of the base model's queries and values that is trained with GistNet, and stays from then on;
    in bfloat16 what is smaller than a weight's last bit is lost."""

    def _check(self) -> None:
        require(
            self.steps > 0 or self.lora_rank == 0,
            f"gists.lora_rank is {self.lora_rank} and gists.steps 0, so that nothing trains it: raise gists.steps",
        )


def gist_geometry(recipe: Recipe) -> Geometry:
    """The history of a recipe with gists in the place of what it omits."""
    return replace(recipe.geometry, omit=False, sink_blocks=0)


def gist_capacity(recipe: Recipe) -> int:
    """Entries of the longest context: of the longer end of the curriculum, with gists.

    Raises:
      ValueError: with gists no context is so short.
    """
    fraction = max(recipe.hyper.context_start, recipe.hyper.context_end)
    return gist_geometry(recipe).length_of_fraction(fraction, name="hyper.context_start")


def init_gists_state(
    key: Array, *, recipe: Recipe, params: dict[str, Params], lora_rank: int = 0
) -> tuple[Learner, dict[str, Params]]:
    """A state before the first step.

    Args:
      key: PRNG key, consumed.
      recipe: read is the optimizer.
      params: parameters of `base` and `gist`; that of `gist` is copied.
      lora_rank: of the change of the base model that is trained beside it; 0 for none.

    Returns:
      `Learner` of `gist`, and of `lora` where it has a rank; and the base model's, as they are.

    Raises:
      ValueError: the base model has no matrices that could be changed.
    """
    trained, frozen = split_parts({name: params[name] for name in ("base", "gist")}, TRAINED)
    if lora_rank:
        trained["lora"] = lora.init(jax.random.fold_in(key, LORA_STREAM), params["base"], rank=lora_rank)
    return init_learner(key, trained, tx=make_optimizer(recipe.optimizer)), frozen


def gists_step(
    state: Learner,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    recipe: Recipe,
    settings: GistTrainingConfig,
    models: Models,
) -> tuple[Learner, Metrics]:
    """One update on one batch; compile it as `train_step`.

    Args:
      state: of `init_gists_state`.
      batch: `tokens` int32[B, T].
      frozen: parameters of `base`.
      recipe: static; read are shapes, lengths and the optimizer.
      settings: static.
      models: static; base model and GistNet are called.

    Returns:
      The next state, and scalars by name: `loss`, its parts `gists/token_loss` and `gists/divergence`, and
      `gists/nll`, the loss of the horizon.

    Example:
      >>> import functools, jax, lensjax as lx
      >>> from lensjax.training.steps import gists
      >>> config = lx.Config(base=lx.BaseConfig(dim=16, layers=1), context=lx.ContextConfig(window=64, max_lod=1))
      >>> recipe, models = config.recipe, config.build_models()
      >>> params = {name: getattr(models, name).init(jax.random.key(0)) for name in ("base", "gist")}
      >>> state, frozen = gists.init_gists_state(jax.random.key(1), recipe=recipe, params=params)
      >>> settings = gists.GistTrainingConfig(steps=30)
      >>> step = functools.partial(gists.gists_step, recipe=recipe, settings=settings, models=models)
      >>> tokens = jax.random.randint(jax.random.key(2), (2, config.context.window), 0, 256)
      >>> state, metrics = jax.jit(step)(state, {"tokens": tokens}, frozen)
      >>> list(state.params), bool(metrics["gists/divergence"] >= 0)
      (['gist'], True)
    """
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), batch["tokens"].shape[0])

    def loss_fn(trained: dict[str, Params]) -> tuple[Array, Metrics]:
        def one(tokens: Array, key: Array) -> Metrics:
            return gists_loss(key, {**frozen, **trained}, tokens, recipe=recipe, settings=settings, models=models)

        report = jax.tree.map(jnp.mean, _each(one, batch["tokens"], keys, settings.at_once))
        return report["loss"], report

    rate = schedules.learning_rate(
        state.step,
        settings.learning_rate,
        schedule=recipe.optimizer.schedule,
        warmup_steps=recipe.optimizer.warmup_steps,
        steps=settings.steps,
    )
    after, seen = gradient_step(
        state,
        loss_fn,
        tx=make_optimizer(recipe.optimizer),
        rates={"learning_rate": rate, "weight_decay": 0.0},
    )
    return after, seen.aux | {"grad_norm": optax.tree.norm(seen.grads), "lr": rate}


def gists_eval_step(
    key: Array,
    params: dict[str, Params],
    batch: Batch,
    *,
    recipe: Recipe,
    settings: GistTrainingConfig,
    models: Models,
) -> Metrics:
    """What `gists_step` reports of its loss, of a held-out batch.

    Args:
      key: PRNG key of the cuts, consumed; fixed per batch, so that steps are compared on the same cuts.
      params: parameters of `base` and `gist`, and `lora` where there is one.
      batch: `tokens` int32[B, T].
      recipe: static.
      settings: static.
      models: static.
    """
    keys = jax.random.split(key, batch["tokens"].shape[0])

    def one(tokens: Array, row: Array) -> Metrics:
        return gists_loss(row, params, tokens, recipe=recipe, settings=settings, models=models)

    return jax.tree.map(jnp.mean, jax.vmap(one)(batch["tokens"], keys))


def gists_loss(
    key: Array,
    params: dict[str, Params],
    tokens: Array,
    *,
    recipe: Recipe,
    settings: GistTrainingConfig,
    models: Models,
) -> Metrics:
    """The loss of one window under a random cut of its history; see `context_loss`.

    Args:
      key: PRNG key of the cut, consumed.
      params: as for `context_loss`.
      tokens: int32[T].
      recipe: static.
      settings: static.
      models: static.
    """
    geometry, capacity = gist_geometry(recipe), gist_capacity(recipe)
    share = recipe.hyper.high_lod_share
    context = rollouts.sample_of_any_length(key, share, geometry=geometry, capacity=capacity)
    return context_loss(params, tokens, context, geometry, kl_weight=settings.kl_weight, models=models)


def context_loss(
    params: dict[str, Params],
    tokens: Array,
    context: WorkingContext,
    geometry: Geometry,
    *,
    kl_weight: float,
    models: Models,
) -> Metrics:
    """What a base model loses by reading gists.

    Args:
      params: parameters of `base` and `gist`, and `lora` where there is one; no gradient reaches the first.
      tokens: int32[T], the window.
      context: of its history.
      geometry: the history.
      kl_weight: static weight of the divergence.
      models: static.

    Returns:
      `loss` and its parts, float32[]; see `gists_step`. The divergence is 0 where its weight is: it is not computed.
    """
    base, own, horizon = models.base, jax.lax.stop_gradient(params["base"]), tokens.shape[0] - geometry.history
    window = split(tokens, horizon=horizon)
    tree = trees.build(
        base.embed(own, window.history),
        lambda children: models.gist.apply(params["gist"], children),
        block_size=geometry.block_size,
        max_lod=geometry.max_lod,
    )
    read = nll.reading(base, own, contexts.materialise(tree, context), window.horizon)
    reader = hyperlora.adapt(own, params.get("lora", {}))
    logits = base.logits(reader, read.entries, jnp.arange(read.entries.spans.shape[0], dtype=jnp.int32))
    behind = jnp.take(logits, read.rows, axis=0)
    report = {
        "gists/token_loss": nll.in_full_nll(logits, read.entries, tokens),
        "gists/nll": optax.losses.softmax_cross_entropy_with_integer_labels(behind, window.horizon).mean(),
        "gists/divergence": jnp.zeros(()),
    }
    if kl_weight:
        whole = nll.reading(base, own, contexts.in_full(tree.levels[0], jnp.arange(geometry.history)), window.horizon)
        full, seen = (jax.nn.log_softmax(rows) for rows in (base.logits(own, whole.entries, whole.rows), behind))
        report["gists/divergence"] = optax.losses.kl_divergence_with_log_targets(seen, full).mean()
    return report | {"loss": report["gists/token_loss"] + kl_weight * report["gists/divergence"]}


def _each(one: Callable[[Array, Array], Metrics], tokens: Array, keys: Array, at_once: int | None) -> Metrics:
    """Reports of all sequences, `at_once` of them at a time, whose activations are computed anew on the way back."""
    if at_once is None or at_once >= tokens.shape[0]:
        return jax.vmap(one)(tokens, keys)
    again = jax.checkpoint(one)
    return jax.lax.map(lambda row: again(*row), (tokens, keys), batch_size=at_once)
