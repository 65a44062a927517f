"""What the settings of a sweep change: differences to the default with intervals, corrected p-values, and a report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lensjax.evaluation.statistics import LEVEL, estimate

DEFAULT = "default"
"""What `Effect.knob` says of the setting that changes nothing."""
JOINT = " + "
"""Between the fields of a setting that changes several."""


@dataclass(frozen=True)
class Measured:
    """One setting of a sweep, measured on Q held-out batches after training with each of S seeds."""

    setting: dict[str, Any]
    """New values by dotted field name; empty for the default."""
    nll: np.ndarray
    """float[S, Q]: nats per token; seeds and batches stand in the same order in all settings."""
    others: dict[str, np.ndarray]
    """float[S] by name: further metrics, NaN where they are not defined."""
    diverged: np.ndarray
    """bool[S]: arms that diverged; nothing of theirs is read."""

    def __post_init__(self) -> None:
        seeds = self.nll.shape[:1]
        if self.nll.ndim != 2 or not seeds[0] or self.nll.shape[1] < 2 or self.diverged.shape != seeds:
            raise ValueError(
                f"expected nll [S, Q], two or more batches Q, and diverged [S], got {self.nll.shape} and "
                f"{self.diverged.shape}"
            )
        if wrong := {name: values.shape for name, values in self.others.items() if values.shape != seeds}:
            raise ValueError(f"expected other metrics of shape {seeds}, one value a seed, got {wrong}")
        if not np.isfinite(self.nll[~self.diverged]).all():
            raise ValueError(f"a loss of {self.setting} is not finite in an arm that is not marked as diverged")


@dataclass(frozen=True)
class Effect:
    """What one setting of a sweep does; everything but `diverged` is of the seeds that count."""

    knob: str
    """The fields that it changes, joined by `JOINT`."""
    value: str
    """Their values, joined by ", "."""
    seeds: int
    """Seeds that diverged neither here nor in the default."""
    mean: float
    """Loss, nats per token; as all means, NaN without a seed."""
    low: float | None
    """95 % interval of the mean over seeds and batches (see `statistics`); as all intervals, None with fewer than two
    seeds."""
    high: float | None
    difference: float
    """Loss minus that of the default with the same seeds on the same batches: below 0 is better."""
    difference_low: float | None
    """95 % interval of the difference; None for the default."""
    difference_high: float | None
    p: float | None
    """Two-sided, of the difference being 0; None where there is no interval of it."""
    p_holm: float | None
    """Corrected over all settings of the sweep."""
    diverged: int
    """Arms of this setting that diverged."""
    others: dict[str, float]
    """Means of the further metrics, where they are defined."""

    @property
    def is_distinguishable(self) -> bool:
        """Whether the difference is told from 0 after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL

    @property
    def name(self) -> str:
        """The setting in one line."""
        return f"{self.knob} = {self.value}" if self.value else self.knob


def effects(measured: Sequence[Measured]) -> list[Effect]:
    """What each setting of a sweep does to the held-out loss, paired to the default.

    Args:
      measured: the settings of one sweep, the default first.

    Returns:
      The default, then the others by falling size of the difference; those without a seed to compare come last.

    Raises:
      ValueError: the default is not first, or settings repeat or differ in shape.
    """
    _check(measured)
    default, *others = measured
    effects = [_effect(one, default) for one in others]
    corrected = iter(holm([one.p for one in effects if one.p is not None]))
    effects = [replace(one, p_holm=None if one.p is None else next(corrected)) for one in effects]
    effects.sort(key=lambda one: -abs(one.difference) if one.seeds else math.inf)
    first = _effect(default, default)
    return [replace(first, difference_low=None, difference_high=None, p=None), *effects]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)).

    Args:
      p: m p-values.

    Returns:
      The adjusted ones, in the order given. Where every zero below a level is called a difference, the chance of one
      or more false calls is at most that level.

    References:
      Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.arange(len(p), 0, -1) * np.asarray(p, np.float64)[order]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def _check(measured: Sequence[Measured]) -> None:
    settings = [one.setting for one in measured]
    if not settings or settings[0]:
        raise ValueError(f"expected the default, which changes nothing, as the first setting, got {settings[:1]}")
    if repeated := [one for place, one in enumerate(settings) if one in settings[:place]]:
        raise ValueError(f"expected every setting once, got {repeated} again")
    if len(shapes := {one.nll.shape for one in measured}) > 1:
        raise ValueError(f"expected the same seeds and batches for all settings, got losses of shapes {sorted(shapes)}")


def _effect(one: Measured, default: Measured) -> Effect:
    counts = ~(one.diverged | default.diverged)
    losses = one.nll[counts].astype(np.float64)
    differences = losses - default.nll[counts]
    low = high = difference_low = difference_high = p = None
    if len(losses) > 1:
        low, high = estimate(losses).interval
        paired = estimate(differences)
        (difference_low, difference_high), p = paired.interval, paired.p
    return Effect(
        knob=JOINT.join(one.setting) or DEFAULT,
        value=", ".join(map(str, one.setting.values())),
        seeds=len(losses),
        mean=_mean(losses),
        low=low,
        high=high,
        difference=_mean(differences),
        difference_low=difference_low,
        difference_high=difference_high,
        p=p,
        p_holm=None,
        diverged=int(one.diverged.sum()),
        others={name: _mean(values[counts]) for name, values in one.others.items()},
    )


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean(dtype=np.float64)) if defined.size else math.nan


_METHOD = (
    "Brackets are 95 % intervals over seeds and held-out batches (Student's t for each); differences are paired to "
    "the default's run of the same seed on the same batches, and p is two-sided and corrected by Holm's method for the "
    "number of settings."
)
_UNDEFINED = "n/a"


def markdown(
    effects: Sequence[Effect], *, default: Mapping[str, Any], title: str, columns: Sequence[str], command: str
) -> str:
    """The report of a sweep: a table, and what it says of each setting.

    Args:
      effects: the rows, in this order; as returned by `effects`.
      default: values that the default has in the fields that settings change.
      title: heading.
      columns: names of the further metrics to show.
      command: what makes the same report again.

    Returns:
      Markdown, ending in a newline; the same bytes for the same effects.

    Raises:
      ValueError: an effect lacks a metric to show.
    """
    for one in effects:
        if missing := [name for name in columns if name not in one.others]:
            raise ValueError(f"{one.name} has no metric {', '.join(missing)}: choose from {', '.join(one.others)}")
    header = ["setting", "seeds", "NLL, nats per token", "difference", "p (Holm)", *columns]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *(_cells(one, columns) for one in effects)]
    table = [f"| {' | '.join(row)} |" for row in rows]
    settings = [one for one in effects if one.knob != DEFAULT]
    lists = [
        *_listed(
            f"Distinguishable from the default (p_holm < {LEVEL})",
            [f"{_code(one.name)}: {_verdict(one)}" for one in settings if one.is_distinguishable],
        ),
        *_listed(
            "Not distinguishable from zero",
            [_code(one.name) for one in settings if one.p is not None and not one.is_distinguishable],
        ),
    ]
    if untested := [f"{_code(one.name)}: {one.diverged} diverged" for one in settings if one.p is None]:
        lists += _listed("Not tested: fewer than two seeds left to compare", untested)
    around = ", ".join(_code(f"{name} = {value}") for name, value in default.items())
    head = [f"# {title}", "", "```console", command, "```", "", _METHOD, "", f"The default has {around}.", ""]
    return "\n".join([*head, *table, "", *lists])


def _listed(heading: str, items: Sequence[str]) -> list[str]:
    return [f"## {heading}", "", *(f"- {item}" for item in items or ["none"]), ""]


def _cells(one: Effect, columns: Sequence[str]) -> list[str]:
    is_default = one.knob == DEFAULT
    return [
        # Within a table even code needs it.
        _code(one.name).replace("|", "\\|"),
        _seeds(one),
        _with_interval(one.mean, one.low, one.high, "z.4f"),
        "" if is_default else _with_interval(one.difference, one.difference_low, one.difference_high, "+z.4f"),
        "" if is_default else _p_value(one.p_holm),
        *(_number(one.others[name], "z.3f") for name in columns),
    ]


def _verdict(one: Effect) -> str:
    difference = _with_interval(one.difference, one.difference_low, one.difference_high, "+z.4f")
    return f"{'lower' if one.difference < 0 else 'higher'} NLL, {difference}"


def _seeds(one: Effect) -> str:
    return f"{one.seeds} ({one.diverged} diverged)" if one.diverged else f"{one.seeds}"


def _with_interval(value: float, low: float | None, high: float | None, form: str) -> str:
    interval = "no interval" if low is None else f"{_number(low, form)}, {_number(high, form)}"
    return f"{_number(value, form)} [{interval}]"


def _number(value: float | None, form: str) -> str:
    return _UNDEFINED if value is None or math.isnan(value) else format(value, form)


def _p_value(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 1e-4 else _number(value, ".4f")


def _code(text: str) -> str:
    return f"`{text}`"
