import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quiet_star import reinforce, thoughts
from experiments.quiet_star.config import RLConfig
from experiments.quiet_star.model import Reading
from experiments.quiet_star.train import build_model
from tests.quiet_star.small import CONFIG, LENGTH, MODEL, PROMPT_LENGTH, baked, batch, compiled, drawn, largest, score
from tests.small import jit

pytestmark = pytest.mark.slow

# The model


def test_a_thought_token_sees_the_prompt_and_the_earlier_tokens_of_its_own_thought_alone():
    """In two layers, through which more could leak than through one."""
    model = build_model(replace(CONFIG, model=replace(CONFIG.model, layers=2)))
    params, prompt = model.init(jax.random.key(0)), batch()["prompt"][0]
    embed = jit(model.embed)
    embeddings = jnp.stack([embed(params, tokens, PROMPT_LENGTH) for tokens in drawn()])

    @jit
    def derivatives(of_prompt, of_thoughts):
        def read(of_prompt):
            memory = jnp.zeros((2, PROMPT_LENGTH + LENGTH, 2, 4))
            return Reading(*model._extend(params, (memory, memory), of_prompt, 0))

        reading = read(of_prompt)
        return (
            jax.jacrev(lambda x: jnp.sum(read(x).hidden, axis=-1))(of_prompt),
            jax.jacrev(lambda x: jnp.sum(model.branches(params, reading, x), axis=-1))(of_thoughts),
            jax.jacrev(lambda x: jnp.sum(model.branches(params, read(x), of_thoughts), axis=-1))(of_prompt),
        )

    found = derivatives(embed(params, prompt, 0), embeddings)
    in_prompt, in_thoughts, across = (np.abs(np.asarray(x)).max(axis=-1) > 0 for x in found)
    np.testing.assert_array_equal(in_prompt, np.tril(np.ones_like(in_prompt)))
    assert across.all()
    for i, a, j, b in np.ndindex(in_thoughts.shape):  # thought i after token a, by token b of thought j
        assert in_thoughts[i, a, j, b] == (i == j and b <= a)


def test_thoughts_side_by_side_are_those_read_one_by_one_and_token_by_token():
    params, prompt = baked(), batch()["prompt"][0]
    together = score(params, prompt, drawn())
    for i, tokens in enumerate(drawn()):
        alone = score(params, prompt, tokens[None])
        np.testing.assert_allclose(alone.policy[0], together.policy[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(alone.informed[0], together.informed[i], rtol=1e-4, atol=1e-5)

    @jit
    def one_by_one(tokens):
        hidden, memory = MODEL.extend(params, MODEL.read(params, prompt).memory, tokens[:1], PROMPT_LENGTH)
        later, _ = MODEL.extend(params, memory, tokens[1:], PROMPT_LENGTH + 1)
        before = MODEL.read(params, prompt).hidden[-1]
        return MODEL.thought_log_probs(params, hidden[0]), MODEL.answer_log_probs(params, before, later[0])[0]

    policy, answer = one_by_one(drawn()[0])
    np.testing.assert_allclose(policy, together.policy[0, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer, together.informed[0], rtol=1e-4, atol=1e-5)


def test_the_sampled_thoughts_are_those_of_the_scored_policy():
    params, prompt = baked(), batch()["prompt"][0]
    sample = jit(functools.partial(thoughts.sample, MODEL, count=4000))
    found = sample(params, prompt, jax.random.key(0))
    policy = np.exp(score(params, prompt, found[:1]).policy[0, 0])
    np.testing.assert_allclose(np.bincount(found[:, 0], minlength=8) / 4000, policy, atol=0.03)
    second = found[found[:, 0] == int(policy.argmax())]
    expected = np.exp(score(params, prompt, second[:1]).policy[0, 1])
    np.testing.assert_allclose(np.bincount(second[:, 1], minlength=8) / len(second), expected, atol=0.06)
    greedy = jit(functools.partial(thoughts.greedy, MODEL))(params, prompt)
    policy = score(params, prompt, greedy).policy[0]
    np.testing.assert_array_equal(greedy[0], jnp.argmax(policy, axis=-1))


def test_the_gate_mixes_the_two_answers():
    params, prompt = baked(), batch()["prompt"][0]

    def with_gate(bias):
        gate = {"kernel": jnp.zeros_like(params["gate"]["kernel"]), "bias": jnp.asarray([bias])}
        return score({**params, "gate": gate}, prompt, drawn())

    shut, half, wide = with_gate(-99.0), with_gate(0.0), with_gate(99.0)
    np.testing.assert_allclose(shut.informed, jnp.broadcast_to(shut.without, shut.informed.shape), rtol=1e-5, atol=1e-6)
    assert largest(wide.informed - shut.informed) > 0.1
    mixed = jax.nn.log_softmax((wide.informed + shut.informed) / 2)
    np.testing.assert_allclose(half.informed, mixed, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(half.share, 0.5)


# Who gets a thought


def test_difficulty_reaches_both_ends_and_every_threshold_is_below_its_highest():
    sure, unsure = jax.nn.log_softmax(jnp.asarray([99.0, 0.0, 0.0])), jnp.full(3, -np.log(3))
    sharp, spread = jnp.zeros((1, 2, 4)).at[..., 1].set(1.0), jnp.full((1, 2, 4), 0.25)
    assert float(thoughts.difficulty(sure, sharp, 0)) == pytest.approx(0, abs=1e-6)
    assert float(thoughts.difficulty(sure, sharp, 2)) == pytest.approx(1 / 3, abs=1e-5)
    assert float(thoughts.difficulty(unsure, sharp)) == pytest.approx(1 / 2, abs=1e-5)
    assert float(thoughts.difficulty(sure, spread)) == pytest.approx(1 / 2, abs=1e-5)
    assert float(thoughts.difficulty(unsure, spread)) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"rl.threshold must be in \[0, 1\), got 1"):
        RLConfig(threshold=1.0)


def test_thoughts_occur_where_prompts_are_hard():
    """A fresh model finds everything hard; where no prompt is, nothing is learned and nothing breaks."""
    fresh = MODEL.init(jax.random.key(0))
    start = reinforce.init_state(jax.random.key(1), config=CONFIG, baked=fresh)
    for threshold, count in ((0.0, 3), (0.99, 0)):
        after, report = compiled(reinforce.rl_step, threshold=threshold)(start, batch())
        assert float(report["rl/num_thoughts"]) == count
        moved = jax.tree.map(jnp.subtract, after.params["lm"], start.params["lm"])
        assert (largest(moved) > 0) == (float(report["rl/coherence"]) > 0) == (count > 0)
    hardness = jit(lambda prompt, without: thoughts.difficulty(without, MODEL.attention(fresh, prompt)))
    for prompt in batch()["prompt"]:
        assert 0.3 < float(hardness(prompt, score(fresh, prompt, drawn()).without)) <= 1


def test_coherence_by_hand():
    assert float(thoughts.coherence(jnp.log(jnp.asarray([0.5, 0.125])))) == pytest.approx(0.25)
