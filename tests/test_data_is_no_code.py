"""Nothing that is read as data can run code: no pickle, eval or exec but for what is named here, and why."""

import ast

import pytest

from tests.runs import ROOT

ALLOWED = {
    "experiments/train.py": {"exec_module": "presets and sweeps are Python, and documented as code"},
    "experiments/bench/aot.py": {"import_module": "a module of jaxlib, by a name that is written there"},
}
NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
"""Builtins that make code of text."""
METHODS = {"exec_module", "load_module", "run_path", "run_module", "import_module", "read_pickle", "from_pickle"}
"""Whatever they are methods of."""
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "yaml", "code", "runpy"}
"""Modules whose readers run what they read, or may."""


def found(source):
    """Each use of what could run data, as it stands in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in NAMES:
                yield function.id
            if isinstance(function, ast.Attribute) and function.attr in METHODS:
                yield function.attr
            if any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords):
                yield "allow_pickle"
            if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
                yield "shell"
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name.partition(".")[0] in MODULES)


def test_no_data_is_run_as_code():
    uses = {}
    for folder in ("lensjax", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if there := set(found(path.read_text(encoding="utf-8"))):
                uses[path.relative_to(ROOT).as_posix()] = there
    assert uses == {name: set(reasons) for name, reasons in ALLOWED.items()}


def test_what_is_allowed_is_documented_as_code():
    documented = (ROOT / "docs/guides/command_line.md").read_text(encoding="utf-8")
    assert "A preset or a sweep is a Python file: it is code" in documented


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import torch.hub", "eval('1')", "exec(text)"),
        *("np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "run(words, shell=True)"),
        *("importlib.import_module(name)", "spec.loader.exec_module(module)"),
    ],
)
def test_such_a_use_is_found(source):
    assert list(found(source))


@pytest.mark.parametrize("source", ["jax.eval_shape(f)", "lowered.compile()", "np.load(path)", "re.compile('x')"])
def test_others_are_not(source):
    assert not list(found(source))
