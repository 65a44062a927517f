"""The base model of a run that takes one from a checkpoint: read where it lies, never copied, known by its digest."""

import functools
from pathlib import Path

from lensjax import _settings
from lensjax._settings import require
from lensjax.models import Params
from lensjax.runs.config import Config


def resolve(config: Config) -> Config:
    """The config with the base model and the digest of its checkpoint, for a run to start with; no weights are loaded.

    Args:
      config: any; without `checkpoint.path` it is given back as it is.

    Returns:
      The config, whose `base` is that of the checkpoint and whose `checkpoint.path` is absolute.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is no checkpoint of a known model, its weights are not those of `checkpoint.sha256`, or its model
        does not go with the rest of the config.
    """
    if config.checkpoint.path is None:
        return config
    from lensjax.models import checkpoints

    digest = _checked_digest(config)
    path = Path(config.checkpoint.path).absolute()
    changes = {"checkpoint.path": str(path), "checkpoint.sha256": digest, "base": checkpoints.read_config(path)}
    return _settings.replace(config, **changes)


def load_base(config: Config) -> Params:
    """Parameters of a resolved config's base model.

    Raises:
      FileNotFoundError: the checkpoint is not where the config says.
      ValueError: its weights are not those of the config.
    """
    from lensjax.models import checkpoints

    _checked_digest(config)
    params: Params = checkpoints.load_params(config.checkpoint.path, config.base, config.checkpoint.dtype)
    return params


def _checked_digest(config: Config) -> str:
    path, expected = Path(str(config.checkpoint.path)), config.checkpoint.sha256
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint.path {path} is not there: put the weights back, or name where they are now in checkpoint.path "
            "(for a run, in its config.json)"
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = _digest(path, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    require(
        expected in (None, found),
        f"checkpoint.path {path} holds weights of SHA-256 {found}, and checkpoint.sha256 says {expected}: put those "
        "weights back, name where they are in checkpoint.path (for a run, in its config.json), or start a new run",
    )
    return found


@functools.lru_cache(maxsize=1)
def _digest(path: Path, stamp: object) -> str:
    """Once for several readings of files that have not changed since."""
    from lensjax.models import checkpoints

    digest: str = checkpoints.sha256(path)
    return digest
