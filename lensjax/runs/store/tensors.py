"""Parameters as a safetensors file, both ways: data that runs nothing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lensjax._settings import require
from lensjax.models import Params

_EXTRA = "safetensors files need safetensors: pip install 'lensjax[hf]'"


def file_of(folder: Path, part: str) -> Path:
    """Where a part is in a folder of exported models."""
    return folder / f"{part}.safetensors"


def write(path: Path, params: Params) -> None:
    """Writes parameters, under their names in the tree, joined by dots.

    Raises:
      ImportError: the extra `hf` is not installed.
    """
    try:
        from safetensors.flax import save_file
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    save_file({name: jnp.asarray(np.asarray(leaf)) for name, leaf in _named(params).items()}, path)


def read(path: Path, like: Params) -> Params:
    """Reads parameters that are to have the names, shapes and types of a tree.

    Args:
      path: the file.
      like: a tree of arrays or of their shapes.

    Raises:
      ValueError: the file is not whole, or its tensors are not those of the tree; names file and tensor.
      ImportError: the extra `hf` is not installed.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax.numpy as jnp
      >>> from lensjax.runs.store import tensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     tensors.write(Path(folder, "a"), {"head": {"kernel": jnp.arange(3.0)}})
      ...     tensors.read(Path(folder, "a"), {"head": {"kernel": jnp.zeros(3)}})["head"]["kernel"].tolist()
      [0.0, 1.0, 2.0]
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    wanted = _named(like)
    try:
        with safe_open(path, framework="flax") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): export or fetch it again") from error
    other = sorted(wanted.keys() ^ found.keys())
    require(
        not other,
        f"{path} is of another model than config.json beside it says: {', '.join(other[:4])} "
        f"{'is' if len(other) == 1 else 'are'} in one of them alone",
    )
    for name, leaf in wanted.items():
        is_, should = (f"{one.dtype}{list(one.shape)}" for one in (found[name], leaf))
        require(is_ == should, f"{path}: {name} must be {should} by config.json beside it, got {is_}")
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    params: Params = jax.tree.unflatten(structure, [found[_name(keys)] for keys, _ in leaves])
    return params


def _named(params: Params) -> dict[str, jax.Array]:
    return {_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(keys: tuple[object, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")
