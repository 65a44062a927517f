import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.context import allocator
from lensjax.context import tree as trees
from lensjax.context import working as contexts
from lensjax.models import build_models, decision
from lensjax.runs import config as configs
from lensjax.session import Session
from lensjax.training import nll
from tests.small import SMALL, VOCABULARY, jit

CASES = {
    # 16 entries for 32 tokens of history, 4 of which are forgotten at once: from then on there are always 32.
    "plain": SMALL,
    # Only one token stays in full at a refocus step, and the history of 35 is no multiple of the blocks of 9.
    "other": configs.replace(
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
    "no edits": configs.replace(
        SMALL,
        **{
            "context.window": 32,
            "context.max_lod": 1,
            "context.horizon": 6,
            "hyper.context_end": 0.75,
            "focus.expand_threshold": 2.0,
        },
    ),
    "sampled": configs.replace(SMALL, **{"focus.temperature": 0.5, "focus.top_k": 3}),
}
STREAM = np.random.default_rng(0).integers(0, VOCABULARY, 75)


@functools.cache
def session_of(name):
    """A session whose parameters are far from their initialisation, so that no term is too small to notice."""
    config, random = CASES[name], np.random.default_rng(1)
    models = build_models(config)
    shapes = {part: jax.eval_shape(getattr(models, part).init, jax.random.key(0)) for part in ("base", "gist", "lens")}
    params = jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape).astype("f") + (leaf.ndim == 1), shapes)
    # The pointer's products would saturate tanh. Which of two scores of 0.9999999 is the larger is rounding's choice.
    params["lens"]["pointer"]["gain"] *= np.float32(0.05)
    return Session(models, params, config)


def keep_in(steps):
    return lambda *step: steps.append(jax.tree.map(jnp.copy, step))


@functools.cache
def read_at_once(name):
    """States and reports of all refocus steps, the last state, and all losses."""
    session, steps = session_of(name), []
    last, losses = session.append(session.init(), STREAM, on_refocus=keep_in(steps))
    return steps, last, losses


@functools.cache
def reference(name):
    """Of `held` tokens int32[T], which end with padding, and a context: tree, logits, losses of a horizon, cache."""
    session, shape = session_of(name), CASES[name].context
    capacity = session.budget + session.interval

    def read(tokens, held, context, horizon):
        tree = trees.build(
            session.models.base.embed(session.params["base"], tokens),
            functools.partial(session.models.gist.apply, session.params["gist"]),
            block_size=shape.block_size,
            max_lod=shape.max_lod,
        )
        tree = dataclasses.replace(tree, length=held)
        entries = contexts.materialise(tree, context)
        last = jnp.maximum(context.length - 1, 0)[None]
        arrays = (entries.embeddings, entries.positions, entries.spans)
        logits = session.models.base.apply(session.params["base"], *arrays, last)[0]
        losses = nll.token_losses(session.models.base, session.params["base"], entries, horizon)
        whole = jnp.full((), capacity, jnp.int32)
        _, cache = session.models.base.extend(
            session.params["base"], session.models.base.init_cache(capacity), *arrays, whole
        )
        return tree, logits, losses, cache

    return jit(read)


def reread(name, state, horizon=None, stream=STREAM):
    session = session_of(name)
    padded, held = np.zeros(CASES[name].context.window, np.int32), int(state.tree.length)
    padded[:held] = stream[int(state.forgotten) :][:held]
    horizon = np.zeros(session.interval, np.int32) if horizon is None else horizon.astype(np.int32)
    return reference(name)(padded, np.int32(held), state.context, horizon)


def assert_same(one, other):
    """To the bit."""
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(np.abs(expected).max(initial=0.0), 1.0), rtol=0)


def entries_of(state):
    """What is shown, as (first token in the stream, level)."""
    length, before = int(state.context.length), int(state.forgotten)
    starts, lods = np.asarray(state.context.start)[:length] + before, np.asarray(state.context.lod)[:length]
    return list(zip(starts.tolist(), lods.tolist(), strict=True))


def expected_length(session, held):
    """The largest length within the budget that some cut has."""
    step = session.geometry.block_size - 1
    return held - max(-(-(held - session.budget) // step), 0) * step


# How a stream is split


@pytest.mark.parametrize("name", ["plain", "other", "sampled"])
@settings(max_examples=6)
@given(counts=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 30)), min_size=2, max_size=25))
def test_any_split_gives_the_same_session_to_the_bit(name, counts):
    session, (steps, whole, expected) = session_of(name), read_at_once(name)
    state, losses, seen, place = session.init(), [], [], 0
    for count in [*counts, len(STREAM)]:
        chunk = STREAM[place : place + count]
        state, chunk_losses = session.append(state, chunk, on_refocus=keep_in(seen))
        assert chunk_losses.shape == chunk.shape and chunk_losses.dtype == np.float32
        assert int(state.context.length) <= session.budget + session.interval
        losses.append(chunk_losses)
        place += len(chunk)
        assert int(state.read) == place
    np.testing.assert_array_equal(np.concatenate(losses), expected)
    assert_same(state, whole)
    assert_same(seen, steps)


def test_an_empty_append_changes_nothing():
    session = session_of("plain")
    _, state, _ = read_at_once("plain")
    for nothing in ([], np.zeros(0, np.int64)):
        after, losses = session.append(state, nothing)
        assert_same(after, state)
        assert losses.shape == (0,)


def test_refocus_steps_come_at_fixed_places_of_the_stream():
    for name in CASES:
        session, (steps, _, _) = session_of(name), read_at_once(name)
        places = [int(state.read) for state, _ in steps]
        assert places == list(range(session.interval, len(STREAM) + 1, session.interval))


def test_earlier_states_stay_valid():
    session = session_of("plain")
    before, _ = session.append(session.init(), STREAM[:38])
    copy = jax.tree.map(lambda leaf: leaf if leaf.dtype == session.init().key.dtype else np.array(leaf), before)
    first = session.append(before, STREAM[38:50])
    session.append(before, STREAM[:20])
    session.generate(before, 2, jax.random.key(0))
    assert_same(before, copy)
    assert_same(session.append(before, STREAM[38:50]), first)


# What is held


@pytest.mark.parametrize("name", CASES)
def test_every_refocus_step_leaves_a_legal_context_of_exactly_the_length_that_was_asked_for(name):
    session, (steps, _, _) = session_of(name), read_at_once(name)
    for state, _ in steps:
        held, length = int(state.tree.length), expected_length(session, int(state.tree.length))
        found = contexts.invariants(
            state.context,
            window=held,
            block_size=session.geometry.block_size,
            length=length,
            recent_tokens=min(session.geometry.recent_tokens, held),
        )
        assert all(found.values()), (int(state.read), found)
        assert length <= session.budget and int(state.cache.length) == length
        assert held <= session.geometry.window
    in_full = [state for state, _ in steps if int(state.read) <= session.budget]
    assert in_full and all(not np.any(state.context.lod) for state in in_full)
    assert any(int(state.forgotten) for state, _ in steps)
    deepest = max(int(state.context.lod.max()) for state, _ in steps)
    assert deepest == session.geometry.max_lod


@pytest.mark.parametrize("name", ["plain", "other", "no edits"])
def test_the_tree_is_that_of_the_tokens_held(name):
    steps, last, _ = read_at_once(name)
    for state in [*(state for state, _ in steps), last]:
        built, held = reread(name, state)[0], int(state.tree.length)
        assert int(state.forgotten) % session_of(name)._forget_size == 0
        for lod, (rows, expected) in enumerate(zip(state.tree.levels, built.levels, strict=True)):
            complete = held // built.block_size**lod
            assert_close(rows[:complete], expected[:complete])
            assert not np.any(rows[complete:])


@pytest.mark.parametrize("name", ["plain", "other", "no edits"])
def test_predictions_are_those_of_the_base_model_on_the_whole_context(name):
    """So is all that the cache keeps, at every refocus step and in between."""
    session, state = session_of(name), session_of(name).init()
    kept = []
    for place in range(0, len(STREAM), 3):
        state, _ = session.append(state, STREAM[place : place + 3], on_refocus=lambda *step: kept.append(step[1].kept))
        _, logits, _, fresh = reread(name, state)
        assert_close(session.predict(state), logits)
        length = int(state.context.length)
        assert int(state.cache.length) == length
        assert_close(state.cache.inputs[:length], fresh.inputs[:length])
        assert_close(state.cache.keys[:, :length], fresh.keys[:, :length])
        assert_close(state.cache.values[:, :length], fresh.values[:, :length])
    assert max(kept) > 0


@pytest.mark.parametrize("name", ["plain", "other", "no edits"])
def test_losses_are_those_of_training_behind_the_same_context(name):
    session, (steps, _, losses) = session_of(name), read_at_once(name)
    for state, _ in steps[:-1]:
        read = int(state.read)
        horizon = STREAM[read : read + session.interval]
        assert_close(losses[read : read + session.interval], reread(name, state, horizon)[2])


def test_losses_are_those_of_a_training_window():
    """From where the history is full on: its tokens and the horizon are a window, and the loss is the variant's."""
    session, (steps, _, losses) = session_of("plain"), read_at_once("plain")
    models, params, config = session.models, session.params, CASES["plain"]

    def measure(tokens, context):
        window = decision.split(tokens, horizon=config.context.horizon)
        tree = decision.build_tree(models, params, window.history, config)
        variants = jax.tree.map(lambda leaf: leaf[None], context)
        return nll.variant_losses(models.base, params["base"], tree, variants, window.horizon)[0][0]

    measure, seen = jit(measure), 0
    for state, _ in steps[:-1]:
        first, read = int(state.forgotten), int(state.read)
        if read - first == config.context.history:
            window = STREAM[first : first + config.context.window].astype(np.int32)
            assert_close(losses[read : read + session.interval].mean(), measure(window, state.context))
            seen += 1
    assert seen > 5


def test_the_first_token_is_predicted_by_nothing():
    for name in CASES:
        assert read_at_once(name)[2][0] == pytest.approx(np.log(VOCABULARY))


# A refocus step is the decision of a training window


@functools.cache
def random_streams(name):
    """Of streams of random length: tokens, the state at the end of a history, and the last two refocus steps."""
    session, random, found = session_of(name), np.random.default_rng(7), []
    history = session.geometry.window
    for _ in range(200 if name == "plain" else 40):
        stream = random.integers(0, VOCABULARY, random.integers(2 * session.interval, 2 * history))
        steps = []
        middle, _ = session.append(session.init(), stream[:history], on_refocus=keep_in(steps))
        session.append(middle, stream[history:], on_refocus=keep_in(steps))
        found.append((stream, middle, steps[-2][0], steps[-1][0]))
    return found


def scores_of(session):
    """LensNet's scores of a context, from whichever tree: one program, so that its rounding is the same for all."""
    score = jit(functools.partial(decision.policy_scores, session.models))
    entries = jit(contexts.materialise)

    def scores(tree, context):
        found = score(session.params["lens"], entries(tree, context))
        assert np.abs(found).max() < 0.9999, "saturated: the order of the scores is that of their rounding"
        return found

    return scores


# Blocks of three would not do: how XLA rounds a gist of theirs depends on how many it computes at once.
@pytest.mark.parametrize("name", ["plain", "no edits"])
def test_from_a_cold_start_it_is_that_of_training_to_the_bit(name):
    session, config = session_of(name), CASES[name]
    geometry, capacity = session.geometry, session.budget + session.interval
    scores = scores_of(session)
    cold = allocator.uniform(session.budget, geometry)
    context = allocator.to_context(cold, geometry, capacity=capacity)
    build = jit(lambda tokens: decision.build_tree(session.models, session.params, tokens, config))

    @jit
    def decide(tree):
        return decision.policy_contexts(
            session.models, session.params["lens"], tree, session.budget, config=config, capacity=capacity
        )

    seen = 0
    for stream, state, _, _ in random_streams(name):
        if len(stream) < geometry.window:
            continue
        empty = dataclasses.replace(state.cache, length=jnp.int32(0))
        state = dataclasses.replace(state, focus=cold, context=context, cache=empty)
        tree = build(stream[: geometry.window].astype(np.int32))
        assert_same(scores(state.tree, context), scores(tree, context))
        decided = jax.tree.map(lambda leaf: leaf[1], decide(tree))
        assert_same(session.refocus(state)[0].context, decided)
        seen += bool((decided.start != context.start).any())
    assert seen > 20 or name == "no edits"  # which has no edits to make at the length that it is asked for


@pytest.mark.parametrize("name", ["plain", "no edits", "sampled"])
def test_from_where_the_session_is_it_is_that_of_training_to_the_bit(name):
    session, config = session_of(name), CASES[name]
    geometry, capacity = session.geometry, session.budget + session.interval
    scores = scores_of(session)

    @jit
    def decide(focused, context, tree, key):
        return allocator.step(
            focused,
            decision.policy(session.models, session.params["lens"], tree),
            context,
            session.budget,
            geometry,
            capacity=capacity,
            settings=config.focus,
            tokens=tree.length,
            key=key,
        )[:2]

    show = jit(functools.partial(allocator.to_context, geometry=geometry, capacity=capacity))
    drop = jit(functools.partial(allocator.drop_oldest, tokens=session._forget_size, geometry=geometry))
    kinds = set()
    for stream, _, before, after in random_streams(name):
        held, forgets = int(after.tree.length), int(after.forgotten) != int(before.forgotten)
        focused = drop(before.focus) if forgets else before.focus
        context = show(focused, tokens=after.tree.length)
        tree = reread(name, after, stream=stream)[0]
        assert_same(scores(after.tree, context), scores(tree, context))
        decided = decide(focused, context, tree, jax.random.fold_in(after.key, after.read))
        assert_same((after.focus, after.context), decided)
        kinds.add((forgets, held == geometry.window))
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
            if int(state.read) <= place:
                assert_same(changed_state, state)
        np.testing.assert_array_equal(other_losses[:place], losses[:place])
        assert (other_losses[place:] != losses[place:]).all()
        pairs = zip(steps, changed, strict=True)
        assert any((one.context.start != other.context.start).any() for (one, _), (other, _) in pairs)


# What a refocus step does


@pytest.mark.parametrize("name", ["plain", "other"])
def test_the_report_of_a_refocus_step(name):
    session, (steps, _, _) = session_of(name), read_at_once(name)
    for (before, _), (after, report) in itertools.pairwise(steps):
        read = int(before.read)
        earlier = entries_of(before) + [(read + i, 0) for i in range(session.interval)]
        earlier = [entry for entry in earlier if entry[0] >= int(after.forgotten)]
        now = entries_of(after)
        assert float(report.swap_rate) == pytest.approx(len(set(now) - set(earlier)) / len(now))
        alike = [one == other for one, other in zip(now, earlier, strict=False)]
        moved = int(after.forgotten) != int(before.forgotten)
        assert int(report.kept) == (0 if moved else [*alike, False].index(False))
    assert max(int(report.swaps) for _, report in steps) > 0


def test_a_refocus_step_that_changes_nothing_keeps_the_whole_cache():
    session, (steps, _, _) = session_of("no edits"), read_at_once("no edits")
    for state in (steps[0][0], steps[-1][0]):
        after, report = session.refocus(state)
        assert int(report.kept) == int(state.context.length) and float(report.swap_rate) == 0
        assert_same((after.context, after.cache, after.logits), (state.context, state.cache, state.logits))
    empty, report = session.refocus(session.init())
    assert int(empty.read) == int(report.kept) == 0
    assert_same(session.append(empty, STREAM)[1], read_at_once("no edits")[2])


def test_a_refocus_step_in_between_makes_room_as_any_other():
    session, (steps, _, _) = session_of("plain"), read_at_once("plain")
    state, _ = session.append(steps[-1][0], STREAM[:3])
    after, _ = session.refocus(state)
    held = int(after.tree.length)
    assert int(after.read) == int(state.read) and int(after.context.length) == expected_length(session, held)
    longer, _ = session.append(after, STREAM[:60])
    assert int(longer.context.length) <= session.budget + session.interval


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

    def the_first(params, state):
        return jnp.where(state.context.start < params["count"], 1.0, 0.0)

    params, seen = {"base": session.params["base"], "gist": session.params["gist"], "count": jnp.int32(4)}, []
    other = Session(session.models, params, CASES["plain"], policy=the_first)
    other.append(other.init(), STREAM[:28], on_refocus=keep_in(seen))
    for (state, _), (own, _) in zip(seen, steps, strict=False):
        assert state.context.length == own.context.length
    # Up to 28 tokens the budget has room for the first 4 in full.
    assert int(seen[6][0].read) == 28 and all(not np.any(state.context.lod[:4]) for state, _ in seen)
    assert any(np.any(state.context.lod[:4]) for state, _ in steps[:7])


# Memory and compilation


def test_neither_memory_nor_programs_grow_with_the_stream(compiles):
    session, (steps, _, _) = session_of("plain"), read_at_once("plain")
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state, _ in [(session.init(), None), *steps]
    ]
    assert all(shape == shapes[0] for shape in shapes)
    with compiles() as names:
        session.append(session.append(session.init(), STREAM)[0], STREAM[:7])
    assert names == []


# Generation


def test_what_is_generated_is_read():
    session, (_, state, _) = session_of("plain"), read_at_once("plain")
    after, tokens = session.generate(state, 7, jax.random.key(3))
    assert tokens.shape == (7,) and tokens.dtype == np.int32 and int(after.read) == int(state.read) + 7
    assert_same(after, session.append(state, tokens)[0])
    again = session.generate(state, 7, jax.random.key(3))
    np.testing.assert_array_equal(again[1], tokens)
    assert (session.generate(state, 7, jax.random.key(4))[1] != tokens).any()


def test_temperature_zero_takes_the_likeliest_token():
    session, (_, state, _) = session_of("plain"), read_at_once("plain")
    tokens = session.generate(state, 4, jax.random.key(3), temperature=0)[1]
    for token in tokens:
        assert token == int(np.argmax(session.predict(state)))
        state, _ = session.append(state, [token])
    nearly = session.generate(read_at_once("plain")[1], 4, jax.random.key(5), temperature=1e-4)[1]
    np.testing.assert_array_equal(nearly, tokens)


def test_nothing_is_generated_if_nothing_is_wanted():
    session = session_of("plain")
    for state in (session.init(), read_at_once("plain")[1]):
        after, tokens = session.generate(state, 0, jax.random.key(0))
        assert after is state and tokens.shape == (0,)


# Faults


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [1, VOCABULARY, -1],
            f"token {VOCABULARY} at place 1 is outside the vocabulary: expected 0 to {VOCABULARY - 1}",
        ),
        ([-1], "token -1 at place 0"),
        ([3] * 20 + [2**40], f"token {2**40} at place 20"),
        ([0.5], r"one sequence of integers, got float64\[1\]"),
        ([True], r"one sequence of integers, got bool\[1\]"),
        ([[1, 2]], r"one sequence of integers, got int64\[1, 2\]"),
        (3, r"one sequence of integers, got int64\[\]"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused_before_any_is(tokens, message):
    session, state = session_of("plain"), read_at_once("plain")[0][0][0]
    with pytest.raises(ValueError, match=message):
        session.append(state, tokens, on_refocus=lambda *step: pytest.fail("tokens were read"))


def test_a_session_that_has_read_nothing_predicts_nothing():
    session = session_of("plain")
    for ask in (session.predict, lambda state: session.generate(state, 1, jax.random.key(0))):
        with pytest.raises(ValueError, match=r"nothing was read yet.*append at least one token"):
            ask(session.init())


@pytest.mark.parametrize(("count", "temperature"), [(-1, 1.0), (1, -0.5), (1, float("nan")), (1, float("inf"))])
def test_generation_arguments_out_of_range_are_refused(count, temperature):
    session, state = session_of("plain"), read_at_once("plain")[1]
    with pytest.raises(ValueError, match=f"at least 0 and finite, got {count} and {temperature}"):
        session.generate(state, count, jax.random.key(0), temperature=temperature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hyper.context_end": 0.45},  # 32 tokens fit into 14 entries, but 31 of them do not
            "budget of 14 entries, .* a history of 32 tokens, and that takes 15: raise hyper.context_end or",
        ),
        (
            {"context.max_lod": 5, "context.window": 40},
            "must hold the 32 tokens that are forgotten at once, 8 recent tokens and a horizon of 4, got 40: raise",
        ),
        (
            {"context.horizon": 24, "context.window": 48, "hyper.context_end": 0.6},
            "must hold the 24 tokens .* got 48: raise it, or lower context.max_lod or context.horizon",
        ),
    ],
)
def test_a_budget_or_window_that_some_stream_does_not_fit_is_refused(changes, message):
    config = configs.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=message):
        Session(build_models(config), {}, config)
