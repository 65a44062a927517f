import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quiet_star import measure, thoughts
from tests.quiet_star.small import CONFIG, MODEL, baked, batch, compiled, score
from tests.small import jit

pytestmark = pytest.mark.slow


def test_arms_and_faithfulness_by_hand():
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
            scored = score(baked(), prompt, tokens)
            np.testing.assert_array_equal(answers[arm][i], jnp.argmax(scored.informed, axis=-1))
            np.testing.assert_allclose(answers[f"coherence_{arm}"][i], thoughts.coherence(scored.log_probs), rtol=1e-4)
        np.testing.assert_array_equal(answers["without"][i], jnp.argmax(scored.without))
    assert answers["random"].shape == (4, 3) and answers["greedy"].shape == (4, 1)
    report = measure.report([jax.device_get(answers)] * 2, CONFIG)
    assert report["accuracy_foreign"] == np.mean(answers["foreign"] == batch()["answer"][:, None])
    assert report["accuracy_without"] == np.mean(answers["without"] == batch()["answer"])
    shut = compiled(measure.answer_batch, threshold=0.99)(baked(), batch(), jax.random.key(0))
    assert not shut["injected"].any()
    np.testing.assert_array_equal(shut["sampled"], np.repeat(shut["without"][:, None], 3, axis=1))
