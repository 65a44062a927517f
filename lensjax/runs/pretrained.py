"""The base model of a run that takes one from a checkpoint: read where it lies, never copied, known by its digest."""

import functools
from dataclasses import replace
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
      The config, whose `base` is that of the checkpoint (but for `gaussian_rope`, which is the run's own to choose) and
      whose `checkpoint.path` is absolute.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ImportError: the extra that reads it is not installed.
      ValueError: it is no checkpoint of a known model, its weights are not those of `checkpoint.sha256`, or its model
        does not go with the rest of the config.
    """
    if config.checkpoint.path is None:
        return config
    from lensjax.models import checkpoints

    digest = _checked_digest(config)
    path = Path(config.checkpoint.path).absolute()
    base = replace(checkpoints.read_config(path), gaussian_rope=config.base.gaussian_rope)
    return _settings.replace(config, base=base, **{"checkpoint.path": str(path), "checkpoint.sha256": digest})


def load_base(config: Config) -> Params:
    """Parameters of a resolved config's base model.

    Raises:
      FileNotFoundError: the checkpoint is not where the config says.
      ValueError: its weights are not those of the config.
    """
    from lensjax.models import checkpoints

    _checked_digest(config)
    return checkpoints.load_params(str(config.checkpoint.path), config.base, config.checkpoint.dtype)


def _checked_digest(config: Config) -> str:
    from lensjax.models import checkpoints

    path, expected = Path(str(config.checkpoint.path)), config.checkpoint.sha256
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint.path {path} is not there: put the weights back, or name where they are now in checkpoint.path "
            "(for a run, in its config.json)"
        )
    stats = [(file, file.stat()) for file in checkpoints.weight_files(path)]
    found = _digest(path, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))
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

    return checkpoints.sha256(path)
