import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quiet_star import bake, measure, reinforce, tasks, thoughts
from experiments.quiet_star.config import BakeConfig, QuietStarConfig, RLConfig
from experiments.quiet_star.model import ModelConfig, Reading
from experiments.quiet_star.tasks import TASKS, WORDS, QuestionSource, TaskConfig
from experiments.quiet_star.train import PRESETS, build_model
from lensjax.evaluation import faithfulness
from lensjax.runs.config import OptimizerConfig, StoppingConfig
from tests.small import jit

CONFIG = QuietStarConfig(
    batch_size=4,
    model=ModelConfig(dim=8, layers=1, heads=2, mlp_dim=8),
    bake=BakeConfig(steps=4, learning_rate=1e-2),
    rl=RLConfig(episodes=8, warmup_episodes=3, thoughts=3, value_hidden=8, learning_rate=1e-2, whiten=False),
    optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
    stopping=StoppingConfig(),
)
MODEL = build_model(CONFIG)
PROMPT_LENGTH, LENGTH = MODEL.prompt_length, MODEL.thought_length


@functools.cache
def batch(split="train", size=4):
    rows = [QuestionSource(CONFIG.task, split, 3)[i] for i in range(size)]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@functools.cache
def baked():
    """Not at its start, where all answers are nearly equal."""
    params = MODEL.init(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)


def drawn(seed=0, count=3):
    return jnp.asarray(np.random.default_rng(seed).integers(8, size=(count, LENGTH)), jnp.int32)


judge = jit(functools.partial(thoughts.judge, MODEL))
judge_all = jit(jax.vmap(functools.partial(thoughts.judge, MODEL), (None, 0, 0)))


@functools.cache
def compiled(function, **changes):
    config = replace(CONFIG, rl=replace(CONFIG.rl, **changes))
    return jit(functools.partial(function, config=config, model=MODEL))


def state(**changes):
    """A state whose policy and value have left their start."""
    fresh = reinforce.init_state(jax.random.key(1), config=CONFIG, baked=baked())
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh.params
    )
    return replace(fresh, params=moved, **changes)


@functools.cache
def played():
    roll_out = jit(functools.partial(reinforce.roll_out, settings=CONFIG.rl, model=MODEL))
    return roll_out(state().params["lm"], batch(), jax.random.key(2))


def only(**weights):
    """No term of the loss beside the policy's, but for those that are named."""
    return {"value_weight": 0.0, "entropy_weight": 0.0, "entropy_floor": 0.0, "kl_weight": 0.0} | weights


def loss_and_grads(now, asked, episode, **changes):
    found = compiled(_differentiated, **changes)
    return found(now.params, now, asked, episode)


def _differentiated(params, now, asked, episode, *, config, model):
    loss = functools.partial(
        reinforce.episode_loss, state=now, batch=asked, episode=episode, config=config, model=model
    )
    return jax.value_and_grad(loss, has_aux=True)(params)


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


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
    together = judge(params, prompt, drawn())
    for i, tokens in enumerate(drawn()):
        alone = judge(params, prompt, tokens[None])
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


def test_the_sampled_thoughts_are_those_of_the_judged_policy():
    params, prompt = baked(), batch()["prompt"][0]
    sample = jit(functools.partial(thoughts.sample, MODEL, count=4000))
    found = sample(params, prompt, jax.random.key(0))
    policy = np.exp(judge(params, prompt, found[:1]).policy[0, 0])
    np.testing.assert_allclose(np.bincount(found[:, 0], minlength=8) / 4000, policy, atol=0.03)
    second = found[found[:, 0] == int(policy.argmax())]
    expected = np.exp(judge(params, prompt, second[:1]).policy[0, 1])
    np.testing.assert_allclose(np.bincount(second[:, 1], minlength=8) / len(second), expected, atol=0.06)
    greedy = jit(functools.partial(thoughts.greedy, MODEL))(params, prompt)
    policy = judge(params, prompt, greedy).policy[0]
    np.testing.assert_array_equal(greedy[0], jnp.argmax(policy, axis=-1))


def test_the_gate_mixes_the_two_answers():
    params, prompt = baked(), batch()["prompt"][0]

    def with_gate(bias):
        gate = {"kernel": jnp.zeros_like(params["gate"]["kernel"]), "bias": jnp.asarray([bias])}
        return judge({**params, "gate": gate}, prompt, drawn())

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
        assert 0.3 < float(hardness(prompt, judge(fresh, prompt, drawn()).without)) <= 1


def test_coherence_by_hand():
    assert float(thoughts.coherence(jnp.log(jnp.asarray([0.5, 0.125])))) == pytest.approx(0.25)


# Right where the source is wrong


def test_the_policy_loss_is_that_of_the_thought_tokens():
    now, episode = state(), played()
    (loss, report), grads = loss_and_grads(now, batch(), episode, **only())
    judged = judge_all(now.params["lm"], batch()["prompt"], episode.thoughts)
    value = functools.partial(reinforce.value_model(CONFIG).apply, now.params["value"])
    values = np.asarray(jax.vmap(jax.vmap(jax.vmap(value)))(judged.features), np.float64)
    last = np.asarray(episode.rewards) - values[..., 1]
    first = 0.99 * values[..., 1] - values[..., 0] + 0.99 * 0.95 * last
    assert float(loss) == pytest.approx(-np.mean(np.stack([first, last], -1) * np.asarray(judged.log_probs)), rel=1e-4)
    assert float(report["rl/policy_loss"]) == float(loss)
    # The answer's cross-entropy has no part in it.
    for name in ("answer", "gate", "gate_hidden"):
        assert largest(grads["lm"][name]) == 0
    assert largest(grads["lm"]["thought"]) > 0 and largest(grads["lm"]["transformer"]) > 0


def test_advantages_run_over_time_and_the_order_of_the_batch_changes_nothing():
    now, episode, order = state(), played(), jnp.asarray([2, 0, 3, 1])
    mixed = jax.tree.map(lambda leaf: leaf[order], (batch(), episode))
    (loss, report), grads = loss_and_grads(now, batch(), episode)
    (other, others), moved = loss_and_grads(now, *mixed)
    assert float(other) == pytest.approx(float(loss), rel=1e-5)
    for name, value in report.items():
        assert float(others[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), moved, grads)
    # The reward of one prompt says nothing about the thoughts of another one.
    paid = replace(episode, rewards=episode.rewards.at[0].add(5.0))
    alone = [
        loss_and_grads(now, batch(), replace(one, injected=jnp.arange(4) > 0), **only())[0][0]
        for one in (episode, paid)
    ]
    assert float(alone[0]) == float(alone[1])
    assert float(loss_and_grads(now, batch(), paid)[0][0]) != float(loss)


def test_the_divergence_is_from_a_frozen_copy():
    now = reinforce.init_state(jax.random.key(1), config=CONFIG, baked=baked())
    step, kept, found = compiled(reinforce.rl_step), jax.tree.map(np.asarray, now.reference), []
    for _ in range(3):
        now, report = step(now, batch())
        found.append(float(report["rl/kl_divergence"]))
    jax.tree.map(np.testing.assert_array_equal, now.reference, kept)
    assert found[0] == pytest.approx(0, abs=1e-6) and found[2] > found[1] > 1e-5
    (_, report), _ = loss_and_grads(now, batch(), played())
    ours, theirs = (
        np.asarray(judge_all(params, batch()["prompt"], played().thoughts).policy, np.float64)
        for params in (now.params["lm"], baked())
    )
    by_hand = np.mean(np.sum(np.exp(ours) * (ours - theirs), axis=-1))
    assert float(report["rl/kl_divergence"]) == pytest.approx(by_hand, rel=1e-3)


def test_the_entropy_is_that_of_the_thought_policy_and_its_weight_decays():
    now = state(step=jnp.asarray(2, jnp.int32))
    (_, report), _ = loss_and_grads(now, batch(), played())
    policy = np.asarray(judge_all(now.params["lm"], batch()["prompt"], played().thoughts).policy, np.float64)
    assert float(report["rl/entropy"]) == pytest.approx(-np.mean(np.sum(np.exp(policy) * policy, axis=-1)), rel=1e-4)
    assert float(report["rl/entropy_coefficient"]) == pytest.approx(0.01 * 0.9995**2, rel=1e-5)
    # Another answer head, the same entropy.
    other = replace(now, params={**now.params, "lm": {**now.params["lm"], "answer": baked()["answer"]}})
    assert float(loss_and_grads(other, batch(), played())[0][1]["rl/entropy"]) == float(report["rl/entropy"])


def test_reward_and_loss_read_the_answer_at_the_same_places():
    """On a right trace the reward of a thought is what baking calls the loss without it, minus the loss with it."""
    asked, params = batch(), baked()
    right = np.stack([_right_trace(prompt) for prompt in np.asarray(asked["prompt"])])
    one = {**asked, "trace": jnp.asarray(right), "conclusion": asked["answer"]}
    _, report = jit(functools.partial(bake.bake_loss, model=MODEL))(params, one)
    gains = jax.vmap(
        lambda prompt, trace, answer: reinforce.gains(judge(params, prompt, trace[None]), answer, kind="log_prob")
    )(asked["prompt"], one["trace"], asked["answer"])
    assert float(jnp.mean(gains)) == pytest.approx(
        float(report["answer_loss_without"] - report["answer_loss"]), rel=1e-4
    )
    assert float(jnp.abs(gains).min()) > 1e-3


def _right_trace(prompt):
    first = prompt[prompt[-1]]
    return np.asarray([first, prompt[first]], np.int32)


def test_binary_gains_by_hand():
    right, wrong = jnp.log(jnp.asarray([0.8, 0.2])), jnp.log(jnp.asarray([0.3, 0.7]))
    judged = judge(baked(), batch()["prompt"][0], drawn(count=2))
    for without, expected in ((right, [0, -1]), (wrong, [1, 0])):
        both = replace(judged, without=without, informed=jnp.stack([right, wrong]))
        assert reinforce.gains(both, 0, kind="accuracy").tolist() == expected
    assert reinforce.gains(both, 0, kind="log_prob").tolist() == pytest.approx([np.log(0.8 / 0.3), 0], abs=1e-6)


def test_the_warm_up_raises_the_rate():
    now, step, rates = state(), compiled(reinforce.rl_step), []
    for _ in range(5):
        now, report = step(now, batch())
        rates.append(float(report["rl/learning_rate"]))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert now.recent.count == 5 and int(report["rl/episode"]) == 5


# The rest of the loss


def test_the_value_network_learns_and_the_model_does_not_learn_from_it():
    episode = replace(played(), rewards=jnp.zeros_like(played().rewards))
    (_, report), grads = loss_and_grads(state(), batch(), episode, **only(value_weight=0.5))
    (_, _), without = loss_and_grads(state(), batch(), episode, **only())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), grads["lm"], without["lm"])
    assert largest(grads["value"]) > 0 == largest(without["value"]) and float(report["rl/value_loss"]) > 0


def test_a_shuffled_reward_goes_to_another_thought():
    roll_out = functools.partial(reinforce.roll_out, model=MODEL)
    settings = replace(CONFIG.rl, shuffle_rewards=True)
    found = jit(functools.partial(roll_out, settings=settings))(state().params["lm"], batch(), jax.random.key(2))
    np.testing.assert_array_equal(found.gains, played().gains)
    np.testing.assert_array_equal(played().rewards, played().gains)
    assert sorted(found.rewards.ravel().tolist()) == sorted(found.gains.ravel().tolist())
    assert (found.rewards != found.gains).any()


def test_muon_and_grokfast_move_everything_that_is_trained():
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="muon", grokfast=0.1))
    start = bake.init_state(jax.random.key(0), config=config, model=MODEL)
    after, _ = jit(functools.partial(bake.bake_step, config=config, model=MODEL))(start, batch())
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), after.params, start.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_steps_are_compiled_once(compiles):
    step = compiled(reinforce.rl_step)
    now, _ = step(reinforce.init_state(jax.random.key(1), config=CONFIG, baked=baked()), batch())
    with compiles() as names:
        step(now, batch("validation"))
    assert names == []


# Held-out measures


def test_arms_and_the_check_against_theatre_by_hand():
    """Two prompts of two thoughts; all own ones are right, the foreign and the random ones are not."""
    own = {"answer": np.asarray([3, 4]), "injected": np.ones(2, bool), "difficulty": np.ones(2)}
    own |= {"without": np.asarray([3, 0]), "nll_without": np.ones(2)}
    for arm, answers in zip(
        measure.ARMS, ([[3, 3], [4, 4]], [[3], [4]], [[0, 0], [0, 4]], [[4, 4], [3, 3]]), strict=True
    ):
        own |= {arm: np.asarray(answers), f"nll_{arm}": np.ones(2)}
        own |= {f"coherence_{arm}": np.full(np.shape(answers), 0.9 if arm == "sampled" else 0.1)}
    found = measure.report([own, own], CONFIG)
    names = ["without", *measure.ARMS]
    assert [found[f"accuracy_{name}"] for name in names] == [0.5, 1, 1, 0.25, 0]
    prefix = "rl/anti_theater_"
    checks = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    assert checks == pytest.approx(
        {"divergence": 0.5, "ablation": 0.5, "correlation": 1, "counterfactual": 1, "all_passed": 1}
    )
    # What is always alike says nothing, and fails.
    flat = own | {f"coherence_{arm}": np.ones((2, 2)) for arm in ("sampled", "foreign")}
    found = measure.report([flat], CONFIG)
    assert np.isnan(found["rl/anti_theater_correlation"]) and found["rl/anti_theater_all_passed"] == 0


def test_foreign_thoughts_are_those_of_the_prompt_before():
    answers = compiled(measure.answer_batch)(baked(), batch(), jax.random.key(0))
    keys = jax.random.split(jax.random.split(jax.random.key(0))[0], 4)
    sample = jit(functools.partial(thoughts.sample, MODEL, count=3))
    own = [sample(baked(), prompt, key) for prompt, key in zip(batch()["prompt"], keys, strict=True)]
    for i, prompt in enumerate(batch()["prompt"]):
        for arm, tokens in (("sampled", own[i]), ("foreign", own[i - 1])):
            judged = judge(baked(), prompt, tokens)
            np.testing.assert_array_equal(answers[arm][i], jnp.argmax(judged.informed, axis=-1))
            np.testing.assert_allclose(answers[f"coherence_{arm}"][i], thoughts.coherence(judged.log_probs), rtol=1e-4)
        np.testing.assert_array_equal(answers["without"][i], jnp.argmax(judged.without))
    assert answers["random"].shape == (4, 3) and answers["greedy"].shape == (4, 1)
    report = measure.report([jax.device_get(answers)] * 2, CONFIG)
    assert report["accuracy_foreign"] == np.mean(answers["foreign"] == batch()["answer"][:, None])
    assert report["accuracy_without"] == np.mean(answers["without"] == batch()["answer"])
    shut = compiled(measure.answer_batch, threshold=0.99)(baked(), batch(), jax.random.key(0))
    assert not shut["injected"].any()
    np.testing.assert_array_equal(shut["sampled"], np.repeat(shut["without"][:, None], 3, axis=1))


# Tasks


def test_questions_and_answers_by_hand():
    instance = tasks.Instance("", np.asarray([]), 2, np.stack([[1, 2, 0, 3]] * 3))
    assert instance.answer == 2
    random = np.random.default_rng(0)
    assert instance.trace(random, 1.0).tolist() == [0, 1]
    first, second = np.asarray([instance.trace(random, 0.5) for _ in range(4000)]).T
    assert np.mean(first == 0) == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    # A step after a wrong one follows from that.
    assert np.mean(second[first == 3] == 3) == pytest.approx(0.5 + 0.5 / 4, abs=0.06)


@pytest.mark.parametrize("index", range(3))
def test_a_chain_of_pointers(index):
    row = QuestionSource(TaskConfig("pointer", right_share=1.0), "train", 0)[index]
    permutation, at = row["prompt"][:8], row["prompt"][8]
    assert sorted(permutation) == list(range(8))
    assert row["trace"].tolist() == [permutation[at], permutation[permutation[at]]]
    assert row["answer"] == row["conclusion"] == permutation[permutation[permutation[at]]]


def test_a_sum_in_words():
    row = QuestionSource(TaskConfig("arithmetic", right_share=1.0), "test", 0)[0]
    words = [WORDS[token] for token in row["prompt"]]
    assert len(words) == TASKS["arithmetic"].prompt_length and " ".join(words[-3:]) == "last digit ?"
    total, totals = int(words[2]), [int(words[2])]
    for verb, number in zip(words[6:-3:4], words[7:-3:4], strict=True):
        total += int(number) * (1 if verb in ("finds", "buys", "gets") else -1)
        totals.append(total % 10)
    assert [*row["trace"], row["answer"]] == totals and row["conclusion"] == totals[-1]


@pytest.mark.parametrize("name", ["pointer", "arithmetic"])
def test_instances_are_held_out_whatever_the_seed(name):
    config, random = TaskConfig(name), np.random.default_rng(0)
    drawn = [TASKS[name].draw(random) for _ in range(3000)]
    shares = [np.mean([tasks.split_of(one) == split for one in drawn]) for split in tasks.SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    seen = {
        split: {_name(name, QuestionSource(config, split, seed)[i]) for i in range(60) for seed in range(2)}
        for split in tasks.SPLITS
    }
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    one, again = (QuestionSource(config, "test", 4)[7] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)


def _name(task, row):
    """What decides the split: the permutation, or the numbers and signs in whatever words."""
    if task == "pointer":
        return tuple(row["prompt"][:8])
    words = [WORDS[token] for token in row["prompt"]]
    signs = [verb in ("finds", "buys", "gets") for verb in words[6:-3:4]]
    return (words[2], *signs, *words[7:-3:4])


# Settings


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            RLConfig,
            {"warmup_episodes": 1500},
            "warmup_episodes must be at least 0 and below rl.episodes 1500, got 1500",
        ),
        (RLConfig, {"reward": "loss"}, "reward must be one of log_prob, accuracy"),
        (RLConfig, {"kl_weight": -1.0}, "rl.kl_weight must be finite and at least 0"),
        (TaskConfig, {"right_share": 1.5}, r"task.right_share must be in \[0, 1\], got 1.5"),
        (ModelConfig, {"dim": 10, "heads": 4}, "model.dim must be a multiple of model.heads 4, got 10"),
        (QuietStarConfig, {"batch_size": 1}, "batch_size must be 2 or more"),
        (BakeConfig, {"learning_rate": 0.0}, "bake.learning_rate must be finite and above 0"),
    ],
)
def test_bad_settings_are_named(section, values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_thresholds_are_those_of_the_library():
    assert CONFIG.theatre == faithfulness.TheatreConfig(0.30, 0.02, 0.5, 0.02)


def test_the_presets_can_stop_and_a_patience_that_cannot_run_out_is_refused():
    for preset in PRESETS.values():
        evaluations = preset.rl.episodes // preset.eval_steps
        assert preset.stopping.patience < evaluations
    patient = replace(CONFIG, eval_steps=1, stopping=StoppingConfig(patience=7))
    assert patient.stopping.patience == 7
    with pytest.raises(ValueError, match=r"stopping\.patience 8 cannot run out: with eval_steps 1 .*rl\.episodes 8"):
        replace(patient, stopping=StoppingConfig(patience=8))
    # A baked model that is taken from another run is not baked here.
    rare = replace(patient, bake=replace(CONFIG.bake, steps=20), stopping=StoppingConfig(patience=10))
    with pytest.raises(ValueError, match="no phase has more than 8 evaluations"):
        replace(rare, init="runs/other")
