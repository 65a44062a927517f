"""Preference-based, contrastive policy learning for working contexts, in JAX.

A language model reads a fixed budget of entries, some spans token by token, the rest as gists. LensNet is the policy
which scores what deserves detail; it learns from the differences in next-token loss between random contexts of one
length.

    import lensjax as lx

    run = lx.fit(lx.Config(output_dir="runs/mine"))       # or lx.load("runs/mine")
    session = run.session()
"""

from typing import Any

from lensjax import losses
from lensjax._version import __version__
from lensjax.context import allocator, tree
from lensjax.context.allocator import FocusConfig, FocusState
from lensjax.context.geometry import Geometry
from lensjax.context.refocus import cold_start
from lensjax.context.rollouts import sample_rollouts
from lensjax.context.tree import TreeState
from lensjax.context.working import Entries, WorkingContext, from_cut, materialise, recency, to_cut
from lensjax.evaluation import baselines, statistics
from lensjax.evaluation.held_out import eval_step
from lensjax.models import GistEncoder, LanguageModel, LensPolicy, Models, Params, build_models
from lensjax.models.base_lm import BaseConfig
from lensjax.models.gistnet import GistConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config
from lensjax.runs.export import export
from lensjax.runs.load import Trained, load
from lensjax.runs.sessions import load as load_session
from lensjax.runs.sessions import save as save_session
from lensjax.session import Session, SessionConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.nll import variant_nll
from lensjax.training.objective import lens_objective
from lensjax.training.optim.ladder import CurriculumConfig
from lensjax.training.optim.optimizer import OptimizerConfig, make_optimizer
from lensjax.training.preferences import PreferencePairs, select_pairs, span_targets
from lensjax.training.recipe import Recipe
from lensjax.training.scoring import ContextConfig, ScoredVariants, score_variants
from lensjax.training.steps.preference import train_step
from lensjax.training.steps.train_state import TrainState, init_train_state
from lensjax.training.terms.inputs import ObjectiveConfig

__all__ = [
    "BaseConfig",
    "Config",
    "ContextConfig",
    "CurriculumConfig",
    "Entries",
    "FocusConfig",
    "FocusState",
    "Geometry",
    "GistConfig",
    "GistEncoder",
    "Hyperparameters",
    "LanguageModel",
    "LensConfig",
    "LensPolicy",
    "Models",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Params",
    "PreferencePairs",
    "Recipe",
    "ScoredVariants",
    "Session",
    "SessionConfig",
    "TrainState",
    "Trained",
    "TreeState",
    "WorkingContext",
    "__version__",
    "allocator",
    "baselines",
    "build_models",
    "cold_start",
    "eval_step",
    "export",
    "fit",
    "from_cut",
    "init_train_state",
    "lens_objective",
    "load",
    "load_session",
    "losses",
    "make_optimizer",
    "materialise",
    "recency",
    "sample_rollouts",
    "save_session",
    "score_variants",
    "select_pairs",
    "span_targets",
    "statistics",
    "to_cut",
    "train_step",
    "tree",
    "variant_nll",
]


def fit(config: Config, **options: Any) -> Trained:
    """Trains a run and writes its folder (extras `train` and `plots`); see `lensjax.runs.fit.fit`.

    Args:
      config: the run.
      options: `resume=True` goes on with the run in `config.output_dir`; `console` shows the progress.

    Returns:
      What it has come to: `Trained(config, models, params, summary)`.

    Raises:
      ValueError: the data or the run that it starts from do not fit. Nothing was written then.
      FileExistsError: the folder is not empty, and it is not to be gone on with.
      ImportError: an extra is not installed.

    Example:
      >>> import lensjax as lx
      >>> lx.fit(lx.Config(base_run="runs/nowhere"))
      Traceback (most recent call last):
      FileNotFoundError: base_run: .../runs/nowhere holds no run (config.json is missing): name the folder of a run
    """
    try:
        from lensjax.runs.fit import fit as run
    except ModuleNotFoundError as error:
        raise ImportError(f"lx.fit needs {error.name}: pip install 'lensjax[train,plots]'") from error
    return run(config, **options)
