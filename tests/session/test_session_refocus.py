"""A refocus step is the decision of a training window, and changes what it reports."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.context import allocator, nodes, refocus
from lensjax.context import working as contexts
from lensjax.models import decision
from lensjax.session import Session
from tests.session.streams import (
    STREAM,
    assert_close,
    assert_same,
    entries_of,
    expected_length,
    keep_in,
    read_at_once,
    read_of,
    reread,
    session_of,
    tree_of,
)
from tests.small import VOCABULARY, jit


@functools.cache
def random_streams(name):
    """Of streams of random length: tokens, the state at the end of a history, and the last two refocus steps."""
    session, random, found = session_of(name), np.random.default_rng(7), []
    history = session.config.geometry.history
    for _ in range(200 if name == "plain" else 40):
        stream = random.integers(0, VOCABULARY, random.integers(2 * session.config.interval, 2 * history))
        steps = []
        middle, _ = session.append(session.init(), stream[:history], on_refocus=keep_in(steps))
        session.append(middle, stream[history:], on_refocus=keep_in(steps))
        found.append((stream, middle, steps[-2][0], steps[-1][0]))
    return found


def scores_of(session):
    """LensNet's scores of a context, from whichever tree: one program, so that its rounding is the same for all."""
    score = jit(functools.partial(decision.policy_scores, session.models.lens))
    entries = jit(contexts.materialise)
    read = jit(functools.partial(decision.with_states, session.models))

    def scores(tree, context):
        found = score(session.params["lens"], entries(read(session.params, tree), context))
        assert np.abs(found).max() < 0.9999, "saturated: the order of the scores is that of their rounding"
        return found

    return scores


# Blocks of three would not do: how XLA rounds a gist of theirs depends on how many it computes at once.
@pytest.mark.parametrize("name", ["plain", "no edits", "omission", "states", "attention"])
def test_from_a_cold_start_it_is_that_of_training_to_the_bit(name):
    session = session_of(name)
    geometry, capacity = session.config.geometry, session.config.capacity
    scores = scores_of(session)
    cold = allocator.uniform(session.config.budget, geometry)
    context = allocator.to_context(cold, geometry, capacity=capacity)
    build = jit(lambda tokens: decision.build_tree(session.models, session.params, tokens, geometry))

    @jit
    def decide(tree):
        score_fn = decision.policy(session.models.lens, session.params["lens"], tree)
        return refocus.cold_start(
            score_fn, session.config.budget, geometry, capacity=capacity, settings=session.config.focus
        )

    seen = 0
    for stream, state, _, _ in random_streams(name):
        if len(stream) < geometry.history:
            continue
        state = showing(session, state, context)
        tree = build(stream[: geometry.history].astype(np.int32))
        # Attention over a tree with room for more rounds otherwise.
        assert_equal = assert_close if name in ("states", "attention") else assert_same
        assert_equal(scores(tree_of(name, state), context), scores(tree, context))
        decided = jax.tree.map(lambda leaf: leaf[1], decide(tree))
        assert_same(session.refocus(state)[0].context, decided)
        seen += bool((decided.start != context.start).any())
    assert seen > 20 or name == "no edits"  # which has no edits to make at the length that it is asked for


def showing(session, state, context):
    """The session as it were if it showed another context, nothing were in the cache, and nothing cooled."""
    nothing = jnp.int32(0)
    empty = {"cache": session.models.base.truncate(state.view.cache, nothing), "cached": nothing}
    cooling = jax.tree.map(jnp.zeros_like, state.view.cooling)
    view = dataclasses.replace(state.view, context=context, cooling=cooling, **empty)
    found = state.history.find(*map(np.asarray, (context.start, context.lod, context.valid)))
    return dataclasses.replace(state, view=dataclasses.replace(view, **session._show(session.params, view, found)))


def focus_of(session, view):
    """What is collapsed and what cools, as flags of all nodes of a history."""
    geometry = session.config.geometry
    focused, table = allocator.from_cut(contexts.to_cut(view.context, geometry), geometry), nodes.table(geometry)
    cooling = np.zeros(len(table.lod), np.int32)
    for age, (starts, lods) in enumerate(zip(*map(np.asarray, (view.cooling.start, view.cooling.lod)), strict=True)):
        for start, lod in zip(starts, lods, strict=True):
            cools = (table.start == start) & (table.lod == lod)
            cooling[cools] = np.maximum(cooling[cools], session.config.focus.cooldown - age)
    return dataclasses.replace(focused, cooling=jnp.asarray(cooling))


# What a sampling allocator draws is drawn for rows in a session, and for nodes in training.
@pytest.mark.parametrize("name", ["plain", "no edits", "omission", "states", "attention"])
def test_from_where_the_session_is_it_is_that_of_training_to_the_bit(name):
    session = session_of(name)
    geometry, capacity = session.config.geometry, session.config.capacity
    scores = scores_of(session)

    @jit
    def decide(focused, context, tree, key):
        return refocus.step(
            focused,
            decision.policy(
                session.models.lens,
                session.params["lens"],
                decision.with_states(session.models, session.params, tree),
            ),
            context,
            session.config.budget,
            geometry,
            capacity=capacity,
            settings=session.config.focus,
            tokens=tree.length,
            key=key,
        )[:2]

    show = jit(functools.partial(allocator.to_context, geometry=geometry, capacity=capacity))
    drop = jit(functools.partial(allocator.drop_oldest, tokens=session.config.forgotten_at_once, geometry=geometry))
    kinds = set()
    for stream, _, before, after in random_streams(name):
        held, forgets = after.history.held, after.history.forgotten != before.history.forgotten
        focused = focus_of(session, before.view)
        focused = drop(focused) if forgets else focused
        context = show(focused, tokens=jnp.int32(held))
        tree = reread(name, after, stream=stream)[0]
        assert_same(scores(tree_of(name, after), context), scores(tree, context))
        focused, context = decide(focused, context, tree, None)
        assert_same((focus_of(session, after.view), after.context), (focused, context))
        kinds.add((forgets, held == geometry.history))
    # Three blocks of two at a time go from 30 tokens: "no edits" is never at the end of a history of 26.
    full = name != "no edits"
    assert kinds >= {(False, False), (True, full)} | ({(False, True)} if full else set())


def test_what_was_decided_does_not_depend_on_what_comes_later():
    session, (steps, _, losses) = session_of("plain"), read_at_once("plain")
    for place in (10, 32, 41):
        other = np.append(STREAM[:place], (STREAM[place:] + 1) % VOCABULARY)
        changed = []
        other_losses = session.append(session.init(), other, on_refocus=keep_in(changed))[1]
        for (state, _), (changed_state, _) in zip(steps, changed, strict=True):
            if state.read <= place:
                assert_same(changed_state, state)
        np.testing.assert_array_equal(other_losses[:place], losses[:place])
        assert (other_losses[place:] != losses[place:]).all()
        pairs = zip(steps, changed, strict=True)
        assert any((one.context.start != other.context.start).any() for (one, _), (other, _) in pairs)


@pytest.mark.parametrize("name", ["plain", "other", "omission"])
def test_the_report_of_a_refocus_step(name):
    session, (steps, _, _) = session_of(name), read_at_once(name)
    for (before, _), (after, report) in itertools.pairwise(steps):
        read = before.read
        earlier = read_of(session, before) + [(read + i, 0) for i in range(session.config.interval)]
        earlier = [entry for entry in earlier if entry[0] >= after.history.forgotten]
        now = read_of(session, after)
        assert float(report.swap_rate) == pytest.approx(len(set(now) - set(earlier)) / len(now))
        alike = [one == other for one, other in zip(now, earlier, strict=False)]
        moved = after.history.forgotten != before.history.forgotten
        assert int(report.kept) == (0 if moved else [*alike, False].index(False))
    assert max(int(report.swaps) for _, report in steps) > 0


def test_a_refocus_step_that_changes_nothing_keeps_the_whole_cache():
    session, (steps, _, _) = session_of("no edits"), read_at_once("no edits")
    for state in (steps[0][0], steps[-1][0]):
        after, report = session.refocus(state)
        assert int(report.kept) == int(state.context.length) and float(report.swap_rate) == 0
        kept = [(one.context, one.cache, one.logits) for one in (after.view, state.view)]
        assert_same(*kept)
    empty, report = session.refocus(session.init())
    assert empty.read == int(report.kept) == 0
    assert_same(session.append(empty, STREAM)[1], read_at_once("no edits")[2])


def test_a_refocus_step_in_between_makes_room_as_any_other():
    session, (steps, _, _) = session_of("plain"), read_at_once("plain")
    state, _ = session.append(steps[-1][0], STREAM[:3])
    after, _ = session.refocus(state)
    held = after.history.held
    assert after.read == state.read and int(after.context.length) == expected_length(session, held)
    longer, _ = session.append(after, STREAM[:60])
    assert int(longer.context.length) <= session.config.capacity


def test_without_edits_that_the_policy_may_ask_for_only_the_budgets_are_made():
    steps = read_at_once("no edits")[0]
    assert all(int(report.swaps) == 0 for _, report in steps)
    cuts = [dict(entries_of(state)) for state, _ in steps]
    for before, after in itertools.pairwise(cuts):  # nothing is ever expanded
        assert all(after.get(start, 1) >= lod for start, lod in before.items() if start >= min(after))


def test_a_sampling_allocator_repeats_itself_by_its_seed():
    session, (_, expected, losses) = session_of("sampled"), read_at_once("sampled")
    state, again = session.append(session.init(0), STREAM)
    assert_same(state, expected)
    np.testing.assert_array_equal(again, losses)
    assert (session.append(session.init(1), STREAM)[1] != losses).any()
    assert any(int(report.swaps) for _, report in read_at_once("sampled")[0])


def test_another_policy_scores_the_entries_in_the_place_of_lensnet():
    session, (steps, _, _) = session_of("plain"), read_at_once("plain")

    def the_first(params, view):
        return jnp.where(view.context.start < params["count"], 1.0, 0.0)

    params, seen = {"base": session.params["base"], "gist": session.params["gist"], "count": jnp.int32(4)}, []
    other = Session(session.models, params, session.config, policy=the_first)
    other.append(other.init(), STREAM[:28], on_refocus=keep_in(seen))
    for (state, _), (own, _) in zip(seen, steps, strict=False):
        assert state.context.length == own.context.length
    # Up to 28 tokens the budget has room for the first 4 in full.
    assert int(seen[6][0].read) == 28 and all(not np.any(state.context.lod[:4]) for state, _ in seen)
    assert any(np.any(state.context.lod[:4]) for state, _ in steps[:7])
