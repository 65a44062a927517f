"""What a finished run leaves beside its checkpoints: a summary, curves, and maps of what LensNet picks."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from rich.console import Console

from lensjax._numerics import may_be_nan
from lensjax.evaluation import held_out
from lensjax.models import Models, Params
from lensjax.plots import curves, style
from lensjax.plots.maps import VariantMap, lod_maps
from lensjax.runs.config import PHASES, Config
from lensjax.runs.data.tokenizers import read_tokenizer
from lensjax.runs.engine import devices, loop
from lensjax.runs.store import checkpoint, run_folder
from lensjax.runs.store.log import RunLogger, read_rows, with_undefined
from lensjax.training.steps.train_state import TrainState

MAPPED_SEQUENCES = 4
SHOWN_TEXT = 48
"""Characters on either side of a cursor."""
SHOWN = (
    *("nll_full_tail", "nll_policy", "nll_baseline", "nll_rollout_mean", "nll_rollout_best", "nll_oracle", "hit_rate"),
    *("preference_agreement", "preference_agreement_lod_only", "preference_corr_mean", "seconds"),
)
"""Lines of a summary that the terminal shows."""


def variant_maps(
    state: TrainState,
    batch: Mapping[str, Array],
    key: Array,
    frozen: dict[str, Params],
    *,
    config: Config,
    models: Models,
) -> list[VariantMap]:
    """What recency, the rollouts and the policy show of the first sequences of a held-out batch; `key` is consumed."""
    context = config.context
    compute = may_be_nan(jax.jit(functools.partial(held_out.variant_maps, recipe=config.recipe, models=models)))
    first = {name: value[:MAPPED_SEQUENCES] for name, value in devices.to_host(batch).items()}
    arrays = devices.to_host(compute(state, first["tokens"], key, frozen))
    labels = ["recency", *(f"rollout {i + 1}" for i in range(context.rollouts)), "LensNet's pick"]
    answers = first["answers"].tolist() if "answers" in first else []
    return [
        VariantMap(
            title=f"held-out sequence {i + 1}",
            cuts=arrays["cuts"][i],
            scores=arrays["scores"][i],
            nll=arrays["nll"][i],
            labels=labels,
            recent_tokens=context.recent_tokens,
            block_size=context.block_size,
            answer=_spans(answers[i], context.block_size) if answers else (),
            omit=context.omit,
            text=_at_cursor(config, np.asarray(first["tokens"][i])) if config.data.is_text else ("", ""),
        )
        for i in range(len(first["tokens"]))
    ]


def _at_cursor(config: Config, tokens: np.ndarray) -> tuple[str, str]:
    """The text before and behind the cursor of a window [T]."""
    decode, cursor = read_tokenizer(config.data.tokenizer).decode, config.context.history
    return decode(tokens[:cursor][-SHOWN_TEXT:])[-SHOWN_TEXT:], decode(tokens[cursor:][:SHOWN_TEXT])[:SHOWN_TEXT]


def _spans(blocks: Sequence[int], size: int) -> tuple[tuple[int, int], ...]:
    """First token, and the one after the last, of each run of neighbouring blocks."""
    spans: list[tuple[int, int]] = []
    for begin in sorted(set(blocks)):
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], begin + size)
        else:
            spans.append((begin, begin + size))
    return tuple(spans)


def stops(folder: Path) -> dict[str, int]:
    """Where the phases of a run stopped, and the steps whose parameters they kept."""
    steps: dict[str, int] = {}
    for phase in PHASES:
        directory = run_folder.checkpoint_dir(folder, phase)
        last, kept = checkpoint.latest_step(directory), loop.kept_step(directory)
        if last is not None and kept is not None:
            steps |= {f"{phase}_stopped_at": last, f"{phase}_kept_step": kept}
    return steps


def summary(config: Config, report: Mapping[str, float], *, training_seconds: float, seconds: float) -> dict[str, Any]:
    """Held-out test metrics under short names, and what they came from."""
    return {
        "task": config.data.task,
        "split": "test",
        "sequences": config.batch_size * config.eval_batches,
        "steps": config.steps,
        "seed": config.seed,
        "context_length": config.budget,
        "compression": config.context.history / config.budget,
        "seconds": round(seconds, 1),
        "training_seconds": round(training_seconds, 1),
        **{name.removeprefix("mc/"): value for name, value in with_undefined(report).items()},
    }


def draw(folder: Path, maps: Sequence[VariantMap], logger: RunLogger) -> None:
    """The pictures of a finished run, in its folder and on its boards."""
    if maps:
        with style.attempt(folder / "maps.png") as path:
            lod_maps(maps, path)
            logger.show(path)
    with style.attempt(folder / "training.png") as path:
        curves.training_curves(read_rows(folder), path)
        logger.show(path)


def print_summary(console: Console, folder: Path, report: Mapping[str, Any]) -> None:
    """The numbers of `SHOWN` that are defined, and where the rest is."""
    for name in SHOWN:
        if isinstance(report.get(name), float):
            console.out(f"  {name:<32}{report[name]:>9.3f}", highlight=False)
    console.out(f"pictures, metrics and checkpoints are in {folder}", highlight=False)
