"""Sessions on the disk: stopped in the middle of a stream, and gone on with to the bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from lensjax._settings import Count, PositiveInt, require, settings
from lensjax.models import Models, build_models
from lensjax.models.base_lm import BaseConfig, BaseModel
from lensjax.models.gistnet import GistConfig, GistModel
from lensjax.models.lensnet import LensConfig, LensModel
from lensjax.session import Policy, Session, SessionConfig, SessionState
from lensjax.session import history as histories
from lensjax.session.history import History, Rows


@settings("session")
class Saved:
    """What a session's folder says of it, besides its arrays."""

    base: BaseConfig
    gist: GistConfig
    lens: LensConfig
    dtype: Literal["float32", "bfloat16"]
    max_lod: Count
    """Of the models, which may be more than the session's."""
    session: SessionConfig
    has_policy: bool
    """Whether somebody else scored the entries in LensNet's place."""
    read: Count
    """Tokens since the start of the stream."""
    forgotten: Count
    """Tokens before the oldest one held."""
    streams: PositiveInt | None = None
    """Streams side by side; None for one without an axis."""

    @property
    def models(self) -> Models:
        """The models, built anew."""
        size = self.session.geometry.block_size
        return build_models(self.base, self.gist, self.lens, block_size=size, max_lod=self.max_lod, dtype=self.dtype)


def save(session: Session, state: SessionState, folder: str | Path) -> Path:
    """Saves a session in the middle of a stream: models, parameters, shapes, and all that it remembers (extra `train`).

    Args:
      session: of models of this library.
      state: the session so far, which can be gone on with here as well.
      folder: a new one, or an empty one. It is there whole or not at all.

    Returns:
      The folder, absolute.

    Raises:
      FileExistsError: there is something in the folder.
      ValueError: the models are not those of `build_models`.
      OSError: it could not be written, such as on a full disk.
      ImportError: the extra is not installed.

    Example:
      >>> import tempfile, jax, lensjax as lx
      >>> config = lx.Config()
      >>> models = config.build_models()
      >>> params = {name: getattr(models, name).init(jax.random.key(0)) for name in ("base", "gist", "lens")}
      >>> session = lx.Session(models, params, config.session)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     place = lx.save_session(session, session.init(), f"{folder}/mine")
      ...     session, state = lx.load_session(place)
      >>> state.read
      0
    """
    try:
        from lensjax.runs.store import checkpoint, config_file, paths
    except ModuleNotFoundError as error:
        raise ImportError(f"lx.save_session needs {error.name}: pip install 'lensjax[train]'") from error
    folder = paths.absolute(folder, name="folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} is not empty: choose another one for the session, or delete it")
    history = state.history
    gists = {str(lod): _held(rows) for lod, rows in enumerate(history.gists, start=1)}
    tree = {"params": session.params, "view": state.view, "tokens": _held(history.tokens), "gists": gists}
    identity = json.loads(config_file.to_json(_described(session, history)))
    checkpoint.save(folder, history.read, tree, identity=identity)
    return folder


def load(folder: str | Path, *, policy: Policy | None = None) -> tuple[Session, SessionState]:
    """Loads a session, which goes on as if it had not been stopped, to the bit on a machine of the same kind.

    Args:
      folder: of `save`.
      policy: who scored the entries in LensNet's place, if somebody did; code is not saved.

    Returns:
      The session, and what it remembers.

    Raises:
      FileNotFoundError: there is no session in the folder.
      ValueError: a file of it is damaged, or the policy does not fit.
      ImportError: the extra is not installed.

    Example:
      >>> import lensjax as lx
      >>> lx.load_session("runs/nowhere")
      Traceback (most recent call last):
      FileNotFoundError: ...runs/nowhere holds no session: name the folder of lx.save_session
    """
    try:
        from lensjax.runs.store import checkpoint, config_file, paths
    except ModuleNotFoundError as error:
        raise ImportError(f"lx.load_session needs {error.name}: pip install 'lensjax[train]'") from error
    folder = paths.absolute(folder, name="folder")
    step = checkpoint.latest_step(folder)
    if step is None:
        raise FileNotFoundError(f"{folder} holds no session: name the folder of lx.save_session")
    try:
        identity = checkpoint.identity(folder, step)
        saved = config_file.from_json(json.dumps(identity), Saved, source=f"session {folder}")
        require(
            saved.has_policy == (policy is not None),
            f"session {folder} was read {'with' if saved.has_policy else 'without'} a policy in LensNet's place: "
            f"{'pass it as' if saved.has_policy else 'leave out'} policy",
        )
        like = checkpoint.like(folder, step, path=("params",))
        session = Session(saved.models, {}, saved.session, policy=policy, streams=saved.streams)
        empty, count = jax.eval_shape(session.first_view, 0), saved.streams or 1
        tokens, *gists = _empty_rows(session, saved)
        size, levels = saved.session.geometry.block_size, enumerate(gists, start=1)
        nodes = {str(lod): _like(level, saved.read // size**lod * count) for lod, level in levels}
        whole = {"params": like, "view": empty, "tokens": _like(tokens, saved.read * count), "gists": nodes}
        tree, _ = checkpoint.restore(folder, step, whole)
    except checkpoint.DamagedError as error:
        raise ValueError(f"session {folder} is damaged: {error.what}; save it anew") from error
    session = Session(saved.models, tree["params"], saved.session, policy=policy, streams=saved.streams)
    history = History(
        tokens.append(tree["tokens"]),
        tuple(level.append(tree["gists"][str(lod)]) for lod, level in enumerate(gists, start=1)),
        size,
        saved.forgotten,
        count,
    )
    return session, SessionState(tree["view"], history)


def _described(session: Session, history: History) -> Saved:
    models = session.models
    base, gist, lens = models.base, models.gist, models.lens
    if isinstance(base, BaseModel) and isinstance(gist, GistModel) and isinstance(lens, LensModel):
        saved = Saved(
            base=base.config,
            gist=gist.config,
            lens=lens.config,
            dtype=base.dtype,  # type: ignore[arg-type]
            max_lod=lens.max_lod,
            session=session.config,
            has_policy=session.steps.policy is not None,
            read=history.read,
            forgotten=history.forgotten,
            streams=session.streams,
        )
        if saved.models == models:
            return saved
    raise ValueError(f"session.models must be those of build_models to be saved with a session, got {models}")


def _held(rows: Rows) -> np.ndarray:
    """The rows that are there."""
    return rows.between(rows.first, rows.length)


def _empty_rows(session: Session, saved: Saved) -> list[Rows]:
    """Tokens and gists of a history, up to the first of the rows that are there."""
    size, found = saved.session.geometry.block_size, session.init().history
    levels = enumerate((found.tokens, *found.gists))
    gone = [(rows, saved.forgotten // size**lod * (saved.streams or 1)) for lod, rows in levels]
    firsts = [(rows, count // histories.BLOCK * histories.BLOCK) for rows, count in gone]
    return [replace(rows, first=first, length=first) for rows, first in firsts]


def _like(rows: Rows, length: int) -> np.ndarray:
    """The shape of what comes behind them."""
    return np.empty((length - rows.first, *rows.shape), rows.dtype)
