"""Checkpoints of any pytree of arrays, through orbax: whole or not at all, and exact to the bit.

A checkpoint is the folder `<directory>/<step>`:

    arrays/          orbax: one array for each leaf, PRNG keys as their raw data
    manifest.json    step, name, shape and dtype of every leaf, and the state of the data iterator
    SHA256SUMS       a checksum of every other file, in the format of `sha256sum --check`

It is written under a hidden name and renamed when complete. The checksums make sure that damage is noticed whatever
the format beneath would make of it. Of several processes the first one writes, whole arrays, and all of them read.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lensjax.runs.engine import devices

Tree = TypeVar("Tree")

_ARRAYS, _MANIFEST, _SUMS = "arrays", "manifest.json", "SHA256SUMS"
_HIDDEN = ".tmp-"
_LISTED = 5  # differences that an error message spells out


def save(
    directory: str | Path,
    step: int,
    tree: Any,
    *,
    data_state: Any = None,
    keep: int = 3,
    spare: int | None = None,
) -> Path:
    """Saves a checkpoint and deletes the oldest ones; when it returns, the checkpoint is final.

    Args:
      directory: folder of the checkpoints of one phase of a run; made if it is not there.
      step: names the checkpoint; at least 0.
      tree: pytree of arrays, typed PRNG keys among them.
      data_state: position of the data iterator (its `get_state()`); anything that JSON gives back equal.
      keep: newest checkpoints to keep, this one included.
      spare: a step whose checkpoint stays however old it is.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: the step is there already, a leaf is not an array, or `data_state` is not JSON.
    """
    directory = Path(directory).absolute()
    final = directory / str(step)
    if step < 0 or keep < 1:
        raise ValueError(f"expected a step of at least 0 and a keep of at least 1, got {step} and {keep}")
    leaves = _named_leaves(tree)
    manifest = {
        "step": step,
        "arrays": {name: _spec(leaf) for name, leaf in leaves.items()},
        "data_state": data_state,
    }
    manifest_text = _to_json(manifest)
    raw = devices.to_host({name: _raw(leaf) for name, leaf in leaves.items()})
    devices.in_first(lambda: _write(final, raw, manifest_text, keep=keep, spare=spare))
    return final


def steps(directory: str | Path) -> list[int]:
    """Lists the steps that have a checkpoint, in rising order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def latest_step(directory: str | Path) -> int | None:
    """Returns the newest step that has a checkpoint, or None."""
    return max(steps(directory), default=None)


def restore(directory: str | Path, step: int, like: Tree) -> tuple[Tree, Any]:
    """Restores a whole checkpoint.

    Args:
      directory: as given to `save`.
      step: as given to `save`.
      like: pytree with the structure, shapes and dtypes to expect; its leaves are arrays, or
        `jax.ShapeDtypeStruct` from `jax.eval_shape`.

    Returns:
      The tree, bit for bit as it was saved, and its `data_state`. A leaf is a numpy array where that of `like`
      is one, takes the sharding of a committed leaf, and else goes to the default device.

    Raises:
      ValueError: the checkpoint is missing or damaged, or is not the one of such a tree.
    """
    folder = _checked_folder(directory, step)
    manifest = json.loads((folder / _MANIFEST).read_text())
    return _fill(like, folder, manifest["arrays"], prefix=""), manifest["data_state"]


def data_state(directory: str | Path, step: int) -> Any:
    """The `data_state` of a checkpoint; arguments and errors are those of `restore`."""
    return json.loads((_checked_folder(directory, step) / _MANIFEST).read_text())["data_state"]


def parts(directory: str | Path, step: int, *, path: tuple[str, ...]) -> set[str]:
    """Names right below a place in a checkpoint's tree; arguments are those of `restore_subtree`, and so are errors."""
    prefix = "".join(f"{part}/" for part in path)
    names = json.loads((_checked_folder(directory, step) / _MANIFEST).read_text())["arrays"]
    return {name.removeprefix(prefix).partition("/")[0] for name in names if name.startswith(prefix)}


def restore_subtree(directory: str | Path, step: int, like: Tree, *, path: tuple[str, ...]) -> Tree:
    """Restores one part of a checkpoint, such as `path=("params", "base")`.

    Args:
      directory: as given to `save`.
      step: as given to `save`.
      like: the part, as for `restore`.
      path: keys, field names or indices that lead from the saved tree to the part.

    Returns:
      The part.

    Raises:
      ValueError: see `restore`.
    """
    folder = _checked_folder(directory, step)
    prefix = "".join(f"{part}/" for part in path)
    specs = json.loads((folder / _MANIFEST).read_text())["arrays"]
    return _fill(like, folder, {name: spec for name, spec in specs.items() if name.startswith(prefix)}, prefix=prefix)


def _write(final: Path, raw: dict[str, Any], manifest_text: str, *, keep: int, spare: int | None) -> None:
    """Writes one checkpoint, and deletes of those in its directory all but the newest ones and the one to spare."""
    if final.exists():
        raise ValueError(f"checkpoint {final} is there already; restore it, or delete it to write that step anew")
    directory = final.parent
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(f"{_HIDDEN}*"):
        shutil.rmtree(stale)
    hidden = directory / f"{_HIDDEN}{final.name}"
    with _orbax() as orbax:
        # orbax has no arrays without elements; the manifest alone describes them.
        orbax.save(hidden / _ARRAYS, {name: np.asarray(leaf) for name, leaf in raw.items() if leaf.size})
    (hidden / _MANIFEST).write_text(manifest_text)
    (hidden / _SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in _checksums(hidden).items()))
    hidden.rename(final)

    for old in steps(directory)[:-keep]:
        if old != spare:
            # Renamed first: a deletion that is cut short leaves no half of a checkpoint under its name.
            shutil.rmtree((directory / str(old)).rename(directory / f"{_HIDDEN}{old}"))


def _orbax() -> ocp.Checkpointer:
    """orbax for this process alone: it would otherwise wait for the others at every call."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _fill(like: Tree, folder: Path, specs: dict[str, dict[str, Any]], *, prefix: str) -> Tree:
    """Puts the stored arrays whose names and specs are given into the structure of `like`."""
    expected = {prefix + name: leaf for name, leaf in _named_leaves(like).items()}
    _check_same_specs(folder, specs, {name: _spec(leaf) for name, leaf in expected.items()})
    with _orbax() as orbax:
        raw = orbax.restore(folder / _ARRAYS)
    for name, spec in specs.items():
        if name not in raw:
            raw[name] = np.zeros(spec["shape"], spec["dtype"])
    restored = [_place(raw[name], specs[name], leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _place(raw: np.ndarray, spec: dict[str, Any], like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return raw
    array = jax.device_put(raw)
    array = jax.random.wrap_key_data(array, impl=spec["key"]) if "key" in spec else array
    return devices.put(array, like.sharding) if getattr(like, "committed", False) else array


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Maps names such as `params/base/embed` to leaves, in the order of the tree's leaves."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the tree have the same name: expected no / in its keys")
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(f"leaf {name} is not an array: expected one of jax or numpy, got {leaf!r}")
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _spec(leaf: Any) -> dict[str, Any]:
    spec = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    # A ShapeDtypeStruct has no implementation to ask for; its dtype says as much.
    return spec | {"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) and isinstance(leaf, jax.Array) else spec


def _to_json(manifest: dict[str, Any]) -> str:
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
        is_same = json.loads(text) == manifest
    except (TypeError, ValueError):
        is_same = False
    if not is_same:
        state = manifest["data_state"]
        raise ValueError(f"data_state must be JSON (dicts with string keys, lists, finite numbers), got {state!r}")
    return text


def _checksums(folder: Path) -> dict[str, str]:
    """Maps each file under a folder, except for the list of sums, to its SHA-256."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _SUMS:
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _checked_folder(directory: str | Path, step: int) -> Path:
    """Returns a checkpoint's folder once every file in it is as it was written."""
    folder = Path(directory).absolute() / str(step)
    if not folder.is_dir():
        there = ", ".join(map(str, steps(directory))) or "none"
        raise ValueError(f"no checkpoint {folder}; steps in that directory: {there}")
    try:
        lines = (folder / _SUMS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        _raise_damaged(folder, f"{_SUMS} is missing")
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    sums = _checksums(folder)
    for name in sorted(expected.keys() | sums.keys()):
        if name not in sums:
            _raise_damaged(folder, f"{name} is missing")
        if name not in expected:
            _raise_damaged(folder, f"{_SUMS} does not list {name}")
        if sums[name] != expected[name]:
            _raise_damaged(folder, f"{name} is not as it was written")
    return folder


def _raise_damaged(folder: Path, what: str) -> NoReturn:
    earlier = [step for step in steps(folder.parent) if step < int(folder.name)]
    fix = f"resume from step {earlier[-1]}" if earlier else "start anew (there is no earlier checkpoint)"
    raise ValueError(f"checkpoint {folder} is damaged: {what}; delete that folder to {fix}")


def _check_same_specs(folder: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    def text(spec: dict[str, Any]) -> str:
        return f"{spec['dtype']}{spec['shape']}"

    faults = [f"lacks {name}" for name in expected if name not in stored]
    faults += [f"holds an unexpected {name}" for name in stored if name not in expected]
    faults += [
        f"holds {name} as {text(stored[name])}, not {text(spec)}"
        for name, spec in expected.items()
        if name in stored and text(stored[name]) != text(spec)
    ]
    if faults:
        rest = f", and {len(faults) - _LISTED} more differences" if len(faults) > _LISTED else ""
        raise ValueError(
            f"checkpoint {folder} does not fit: it {', '.join(faults[:_LISTED])}{rest}; "
            "use the configuration that it was written with"
        )
