"""The table of `experiments.evaluate`: a row a policy and budget, faithfulness of LensNet's, lines and a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lensjax._numerics import may_be_nan
from lensjax.evaluation import compare, faithfulness, rivals
from lensjax.evaluation.compare import FOREIGN, FULL, FocusEvidence, Measured
from lensjax.evaluation.faithfulness import Evidence, FaithfulnessConfig
from lensjax.evaluation.statistics import by_weight, estimate
from lensjax.plots import budget
from lensjax.runs.config import Config

CHECK_COLUMNS = (
    *(f"anti_theater_{one.name}" for one in fields(Evidence)),
    *("anti_theater_all_passed", "changed_edits"),
)
"""Empty in all rows but that of LensNet's last step."""
COLUMNS = (
    *("task", "policy", "information", "reads", "budget_ratio", "entries", "seed"),
    *("nll", "nll_ci_low", "nll_ci_high", "key_nll", "key_nll_ci_low", "key_nll_ci_high", "key_tokens"),
    *("gap_closed_oracle", "gap_closed_full", "hit_rate", "swap_rate"),
    *CHECK_COLUMNS,
)
Row = dict[str, Any]
PAIRED = (
    *("recency", "random", "recent_random", "snapkv", "snapkv_next", "bm25", "lookup", "lookup_next"),
    *("lensnet_1", "oracle"),
)
"""Whom every policy is compared with, sequence by sequence; LensNet's first look, to tell what the others add."""


def check_focus(
    config: Config,
    thresholds: FaithfulnessConfig,
    measured: Mapping[str, Measured],
    evidence: FocusEvidence,
    *,
    ratio: int,
) -> Row:
    """Faithfulness of LensNet's last step at one budget: four measurements, their intervals, and which of them pass.

    Args:
      config: the run's.
      thresholds: what each measurement must be above.
      measured: every policy by name; arrays [sequences].
      evidence: of the same sequences.
      ratio: history over entries.
    """
    name = f"lensnet_{config.focus.steps}"
    own, recency, foreign = (np.asarray(measured[one].nll) for one in (name, "recency", FOREIGN))
    divergences, correlations = np.asarray(evidence.divergence), np.asarray(evidence.correlation)
    correlations = correlations[~np.isnan(correlations)]
    means = Evidence(
        divergence=jnp.mean(divergences),
        ablation=faithfulness.gain(-own, -recency),
        # Undefined only where no sequence has one.
        correlation=jnp.mean(correlations) if correlations.size else may_be_nan(jnp.full)((), jnp.nan),
        counterfactual=faithfulness.gain(-own, -foreign),
    )
    intervals = {
        "divergence": estimate(divergences).interval,
        "ablation": estimate(recency - own).interval,
        "correlation": estimate(correlations).interval if correlations.size > 1 else None,
        "counterfactual": estimate(foreign - own).interval,
    }
    values = faithfulness.metrics(means, thresholds, prefix="")
    return {
        "policy": name,
        "budget_ratio": ratio,
        **{name: _defined(float(value)) for name, value in values.items()},
        "changed_edits": float(evidence.changed_edits.mean()),
        "correlation_defined_share": correlations.size / own.size,
        "intervals": intervals,
        "thresholds": asdict(thresholds),
        "passed": {name: bool(value) for name, value in faithfulness.passed(means, thresholds).items()},
    }


def details(config: Config, measured: Mapping[str, Measured], check: Row, *, ratio: int, length: int) -> list[Row]:
    """A row a policy at one budget, with paired differences; what is not defined is None.

    Args:
      config: the run's.
      measured: every policy by name; arrays [sequences].
      check: of `check_focus`.
      ratio: history over entries.
      length: entries.
    """
    mean = {name: float(one.nll.mean()) for name, one in measured.items()}
    history, horizon = config.context.history, config.context.horizon
    seen = rivals.lens_rows(config.lens, config.geometry, length)
    counts = np.asarray(measured["recency"].key_tokens)
    rows: list[Row] = []
    for name in sorted(measured, key=rivals.order):
        one, losses = measured[name], np.asarray(measured[name].nll)
        key_losses = np.asarray(one.key_nll)
        low, high = estimate(losses).interval
        key_mean, key_low, key_high = _over_tokens(key_losses, counts)
        row = {
            "task": config.data.task,
            "policy": name,
            "information": rivals.information(name),
            "reads": rivals.reads(name, history=history, horizon=horizon, rows=seen),
            "budget_ratio": 1 if name == FULL else ratio,
            "entries": history if name == FULL else length,
            "seed": config.seed,
            "nll": mean[name],
            "nll_ci_low": low,
            "nll_ci_high": high,
            "key_nll": key_mean,
            "key_nll_ci_low": key_low,
            "key_nll_ci_high": key_high,
            "key_tokens": int(counts.sum()),
            "gap_closed_oracle": compare.gap_closed(mean[name], mean["recency"], mean["oracle"]),
            "gap_closed_full": compare.gap_closed(mean[name], mean["recency"], mean[FULL]),
            "hit_rate": float(one.hit.mean()),
            "swap_rate": float(one.swap_rate.mean()),
        }
        row |= {column: check[column] if name == check["policy"] else None for column in CHECK_COLUMNS}
        row = {column: _defined(value) for column, value in row.items()}
        row |= {"against_budget": ratio, "residency": _defined(float(one.residency.mean()))}
        for other in (name for name in PAIRED if name in measured):
            difference = estimate(losses - np.asarray(measured[other].nll))
            row[f"minus_{other}"] = [difference.mean, *difference.interval]
            row[f"key_minus_{other}"] = _over_tokens(key_losses - np.asarray(measured[other].key_nll), counts)
        rows.append(row)
    return rows


def _over_tokens(values: np.ndarray, counts: np.ndarray) -> list[float | None]:
    """The mean over the key tokens of all sequences, and its interval; None where there are too few.

    Args:
      values: float[n], means over the key tokens of each sequence.
      counts: int[n], how many these are.
    """
    parts = by_weight(values, counts)
    if parts.size < 2:
        return [float(parts[0]) if parts.size else None, None, None]
    found = estimate(parts)
    return [found.mean, *found.interval]


def table(rows: Sequence[Row], *, with_full: bool) -> list[Row]:
    """The columns of the CSV file of `details`; what is not defined is empty.

    The full context is one row of a whole table, however many budgets there are: `with_full` says of which.
    """
    shown = [row for row in rows if with_full or row["policy"] != FULL]
    return [{column: "" if row[column] is None else row[column] for column in COLUMNS} for row in shown]


def draw(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Policies alone: another sequence's focus is a control."""
    budget.quality_at_budget([row for row in rows if row["policy"] != FOREIGN], path, title=title)


def print_table(console: Console, config: Config, rows: Sequence[Row], *, ratio: int, length: int) -> None:
    """Plain lines, so that a log of any width holds them."""
    history, task = config.context.history, config.data.task
    title = f"{task} at {ratio}x, {length} of {history} entries, seed {config.seed}"
    console.out(f"\n{title}; key: {rows[0]['key_tokens']} tokens", highlight=False)
    heads = (
        *("policy", "reads", "nll", "minus recency [95 %]", "minus random [95 %]", "key", "minus recency [95 %]"),
        *("gap", "full", "hit", "swaps", "stay"),
    )
    widths = (16, 7, 7, 26, 26, 7, 26, 7, 7, 7, 7, 7)
    lines = [heads]
    for row in rows:
        names = ("minus_recency", "minus_random", "key_minus_recency")
        differences = [_interval(row[name]) for name in names]
        key = "" if row["key_nll"] is None else f"{row['key_nll']:.3f}"
        shares = ("gap_closed_oracle", "gap_closed_full", "hit_rate", "swap_rate", "residency")
        numbers = ("" if row[name] is None else f"{row[name]:.2f}" for name in shares)
        losses = (f"{row['nll']:.3f}", *differences[:2], key, differences[2])
        lines.append((row["policy"], str(row["reads"]), *losses, *numbers))
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        console.out(line[0].ljust(widths[0]) + "".join(cells), highlight=False)


def print_check(console: Console, check: Row) -> None:
    """Each measurement, what it must be above, and whether it is."""
    console.out(f"\nfaithfulness of {check['policy']}: {_verdict(check['passed']['all_passed'])}", highlight=False)
    for name, threshold in check["thresholds"].items():
        value, interval = check[f"anti_theater_{name}"], check["intervals"][name]
        measured = "n/a" if value is None else f"{value:.3f}"
        if interval is not None:
            measured += " [{:.3f}, {:.3f}]".format(*interval)
        verdict = _verdict(check["passed"][name])
        console.out(f"{name:<16}{measured:>24}   above {threshold:g}: {verdict}", highlight=False)
    changed = f"{check['changed_edits']:.2f} of the edits are changed by the focus on another sequence"
    console.out(changed, highlight=False)


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _interval(difference: Sequence[float | None]) -> str:
    numbers = [number for number in difference if number is not None]
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*numbers) if len(numbers) == 3 else ""


def _verdict(passed: bool) -> str:
    return "passed" if passed else "failed"
