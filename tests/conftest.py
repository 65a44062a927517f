"""Strict settings for every test, and the fixtures that several of them share.

Warnings are errors by the pytest settings in pyproject.toml.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tests import quick

# Before anything imports jax, and for subprocesses. JAX_PLATFORMS=cuda runs the tests on a GPU instead.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# What is spread over devices is tested on two.
os.environ.setdefault("XLA_FLAGS", f"{quick.FLAGS} --xla_force_host_platform_device_count=2")
os.environ.update(quick.ENVIRONMENT | os.environ)
# Nothing is kept in the cache folder of whoever runs the tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Derandomised: a property either passes on every machine or fails on every machine. No deadline, since the
# first example of each shape pays for a compile.
hypothesis.settings.register_profile("lensjax", derandomize=True, deadline=None)
hypothesis.settings.load_profile("lensjax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: as the last one, such a file would keep one worker busy and the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    gc.freeze()  # what is imported stays: looking through it again and again finds nothing


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes that tests start keep what they compile, for each other: one folder for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compiles() -> Callable[[], AbstractContextManager[list[str]]]:
    """A context manager that lists the names of the functions which XLA compiles inside it.

    Example: `with compiles() as names: step(state, batch)` and then `assert names == ["jit(step)"]`.
    """
    return _list_compiles


@contextlib.contextmanager
def _list_compiles() -> Iterator[list[str]]:
    names: list[str] = []

    def listen(event: str, seconds: float, **labels: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(labels.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
