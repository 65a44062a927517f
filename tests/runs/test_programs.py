"""Compiled programs are kept from run to run, and what becomes of the folder stops none."""

import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import command
from lensjax._settings import settings
from lensjax.runs.engine import programs

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a user who has set nothing."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield tmp_path / "caches" / "lensjax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_they_are_kept_in_the_cache_folder_of_the_user_alone(place, monkeypatch):
    assert programs.keep() is None
    assert jax.config.jax_compilation_cache_dir == str(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(programs.folder()) == "/home/somebody/.cache/lensjax"


@pytest.mark.parametrize(
    "change", [{"jax_compilation_cache_dir": "elsewhere"}, {"jax_enable_compilation_cache": False}]
)
def test_what_the_environment_says_goes_before(place, change):
    for name, value in change.items():
        jax.config.update(name, value)
    assert programs.keep() is None
    assert jax.config.jax_compilation_cache_dir == change.get("jax_compilation_cache_dir") and not place.exists()


def test_a_folder_that_cannot_be_used_is_said_in_one_line_and_stops_nothing(place, capsys):
    place.parent.write_text("a file")
    acted = []
    command.program(acted.append, Nothing, [], description=None)
    assert len(acted) == 1 and jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept, every start compiles them again: ")
    assert str(place.parent) in line


@settings()
class Nothing:
    """No flags."""


def test_those_go_first_that_were_used_longest_ago(tmp_path):
    for age, name in enumerate(("newest", "sub/second", "third", "oldest")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 500))
    os.utime(tmp_path / "third", (0, 2000))  # nobody has read it, somebody has written it last of all
    programs.make_room(tmp_path, 25)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"newest", "third"}
    programs.make_room(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_program_is_read_back_and_gives_the_same_bits_and_a_damaged_one_is_made_anew(place):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    events: list[str] = []
    listen = lambda name, **labels: events.append(name.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    rows = np.linspace(-3, 3, 400, dtype=np.float32).reshape(20, 20)
    programs.keep()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def result():
        jax.clear_caches()
        step = jax.jit(lambda state: {"a": jnp.tanh(state["a"] @ state["a"]), "b": state["b"] + 1}, donate_argnums=0)
        state = {"a": jax.device_put(rows), "b": jax.device_put(np.int32(3))}
        for _ in range(3):
            state = step(state)
        return {name: leaf.tobytes() for name, leaf in jax.device_get(state).items()}

    try:
        first = result()
        assert "cache_hits" not in events and list(place.glob("jit__lambda*"))
        assert result() == first and events.count("cache_hits") >= 1
        for path in place.iterdir():
            path.write_bytes(path.read_bytes()[:100])
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
            assert result() == first
    finally:
        jax.monitoring.unregister_event_listener(listen)
