"""A trained run as files to share: safetensors, the configuration as JSON, and a model card.

    config.json             the run's configuration, of its paths the last names alone
    lens.safetensors        LensNet; and so GistNet (`gist`), and what else was trained
    base.safetensors        the base model, where the run has changed it or made it
    summary.json            the held-out test metrics of the run
    README.md               what it is, what was measured and how, and where it ends

A base model of `checkpoint.path` that is as it was is not copied: `config.json` has its path and the SHA-256 of its
weights, and `lx.load` reads it from there.
"""

import json
import shutil
import tempfile
from pathlib import Path

from lensjax import _settings
from lensjax._settings import require
from lensjax.runs.load import PARTS, Trained

_CONFIG, _SUMMARY, _CARD = "config.json", "summary.json", "README.md"


def export(run: Trained, folder: str | Path) -> Path:
    """Writes the models of a run to a folder that `lx.load` reads back (extra `hf`).

    Args:
      run: of `load` or `fit`.
      folder: where to; it is not there, or empty.

    Returns:
      The folder.

    Raises:
      FileExistsError: there is something in the folder.
      ValueError: the run lacks a model.
      ImportError: the extra is not installed.

    Example:
      >>> import lensjax as lx
      >>> config = lx.Config()
      >>> lx.export(lx.Trained(config, config.build_models(), params={}, summary={}), "shared/mine")
      Traceback (most recent call last):
      ValueError: the run has no parameters of base, gist, lens: export one of lx.load or lx.fit
    """
    from lensjax.runs import card
    from lensjax.runs.store import config_file, files, paths, tensors

    folder = paths.absolute(folder, name="folder")
    missing = [name for name in PARTS if name not in run.params]
    require(not missing, f"the run has no parameters of {', '.join(missing)}: export one of lx.load or lx.fit")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: name another folder to export to")
    with_base = not _is_as_it_was(run)
    parts = {name: params for name, params in run.params.items() if name != "base" or with_base}
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder.parent))
    try:
        for name, params in parts.items():
            tensors.write(tensors.file_of(hidden, name), params)
        names = [name for name in paths.NAMES if with_base or name != "checkpoint.path"]
        config = _settings.replace(run.config, **paths.last_names(run.config, names))
        files.write_text(hidden / _CONFIG, config_file.to_json(config))
        files.write_text(hidden / _SUMMARY, json.dumps(run.summary, indent=2, allow_nan=False) + "\n")
        files.write_text(hidden / _CARD, card.text(run, config, folder.name, parts))
        files.sync_tree(hidden)
        hidden.chmod(0o755)
        files.rename(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def _is_as_it_was(run: Trained) -> bool:
    """Whether the base model is that of `checkpoint.path`, to the bit."""
    from lensjax.runs import pretrained
    from lensjax.runs.store import identity

    if run.config.checkpoint.path is None:
        return False
    return identity.digest({"base": run.params["base"]}) == identity.digest({"base": pretrained.load_base(run.config)})
