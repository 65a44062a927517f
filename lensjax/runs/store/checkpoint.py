"""Checkpoints of any pytree of arrays, through orbax: whole or not at all, and exact to the bit.

A checkpoint is the folder `<directory>/<step>`:

    arrays/          orbax: one array for each leaf, PRNG keys as their raw data
    manifest.json    step, name, shape and dtype of every leaf, the state of the data iterator, and of which run it is
    SHA256SUMS       a checksum of every other file, in the format of `sha256sum --check`

It is written under a hidden name, read back, and renamed when all of it is on the disk. The checksums make sure that
damage is noticed whatever the format beneath would make of it; files that they do not list are none of its own. Of
several processes the first writes, whole arrays, and all read.
"""

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.runs.engine import devices
from lensjax.runs.store import arrays, files, sums
from lensjax.runs.store.sums import checksums as _checksums

Tree = TypeVar("Tree")

_ARRAYS, _MANIFEST = "arrays", "manifest.json"
_HIDDEN, _ASIDE = ".tmp-", ".damaged-"
_LISTED = 5  # differences that an error message spells out


class DamagedError(ValueError):
    """A checkpoint is not as it was written."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        earlier = [step for step in steps(folder.parent) if step < int(folder.name)]
        fix = f"resume from step {earlier[-1]}" if earlier else "start anew where this phase begins"
        super().__init__(f"checkpoint {folder} is damaged: {what}; delete that folder to {fix}")


def save(
    directory: str | Path,
    step: int,
    tree: Any,
    *,
    data_state: Any = None,
    identity: Any = None,
    keep: int = 3,
    spare: int | None = None,
) -> Path:
    """Saves a checkpoint and deletes the oldest ones; when it returns, the checkpoint is final.

    Args:
      directory: folder of the checkpoints of one phase of a run; made if it is not there.
      step: names the checkpoint; at least 0.
      tree: pytree of arrays, typed PRNG keys among them.
      data_state: position of the data iterator (its `get_state()`); anything that JSON gives back equal.
      identity: of which run it is; likewise.
      keep: newest checkpoints to keep, this one included.
      spare: a step whose checkpoint stays however old it is.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: the step is there already, a leaf is not an array, `data_state` or `identity` is not JSON, or what was
        written does not read back equal.
      OSError: it could not be written, such as on a full disk; checkpoints that are there stay.
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
        "identity": identity,
    }
    _require_json("data_state", data_state)
    _require_json("identity", identity)
    manifest_text = json.dumps(manifest, indent=1)
    raw = devices.to_host({name: _raw(leaf) for name, leaf in leaves.items()})
    devices.in_first(lambda: _write(final, raw, manifest_text, keep=keep, spare=spare))
    return final


def steps(directory: str | Path) -> list[int]:
    """Lists the steps that have a checkpoint, in rising order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_step(path))


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
      DamagedError: the checkpoint is damaged.
      ValueError: it is missing, or is that of another step or of another tree.
    """
    folder, manifest = _checked(directory, step)
    return _fill(like, folder, manifest["arrays"], path=()), manifest["data_state"]


def data_state(directory: str | Path, step: int) -> Any:
    """The `data_state` of a checkpoint; arguments and errors are those of `restore`."""
    return _checked(directory, step)[1]["data_state"]


def identity(directory: str | Path, step: int) -> Any:
    """The `identity` of a checkpoint, None where it was saved without; arguments and errors are those of `restore`."""
    return _checked(directory, step)[1].get("identity")


def parts(directory: str | Path, step: int, *, path: tuple[str, ...]) -> set[str]:
    """Names right below a place in a checkpoint's tree; arguments are those of `restore_subtree`, and so are errors."""
    return set(like(directory, step, path=path))


def like(directory: str | Path, step: int, *, path: tuple[str, ...]) -> dict[str, Any]:
    """What lies below a place in a checkpoint's tree, as nested dicts of `jax.ShapeDtypeStruct`; else as `parts`."""
    prefix, tree = "".join(f"{part}/" for part in path), dict[str, Any]()
    for name, spec in _checked(directory, step)[1]["arrays"].items():
        if name.startswith(prefix):
            *above, last = name.removeprefix(prefix).split("/")
            leaf = jax.ShapeDtypeStruct(tuple(spec["shape"]), spec["dtype"])
            functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)[last] = leaf
    return tree


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
    folder, manifest = _checked(directory, step)
    here = "/".join(path)
    specs = {
        name: spec
        for name, spec in manifest["arrays"].items()
        if not path or name == here or name.startswith(f"{here}/")
    }
    return _fill(like, folder, specs, path=path)


def set_aside(directory: str | Path, step: int) -> Path:
    """Renames a checkpoint that is damaged, so that it counts no more; returns its new name, such as `.damaged-4`."""
    directory = Path(directory).absolute()
    names = (f"{_ASIDE}{step}{again}" for again in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    aside = next(path for path in map(directory.joinpath, names) if not path.exists())
    files.rename(directory / str(step), aside)
    return aside


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.name == str(int(path.name)) and path.is_dir()


def _write(final: Path, raw: dict[str, np.ndarray], manifest_text: str, *, keep: int, spare: int | None) -> None:
    """Writes one checkpoint, and deletes of those in its directory all but the newest ones and the one to spare."""
    if final.exists():
        what = "checkpoint" if final.is_dir() else "file"
        fix = "restore it, or delete it to write that step anew" if final.is_dir() else "move it away"
        raise ValueError(f"{what} {final} is there already; {fix}")
    directory = final.parent
    files.make_folder(directory)
    for stale in directory.glob(f"{_HIDDEN}*"):
        _delete(stale)
    hidden = directory / f"{_HIDDEN}{final.name}"
    try:
        with files.naming(hidden):
            _write_files(hidden, raw, manifest_text)
            files.sync_tree(hidden)
            hidden.rename(final)
    except Exception:
        _delete(hidden)  # half a checkpoint is of no use, and the disk may be full
        raise
    files.sync(directory)

    for old in steps(directory)[:-keep]:
        if old not in (spare, int(final.name)):
            # Renamed first: a deletion that is cut short leaves no half of a checkpoint under its name.
            _delete((directory / str(old)).rename(directory / f"{_HIDDEN}{old}"))


def _write_files(folder: Path, raw: dict[str, np.ndarray], manifest_text: str) -> None:
    """Writes all files of a checkpoint once its arrays have been read back equal."""
    folder.mkdir()
    arrays.write(folder / _ARRAYS, raw)
    back = arrays.read(folder / _ARRAYS)
    for name, array in raw.items():
        if array.size and (name not in back or back[name].tobytes() != array.tobytes()):
            raise ValueError(f"{folder / _ARRAYS} was written and does not read back: {name} is not what it was")
    (folder / _MANIFEST).write_text(manifest_text)
    (folder / sums.NAME).write_text(sums.to_text(_checksums(folder)))


def _delete(path: Path) -> None:
    """Deletes a file or a folder; what the file system keeps for now goes with a later save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fill(like: Tree, folder: Path, specs: dict[str, dict[str, Any]], *, path: tuple[str, ...]) -> Tree:
    """Puts the stored arrays whose names and specs are given into the structure of `like`."""
    expected = {"/".join((*path, *([name] if name else []))): leaf for name, leaf in _named_leaves(like).items()}
    _check_same_specs(folder, specs, {name: _spec(leaf) for name, leaf in expected.items()})
    raw = arrays.read(folder / _ARRAYS)
    for name, spec in specs.items():
        if name not in raw and 0 in spec["shape"]:
            raw[name] = np.zeros(spec["shape"], spec["dtype"])
        if name not in raw or not _is_as_told(raw[name], spec):
            _raise_damaged(folder, f"{name} in {_ARRAYS} is not the array that {_MANIFEST} describes")
    restored = [_place(raw[name], specs[name], leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _is_as_told(raw: np.ndarray, spec: dict[str, Any]) -> bool:
    """Whether an array has the shape and dtype of a manifest's entry."""
    if "key" not in spec:
        return {"shape": list(raw.shape), "dtype": str(raw.dtype)} == spec
    try:
        return _spec(jax.random.wrap_key_data(jnp.asarray(raw), impl=spec["key"])) == spec
    except (TypeError, ValueError):
        return False


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


def _require_json(name: str, value: Any) -> None:
    try:
        is_same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        is_same = False
    if not is_same:
        raise ValueError(f"{name} must be JSON (dicts with string keys, lists, finite numbers), got {value!r}")


def _checked(directory: str | Path, step: int) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder and its manifest, once every file in it is as it was written."""
    folder = Path(directory).absolute() / str(step)
    if not folder.is_dir():
        there = ", ".join(map(str, steps(directory))) or "none"
        raise ValueError(f"no checkpoint {folder}; steps in that directory: {there}")
    fault = sums.fault(folder, required=_MANIFEST)
    if fault is not None:
        _raise_damaged(folder, fault)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        is_whole = {"step", "arrays", "data_state"} <= manifest.keys()
        is_whole &= all({"shape", "dtype"} <= spec.keys() for spec in manifest["arrays"].values())
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        is_whole = False
    if not is_whole:
        _raise_damaged(folder, f"{_MANIFEST} does not describe a checkpoint")
    if manifest["step"] != step:
        raise ValueError(
            f"checkpoint {folder} is that of step {manifest['step']}, as its {_MANIFEST} says, and not of step {step}: "
            "move that folder away, or give it its own name"
        )
    return folder, manifest


def _raise_damaged(folder: Path, what: str) -> NoReturn:
    raise DamagedError(folder, what)


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
