"""Configurations: every field of every section refuses what it may not be, and rules over several fields hold."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from lensjax import _settings
from lensjax.context.geometry import Geometry
from lensjax.models.gistnet import GistConfig
from lensjax.runs.config import Config
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ContextConfig
from lensjax.training.steps.gists import GistTrainingConfig
from lensjax.training.terms.inputs import ObjectiveConfig

# Rules over several fields.

HYPERNET = {"trainable": ("hypernet",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 20}, "steps must be above optimizer.warmup_steps 20, got 20"),
        ({"pretrain.steps": 5}, "pretrain.steps must be above optimizer.warmup_steps 20, got 5"),
        ({"distill.steps": 6}, "distill.steps must be above optimizer.warmup_steps 20, got 6"),
        ({"online.steps": 7}, "online.steps must be above optimizer.warmup_steps 20, got 7"),
        ({"output_dir": ""}, "output_dir must name a folder, got an empty string"),
        ({"trainable": ()}, "trainable must name one or more different parts of base, gist, lens, hypernet, got ()"),
        ({"trainable": ("lens", "lens")}, "trainable must name one or more different parts"),
        ({"base.dim": 60}, "base.dim must be a multiple of 2 * base.heads = 8 (rotary pairs), got 60"),
        ({"base.kv_heads": 3}, "base.heads must be a multiple of base.kv_heads 3, got 4"),
        ({"base.copy_heads": 3}, "base.copy_heads must be at most base.kv_heads 2, got 3"),
        ({"base.vocab_size": 255}, "base.vocab_size must be at least 256 for text, which is read as bytes, got 255"),
        ({"gist.heads": 5}, "base.dim must be a multiple of gist.heads 5, got 64"),
        ({"lens.dim": 65}, "lens.dim must be a multiple of lens.heads"),
        (
            {"context.window": 47},
            "context.window must hold a block, context.recent_tokens and context.horizon",
        ),
        ({"context.rollouts": 1, "context.local_edits": 2}, "context.rollouts must be at least 2 where context.local_"),
        ({"objective.keep": 6}, "objective.keep must be at most the 5 variants that are compared"),
        ({"objective.keep": 5, "context.local_edits": 1}, "objective.keep must be at most the 4 variants"),
        ({"hyper.context_end": 0.05}, "hyper.context_end asks for 11 entries"),
        ({"hyper.context_start": 0.05}, "hyper.context_start asks for 11 entries"),
        (
            {"hyper.gist_delta_weight": 0.5},
            "hyper.gist_delta_weight must be 0 where trainable names neither base nor",
        ),
        ({"stopping.min_improvement": 0.1}, "stopping.min_improvement is read only with stopping.patience"),
        ({"online.advantages": "mean"}, "online.episodes must be at least 2 where online.advantages mean"),
        ({"data.task": "text"}, "data.path must name a folder or a glob where data.task is text, got None"),
        ({"data.path": "texts"}, "data.path is read only where data.task is text: set data.task text, got 'stdlib'"),
        ({"base_run": "a", "start_from": "b"}, "base_run 'a' and start_from 'b' both give a base model: name one"),
        ({"steps": 0, "base_run": "a"}, "steps is 0 and base_run is 'a': there is nothing to do; raise steps or drop"),
        ({"steps": 0, "start_from": "a"}, "steps is 0 and start_from is 'a': there is nothing to do"),
        (HYPERNET | {"context.rollouts": 1}, "context.rollouts must be at least 2 for the hypernetwork"),
        (HYPERNET | {"objective.name": "ipo"}, "objective.name must be spans for the hypernetwork"),
        (HYPERNET | {"objective.pair_weights": "importance"}, "objective.pair_weights must be none for the hypern"),
        (HYPERNET | {"context.window": 79}, "context.window must hold a block, context.recent_tokens and two horizons"),
        (HYPERNET | {"context.window": 96, "hyper.context_end": 0.3}, "hyper.context_end (one context.horizon before"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _settings.replace(Config(), **changes)


def test_a_run_without_preferences_is_fine():
    assert _settings.replace(Config(), steps=0).steps == 0
    assert not _settings.replace(Config(), steps=0).trains_lens and Config().trains_lens
    for phase in ("distill", "online"):
        config = _settings.replace(Config(), steps=0, base_run="a", **{f"{phase}.steps": 30})
        assert config.trains_lens


def test_patience_counts_what_a_teacher_is_asked_for():
    changes = {"steps": 0, "pretrain.steps": 100, "eval_steps": 100, "stopping.patience": 2, "distill.steps": 500}
    assert _settings.replace(Config(), **changes).stopping.patience == 2
    with pytest.raises(ValueError, match=r"no phase has more than 1 evaluations .*distill\.steps 100"):
        _settings.replace(Config(), **changes | {"distill.steps": 100})


def test_values_of_variants_are_relative_to_an_anchor_that_does_not_move_with_the_policy():
    relative = {"hyper.kl_weight": 0.5, "objective.anchor": "previous"}
    message = (
        "objective.name ipo with hyper.kl_weight 0.5 compares values with the anchor's, and objective.anchor previous "
        "moves along with the policy, so that nothing is there to converge to: set objective.anchor to fixed, ema "
        "or stage, or hyper.kl_weight to 0"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        _settings.replace(Config(), **relative, **{"objective.name": "ipo"})
    for name, others in (("spans", {}), ("ipo", {"objective.anchor": "ema"}), ("ipo", {"objective.anchor": "fixed"})):
        assert _settings.replace(Config(), **(relative | {"objective.name": name} | others)).hyper.kl_weight == 0.5
    assert _settings.replace(Config(), **(relative | {"objective.name": "ipo", "hyper.kl_weight": 0.0}))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"name": "mse", "granularity": "pair"},
            "objective.granularity must be entry where objective.name is mse, an error of entries; got pair",
        ),
        ({"name": "mse", "group": "batch"}, "objective.group batch cannot go with objective.name mse"),
        ({"name": "span_advantages", "group": "batch"}, "objective.group batch cannot go with objective.name span_adv"),
        (
            {"name": "copg", "pair_weights": "importance"},
            "pair_weights importance needs a preference term over pairs: set objective.name spans or mse, got copg",
        ),
        (
            {"name": "span_advantages", "pair_weights": "importance"},
            "set objective.name spans or mse, got span_advantages",
        ),
        (
            {"name": "ipo", "group_baseline": "sets"},
            "objective.group_baseline sets needs objective.name grpo or gtpo, got ipo",
        ),
        (
            {"name": "span_advantages", "group_weights": "importance"},
            "objective.group_weights importance needs objective.name grpo or gtpo, got span_advantages",
        ),
        (
            {"name": "gtpo", "group_reward": "contrastive"},
            "objective.group_reward contrastive needs objective.name span_advantages, got gtpo",
        ),
        ({"mask": "trust"}, "objective.mask trust needs objective.name grpo or gtpo or span_advantages, got spans"),
        (
            {"name": "grpo", "mask": "informative"},
            "objective.mask informative needs objective.name gtpo or span_advantages, got grpo",
        ),
        (
            {"name": "grpo", "group": "batch", "group_baseline": "optimal"},
            "objective.group_baseline optimal is of the variants of one sequence: set objective.group sequence",
        ),
        ({"name": "gtpo", "group": "batch"}, "objective.group batch cannot go with objective.name gtpo"),
    ],
)
def test_objectives_that_cannot_go_together_are_refused(objective, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ObjectiveConfig(**objective)


def test_patience_that_cannot_run_out_is_refused():
    shape = {"steps": 400, "eval_steps": 100, "pretrain.steps": 100, "stopping.patience": 3}
    assert _settings.replace(Config(), **shape).stopping.patience == 3
    # The first evaluation is the best so far; three more are the last one.
    for changes in ({"stopping.patience": 4}, {"steps": 300}, {"eval_steps": 134}):
        with pytest.raises(ValueError, match=r"stopping\.patience \d cannot run out: .* than \d evaluations \(steps"):
            _settings.replace(Config(), **shape | changes)
    for name in ("pretrain.steps", "online.steps"):
        assert _settings.replace(Config(), **shape | {"steps": 300, name: 301}).stopping.patience == 3
    with pytest.raises(ValueError, match="no phase has more than 3 evaluations"):
        _settings.replace(Config(), **shape | {"steps": 300, "pretrain.steps": 400, "base_run": "runs/base"})


# What follows from a configuration.


def test_what_is_cut_is_the_history_before_the_cursor():
    shape = ContextConfig(window=100, horizon=30, block_size=8, max_lod=2, recent_tokens=5)
    assert shape.history == 70
    assert shape.geometry == Geometry(history=70, block_size=8, max_lod=2, recent_tokens=5)
    # One block, the query and the horizon are the least that there can be.
    assert ContextConfig(window=48, horizon=32, block_size=8, recent_tokens=8).geometry.blocks(1) == 1


def test_the_capacity_is_the_longest_length_of_the_curriculum_and_the_budget_its_last():
    assert Config().capacity == 224 - 7 * 7 == 175  # 0.8 * 224 = 179.2, rounded down
    growing = _settings.replace(Config(), **{"hyper.context_start": 0.7, "hyper.context_end": 0.9})
    assert growing.capacity == growing.budget == growing.geometry.length_of_fraction(0.9)
    assert Config().budget == Config().geometry.length_of_fraction(0.75)


def test_the_recipe_of_a_run_is_what_it_compiles_and_no_more():
    config = _settings.replace(Config(), **{"seed": 4, "hyper.margin": 0.3, "output_dir": "runs/elsewhere"})
    assert type(config.recipe) is Recipe
    assert config.recipe == _settings.replace(Config(), **{"hyper.margin": 0.3}).recipe != Config().recipe
    assert hash(config.recipe) == hash(_settings.replace(Config(), **{"hyper.margin": 0.3}).recipe)
    assert {item.name for item in dataclasses.fields(Recipe)} < {item.name for item in dataclasses.fields(Config)}
    assert config.recipe.past.geometry.history == config.context.history - config.context.horizon


def test_the_session_of_a_run_decides_as_it_was_trained():
    config = _settings.replace(Config(), **{"focus.steps": 2})
    session = config.session
    assert (session.geometry, session.budget, session.interval) == (config.geometry, config.budget, 32)
    assert session.focus == config.focus


def test_hyperparameters_are_a_pytree_of_scalars():
    hyper = Hyperparameters()
    assert len(jax.tree.leaves(hyper)) == len(dataclasses.fields(hyper))
    batch = jax.tree.map(lambda x: jnp.full(3, x), hyper)
    doubled = jax.jit(jax.vmap(lambda h: dataclasses.replace(h, temperature=2 * h.temperature)))(batch)
    assert doubled.temperature.tolist() == [2.0] * 3


def test_gists_are_trained_for_a_lensnet_that_is_trained_too():
    with pytest.raises(ValueError, match=r"gists\.steps is 30 and LensNet is not trained after it: raise steps"):
        Config(steps=0, gists=GistTrainingConfig(steps=30))
    with pytest.raises(ValueError, match=r"gists\.steps must be above optimizer\.warmup_steps 20, got 20"):
        Config(gists=GistTrainingConfig(steps=20))
    muon, trained = OptimizerConfig(name="muon"), GistTrainingConfig(steps=30)
    with pytest.raises(ValueError, match=r"optimizer\.name muon .* gists\.steps trains has none: raise gist\.layers"):
        Config(optimizer=muon, gists=trained)
    Config(optimizer=muon, gists=trained, gist=GistConfig(layers=1))
    # With omission an eighth of 224 tokens can be left, with gists it cannot.
    context = ContextConfig(max_lod=1, omit=True)
    shortest = Hyperparameters(context_start=1 / 8, context_end=1 / 8)
    Config(context=context, hyper=shortest)
    with pytest.raises(ValueError, match=r"hyper\.context_start asks for 28 entries, which no cut of 224 tokens"):
        Config(context=context, hyper=shortest, gists=GistTrainingConfig(steps=30))
