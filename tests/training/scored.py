"""Random scored variants of a batch, and the objective on them, compiled once for each choice of its switches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lensjax import _settings
from lensjax.context.working import Entries
from lensjax.training.objective import Statistics, lens_objective
from lensjax.training.optim.moving import EmaMoments
from lensjax.training.scoring import ScoredVariants
from tests import reference
from tests.small import SMALL, jit

GEOMETRY, CAPACITY, VARIANTS, BATCH = SMALL.geometry, SMALL.capacity, SMALL.context.rollouts + 1, 3
KEY = jax.random.key(4)
EMPTY = EmaMoments(*(np.asarray(x, np.float32) for x in (1.0, 0.0, 1.0)))


def one_update(mean, variance):
    """Moments after one update with decay 0.9."""
    return EmaMoments(*(np.asarray(x, np.float32) for x in (0.9, mean, variance)))


def scored_cuts(cuts, distinct, losses, capacity=CAPACITY):
    """Variants of one sequence; what of their entries an objective must not read is NaN."""
    contexts = reference.variants_of(cuts, window=GEOMETRY.history, capacity=capacity)
    spans = np.where(contexts.valid, GEOMETRY.block_size**contexts.lod, 0).astype(np.float32)
    unread = np.full(spans.shape, np.nan, np.float32)
    entries = Entries(unread[..., None], unread[..., None], unread, contexts.lod, spans, unread, contexts.valid)
    return ScoredVariants(contexts, np.asarray(distinct), entries, np.asarray(losses, np.float32))


def random_sequence(rng, *, with_duplicate):
    """Recency and random cuts of one length, with losses as if measured."""
    length = int(rng.integers(GEOMETRY.shortest, CAPACITY + 1))
    cuts = [[(token, 0) for token in range(GEOMETRY.history - length, GEOMETRY.history)]]
    cuts += [reference.random_cut(GEOMETRY, length, rng) for _ in range(VARIANTS - 1)]
    distinct = np.ones(VARIANTS, bool)
    if with_duplicate:
        cuts[-1], distinct[-1] = cuts[1], False
    return scored_cuts(cuts, distinct, 2 + 0.5 * rng.standard_normal(VARIANTS))


@functools.cache
def random_case(seed):
    """Scored variants of a batch, and scores of a policy and of its anchor that hold garbage at padding."""
    rng = np.random.default_rng(seed)
    rows = [random_sequence(rng, with_duplicate=b == 0) for b in range(BATCH)]
    scored = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    scores, anchor = rng.uniform(-0.9, 0.9, (2, BATCH, VARIANTS, CAPACITY)).astype(np.float32)
    return scored, np.where(scored.contexts.valid, scores, 7), np.where(scored.contexts.valid, anchor, -7)


def objective(local_edits=0, **switches):
    """The recipe, and the objective of variants, scores, anchor's scores, moments and weights."""
    changes = {f"objective.{name}": value for name, value in switches.items()}
    changes |= {"objective.max_pairs": 4, "context.local_edits": local_edits}
    recipe = _settings.replace(SMALL.recipe, **changes)

    def call(scored, scores, anchor, normaliser, demand, hyper, key=KEY):
        earlier = Statistics(normaliser, demand, hyper.temperature)
        return lens_objective(key, scored, scores, anchor, earlier, hyper, recipe=recipe)

    return recipe, call


@functools.cache
def compiled(**choice):
    recipe, call = objective(**choice)
    return recipe, jit(call)


def as_arrays(hyper):
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), hyper)
