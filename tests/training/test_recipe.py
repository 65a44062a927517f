"""A recipe: one static value, what it refuses, and what follows from it."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lensjax import _settings
from lensjax.context.geometry import Geometry
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ContextConfig

# A history of 28 tokens, of which 4 are the query.
SHAPE = ContextConfig(window=32, block_size=4, max_lod=1, horizon=4, recent_tokens=4)
SMALL = Recipe(context=SHAPE, hyper=Hyperparameters(context_start=0.9, context_end=0.5))


def test_equal_recipes_are_one_static_argument(compiles):
    other = Recipe(context=replace(SHAPE), hyper=Hyperparameters(context_start=0.9, context_end=0.5))
    assert other is not SMALL and other == SMALL and hash(other) == hash(SMALL)
    changed = _settings.replace(SMALL, **{"hyper.margin": 0.3})
    assert changed != SMALL and len({SMALL, other, changed}) == 2

    by_recipe = jax.jit(lambda x, recipe: x * recipe.hyper.margin, static_argnames="recipe")
    by_recipe(jnp.ones(()), recipe=SMALL)
    with compiles() as names:
        assert float(by_recipe(jnp.ones(()), recipe=other)) == pytest.approx(0.1)
    assert names == []
    assert float(by_recipe(jnp.ones(()), recipe=changed)) == pytest.approx(0.3)


def test_lengths_by_hand():
    assert SMALL.geometry == Geometry(history=28, block_size=4, max_lod=1, recent_tokens=4)
    # 0.9 * 28 = 25.2 and 0.5 * 28 = 14, each down to the next of 28, 25, ..., 10.
    assert (SMALL.capacity, SMALL.budget) == (25, 13)
    assert not SMALL.has_anchor and _settings.replace(SMALL, **{"hyper.kl_weight": 0.1}).has_anchor


def test_the_past_is_the_recipe_one_horizon_earlier():
    recipe = _settings.replace(SMALL, trainable=("lens", "hypernet"))
    past = recipe.past
    assert past.context == replace(SHAPE, window=28) and past.geometry == replace(SMALL.geometry, history=24)
    # 0.9 * 24 = 21.6.
    assert past.capacity == 21
    assert replace(past, context=SHAPE, trainable=recipe.trainable) == recipe
    assert past.trainable == ("lens",)


HYPERNET = {"trainable": ("lens", "hypernet")}
ANCHORED = {"objective.name": "ipo", "hyper.kl_weight": 0.5}
GROUPS = {"objective.name": "grpo"}
SETS = {"objective.name": "grpo", "objective.group_baseline": "sets"}
TRUST = {"objective.name": "gtpo", "objective.mask": "trust"}


@pytest.mark.parametrize(
    ("refused", "message", "fine"),
    [
        ({"steps": 20}, "steps must be above optimizer.warmup_steps 20, got 20", {"steps": 21}),
        ({"optimizer.warmup_steps": 1000}, "steps must be above optimizer.warmup_steps 1000, got 1000", {"steps": 0}),
        ({"trainable": ("lens", "lens")}, "trainable must name one or more different parts", {"trainable": ("gist",)}),
        ({"objective.keep": 6}, "objective.keep must be at most the 5 variants", {"objective.keep": 5}),
        (
            {"objective.keep": 5, "context.local_edits": 1},
            "objective.keep must be at most the 4 variants",
            {"objective.keep": 4, "context.local_edits": 1},
        ),
        (
            SETS | {"objective.set_size": 5},
            "objective.set_size must be below the 5 variants that are compared",
            SETS | {"objective.set_size": 4},
        ),
        (
            SETS | {"objective.set_size": 3, "objective.keep": 3},
            "objective.set_size must be below the 3 variants that are compared",
            SETS | {"objective.set_size": 3, "objective.keep": 4},
        ),
        (
            TRUST | {"hyper.trust_low": 1.0},
            "hyper.trust_low must be below hyper.trust_high 1.0 with objective.mask trust, got 1.0",
            TRUST | {"hyper.trust_low": 0.5},
        ),
        (
            ANCHORED,
            "objective.name ipo with hyper.kl_weight 0.5 compares values with the anchor's, and objective.anchor prev",
            ANCHORED | {"objective.anchor": "fixed"},
        ),
        (
            {"hyper.gist_delta_weight": 0.5},
            "hyper.gist_delta_weight",
            {"hyper.gist_delta_weight": 0.5, "trainable": ("lens", "gist")},
        ),
        ({"hyper.context_end": 0.3}, "hyper.context_end asks for 8 entries", {"hyper.context_end": 0.36}),
        ({"hyper.context_start": 0.3}, "hyper.context_start asks for 8 entries", {"hyper.context_start": 0.36}),
        (
            HYPERNET | {"context.rollouts": 1},
            "context.rollouts must be at least 2 for the hypernetwork",
            HYPERNET | {"context.rollouts": 2},
        ),
        (HYPERNET | {"objective.name": "mse"}, "objective.name must be spans for the hypernetwork", HYPERNET),
        (HYPERNET | {"objective.pair_weights": "importance"}, "objective.pair_weights must be none", HYPERNET),
        (
            {"objective.pair_weights": "importance", "context.proposed_rollouts": 1},
            "context.proposed_rollouts must be 0 where objective.pair_weights is importance",
            {"objective.pair_weights": "importance", "context.own_rollouts": 1, "context.local_edits": 1},
        ),
        (
            GROUPS | {"objective.group_weights": "importance", "context.own_rollouts": 1, "context.local_edits": 1},
            "context.own_rollouts and context.proposed_rollouts must be 0 where objective.group_weights is importance",
            GROUPS | {"context.own_rollouts": 1, "context.local_edits": 1},
        ),
        (
            HYPERNET | {"context.window": 15, "hyper.context_end": 1.0},
            "context.window must hold a block, context.recent_tokens and two horizons for the hypernetwork",
            HYPERNET | {"context.window": 16, "hyper.context_end": 0.9},
        ),
        (
            HYPERNET | {"context.window": 28, "hyper.context_end": 0.38},
            "hyper.context_end (one context.horizon before the cursor",
            HYPERNET | {"context.window": 28, "hyper.context_end": 0.42},
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_full_path(refused, message, fine):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _settings.replace(SMALL, **refused)
    _settings.replace(SMALL, **fine)
