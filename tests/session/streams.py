"""Sessions of several shapes that have read one stream, and what they should hold then."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lensjax import _settings
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.session import Session, SessionState
from lensjax.training import nll
from tests import reference
from tests.small import SMALL, VOCABULARY, jit

OMISSION = {"context.max_lod": 1, "context.omit": True, "context.recent_tokens": 6, "hyper.context_end": 12 / 32}
CASES = {
    # 16 entries for 32 tokens of history, 4 of which are forgotten at once: from then on there are always 32.
    "plain": SMALL,
    # Only one token stays in full at a refocus step, and the history of 35 is no multiple of the blocks of 9.
    "other": _settings.replace(
        SMALL,
        **{
            "base.gaussian_rope": True,
            "base.copy_heads": 1,
            "base.conv_width": 3,
            "context.window": 40,
            "context.block_size": 3,
            "context.horizon": 5,
            "context.recent_tokens": 1,
        },
    ),
    # The allocator makes no swaps, and three blocks of the highest level are forgotten at once.
    "no edits": _settings.replace(
        SMALL,
        **{
            "context.window": 32,
            "context.max_lod": 1,
            "context.horizon": 6,
            "hyper.context_end": 0.75,
            "focus.expand_threshold": 2.0,
        },
    ),
    "sampled": _settings.replace(SMALL, **{"focus.temperature": 0.5}),
    # The base model reads nothing of what is collapsed: 12 tokens of 32, and a map of ten blocks of two.
    "omission": _settings.replace(SMALL, **OMISSION),
    # Two layers, so that states are not the embeddings.
    "states": _settings.replace(SMALL, **OMISSION, **{"lens.reads": "states", "base.layers": 2, "base.copy_heads": 1}),
    "attention": _settings.replace(SMALL, **OMISSION, **{"lens.reads": "attention", "base.layers": 2}),
}
STREAM = np.random.default_rng(0).integers(0, VOCABULARY, 75)


@functools.cache
def session_of(name):
    """A session whose parameters are far from their initialisation, so that no term is too small to notice."""
    config, random = CASES[name], np.random.default_rng(1)
    models = config.build_models()
    shapes = {part: jax.eval_shape(getattr(models, part).init, jax.random.key(0)) for part in ("base", "gist", "lens")}
    params = jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape).astype("f") + (leaf.ndim == 1), shapes)
    # The pointer's products would saturate tanh. Which of two scores of 0.9999999 is the larger is rounding's choice.
    params["lens"]["pointer"]["gain"] *= np.float32(0.05)
    if config.lens.reads != "nothing":  # more is said of each entry
        params["lens"]["head"]["kernel"] *= np.float32(0.5)
        params["lens"]["pointer"]["gain"] *= np.float32(0.5)
    return Session(models, params, config.session)


def keep_in(steps):
    return lambda *step: steps.append(step)


@functools.cache
def read_at_once(name):
    """States and reports of all refocus steps, the last state, and all losses."""
    session, steps = session_of(name), []
    last, losses = session.append(session.init(), STREAM, on_refocus=keep_in(steps))
    return steps, last, losses


@functools.cache
def compiled_reference(name):
    """Of `held` tokens int32[T] before padding and a context: tree, logits, losses of a horizon, cache, all rows."""
    session = session_of(name)
    base, params, capacity = session.models.base, session.params["base"], session.config.capacity

    def read(tokens, held, context, horizon):
        tree = dataclasses.replace(build(session, base.embed(params, tokens)), length=held)
        rows, context = contexts.materialise(tree, context), contexts.read(context, CASES[name].geometry)
        entries = contexts.materialise(tree, context)
        last = jnp.maximum(context.length - 1, 0)[None]
        logits = base.logits(params, entries, last)[0]
        losses = nll.token_nll(base, params, entries, horizon)
        _, cache = base.extend(params, base.init_cache(capacity), entries)
        return tree, logits, losses, cache, rows

    return jit(read)


def build(session, leaves):
    """The tree over embeddings, as in training."""
    geometry, gist_fn = session.config.geometry, functools.partial(session.models.gist.apply, session.params["gist"])
    return trees.build(leaves, gist_fn, block_size=geometry.block_size, max_lod=geometry.max_lod)


def reread(name, state, horizon=None, stream=STREAM):
    session = session_of(name)
    padded, held = np.zeros(CASES[name].context.window, np.int32), state.history.held
    padded[:held] = stream[state.history.forgotten :][:held]
    horizon = np.zeros(session.config.interval, np.int32) if horizon is None else horizon.astype(np.int32)
    return compiled_reference(name)(padded, np.int32(held), state.context, horizon)


def tree_of(name, state):
    """The history of a session as a tree, zeros where nothing is held."""
    session, history = session_of(name), state.history
    geometry = session.config.geometry
    tokens = history.tokens.between(history.forgotten, history.read)
    levels = [np.asarray(session.models.base.embed(session.params["base"], tokens))]
    for lod, rows in enumerate(history.gists, start=1):
        levels.append(rows.between(history.forgotten // geometry.block_size**lod, rows.length))
    capacity = geometry.history + session.config.interval
    rooms = [np.zeros((capacity // geometry.block_size**lod, base.shape[1]), "f") for lod, base in enumerate(levels)]
    for room, level in zip(rooms, levels, strict=True):
        room[: len(level)] = level
    return trees.TreeState(tuple(map(jnp.asarray, rooms)), jnp.int32(history.held), geometry.block_size)


def contents(tree):
    """The arrays of a pytree, those that a session has on the host among them."""
    for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, SessionState)):
        if not isinstance(leaf, SessionState):
            yield jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            continue
        history = leaf.history
        yield from contents(leaf.view)
        yield np.array([history.forgotten, history.block_size])
        yield from (rows.between(rows.first, rows.length) for rows in (history.tokens, *history.gists))


def assert_same(one, other):
    """To the bit."""
    for left, right in zip(contents(one), contents(other), strict=True):
        np.testing.assert_array_equal(left, right)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(np.abs(expected).max(initial=0.0), 1.0), rtol=0)


def entries_of(state):
    """What is shown, as (first token in the stream, level)."""
    length, before = int(state.context.length), state.history.forgotten
    starts, lods = np.asarray(state.context.start)[:length] + before, np.asarray(state.context.lod)[:length]
    return list(zip(starts.tolist(), lods.tolist(), strict=True))


def read_of(session, state):
    """What the base model reads of what is shown."""
    return reference.read(entries_of(state), session.config.geometry)


def expected_length(session, held):
    """The largest length within the budget that some cut has."""
    step = session.config.geometry.saving
    return held - max(-(-(held - session.config.budget) // step), 0) * step
