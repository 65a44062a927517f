"""The table of `experiments.studies.gists`: who is compared, with whom, and how it is printed."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console

from lensjax.context.geometry import Geometry
from lensjax.evaluation import rivals
from lensjax.evaluation.statistics import estimate

UNTRAINED = ("recency", "recency_short", "gists_mean", "gists_scaled", "gists_scaled_vocabulary", "gists_middle")
TRAINED = ("gistnet", "gistnet_foreign")
AGAINST = ("recency", "recency_short", "gists_scaled", "gistnet_foreign")
"""Whom every policy is compared with, window by window."""
Row = dict[str, Any]
Losses = dict[str, np.ndarray]
"""By policy, [windows], of a trained GistNet [seeds, windows]."""


def shorter(length: int, geometry: Geometry) -> int:
    """Last tokens in full that leave room for a gist of every block before them, of `length` entries."""
    return geometry.history - (geometry.history - length) // geometry.saving * geometry.block_size


def table(found: Losses, geometry: Geometry, lengths: Mapping[int, int]) -> list[Row]:
    """A row a policy and ratio, with paired differences; what is not compared is empty."""
    rows = []
    places = itertools.product(lengths, (*UNTRAINED, *TRAINED))
    for ratio, policy in ((1, "full"), *places):
        values, length = found[f"{policy}/{ratio}"], lengths.get(ratio, geometry.history)
        is_short, has_gists = policy == "recency_short", "gist" in policy
        tokens = shorter(length, geometry) if is_short or has_gists else length
        row: Row = {
            "policy": policy,
            "information": rivals.information(policy),
            "ratio": ratio,
            "entries": tokens if is_short else length,
        }
        row |= {"tokens": tokens, "gists": length - tokens if has_gists else 0}
        row |= {"seeds": len(values) if values.ndim == 2 else "", "windows": values.shape[-1]}
        row |= _with_interval("nll", values)
        for other in AGAINST:
            there = found.get(f"{other}/{ratio}") if other != policy else None
            row |= _with_interval(f"minus_{other}", None if there is None else values - there)
        rows.append(row)
    return rows


def print_table(console: Console, rows: list[Row]) -> None:
    """The losses, and what they are above recency, the same context without its gists, and foreign gists."""
    others = {"recency": "minus recency", "recency_short": "minus without gists", "gistnet_foreign": "minus foreign"}
    console.out("nats per token of the horizon, mean [95 % interval]", highlight=False)
    for row in rows:
        parts = [f"{row['policy']:<23} {row['tokens']:>4} + {row['gists']:<3} {row['nll']:.3f}"]
        for other, title in others.items():
            mean, low, high = (row[f"minus_{other}{end}"] for end in ("", "_low", "_high"))
            parts += [] if mean == "" else [f"{title} {mean:+.3f} [{low:+.3f}, {high:+.3f}]"]
        console.out("  ".join(parts), highlight=False)


def _with_interval(name: str, values: np.ndarray | None) -> Row:
    """Mean and interval of [windows], or [seeds, windows], of which a single seed has no interval of its own."""
    if values is None:
        return {name: "", f"{name}_low": "", f"{name}_high": ""}
    one = estimate(values[0] if values.ndim == 2 and len(values) == 1 else values)
    return {name: one.mean, f"{name}_low": one.low, f"{name}_high": one.high}
