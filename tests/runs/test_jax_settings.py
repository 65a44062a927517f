"""What of JAX's settings changes numbers is set by the run."""

import jax
import jax.numpy as jnp
import pytest

from lensjax.runs.engine import numerics
from tests.runs import cheap_programs, outcome, start, tiny_config

OTHER = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_default_matmul_precision": "bfloat16",
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The outcome of a run with JAX as it is."""
    folder = tmp_path_factory.mktemp("usual") / "run"
    with cheap_programs():
        start(tiny_config(folder))
    return outcome(folder)


@pytest.mark.parametrize("name", OTHER)
def test_e7_no_setting_of_jax_changes_a_run(usual, tmp_path, name):
    before = getattr(jax.config, name)
    jax.config.update(name, OTHER[name])
    try:
        with cheap_programs():
            start(tiny_config(tmp_path / "run"))
        assert getattr(jax.config, name) == OTHER[name]
    finally:
        jax.config.update(name, before)
    assert outcome(tmp_path / "run") == usual


def test_e7_precision_is_the_backends():
    with jax.default_matmul_precision("highest"), numerics.fixed():
        assert "HIGHEST" not in str(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))))


def test_e7_other_seeds_are_refused(tmp_path):
    jax.config.update("jax_random_seed_offset", 3)
    try:
        with pytest.raises(ValueError, match=r"jax_random_seed_offset is 3, .* unset JAX_RANDOM_SEED_OFFSET"):
            start(tiny_config(tmp_path / "run"))
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    assert not (tmp_path / "run").exists()


def test_e7_what_is_set_aside_is_said(monkeypatch):
    assert numerics.set_aside() == []
    monkeypatch.setenv("JAX_THREEFRY_PARTITIONABLE", "0")
    assert numerics.set_aside() == [
        "JAX_THREEFRY_PARTITIONABLE=0 is set aside: the numbers of a run do not depend on it"
    ]
