"""The model card of an export: what it is, what was measured and by which command, and where it ends."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lensjax._version import __version__
from lensjax.models import Params
from lensjax.runs.config import STEPS, Config
from lensjax.runs.load import Trained

_NAMES = {
    "lens": "LensNet, the policy",
    "gist": "GistNet, which makes the gists",
    "base": "the base model",
    "hypernet": "what adapts LensNet to a document",
}
_MEASURED = (
    *("nll_full", "nll_policy", "nll_baseline", "nll_rollout_mean", "nll_rollout_best", "nll_oracle"),
    *("hit_rate", "preference_agreement"),
)
_POLICIES = ("policy", "information", "budget", "entries", "NLL [95 %]", "minus recency [95 %]", "hit rate")

_TOP = """---
library_name: lensjax
tags:
- jax
- safetensors
- long-context
- context-compression
- gist-tokens
---

# {name}

LensNet is a policy that decides which spans of a long history a frozen budget of entries shows in full, and which as
gists or not at all. This folder holds LensNet and its models, trained with lensjax {version}.

```python
import lensjax as lx

run = lx.load("{name}")  # this folder
session = run.session()
```

It takes the extra `hf` of lensjax. All files are data: nothing in them is run.

## Models

| file | what it is | parameters |
| --- | --- | --- |
{files}

{base}
"""


def text(run: Trained, config: Config, name: str, parts: Mapping[str, Params]) -> str:
    """The card in Markdown, with the front matter of the Hugging Face hub.

    Args:
      run: what is exported.
      config: as it is exported.
      name: of the export's folder.
      parts: what is in it.
    """
    files = [
        f"| `{part}.safetensors` | {_NAMES.get(part, part)} | {sum(leaf.size for leaf in jax.tree.leaves(params)):,} |"
        for part, params in parts.items()
    ]
    top = _TOP.format(name=name, version=__version__, files="\n".join(files), base=_base(config, parts))
    return "\n".join([top, *_training(run, config), *_evaluation(run), *_limits(config)])


def _base(config: Config, parts: Mapping[str, Params]) -> str:
    if "base" in parts:
        return "The base model is in here."
    checkpoint = config.checkpoint
    return (
        f"The base model is not in here. It was read from `{checkpoint.path}`, and its weights have SHA-256\n"
        f"`{checkpoint.sha256}`. Where they lie elsewhere, name the place in `checkpoint.path` of `config.json`; other "
        "weights are refused."
    )


def _training(run: Trained, config: Config) -> list[str]:
    data, context = config.data, config.context
    steps = {phase: _value(config, field) for phase, field in STEPS.items()}
    steps = {phase: count for phase, count in steps.items() if count and (phase != "pretrain" or config.pretrains)}
    facts = {
        "data": data.task if data.path is None else f"`{data.path}`, split by {data.split_by}",
        "tokens": "bytes" if data.tokenizer is None else f"of `{data.tokenizer}`",
        "window, history": f"{context.window}, {context.history} tokens",
        "block, highest level": f"{context.block_size} tokens, {context.max_lod}",
        "budget": f"{config.budget} entries ({context.history / config.budget:.1f}x)",
        "steps": ", ".join(f"{phase} {count:,}" for phase, count in steps.items()),
        "batch, seed": f"{config.batch_size} windows, {config.seed}",
    }
    rows = [f"| {name} | {fact} |" for name, fact in facts.items()]
    command = _command(_last_start(run.folder))
    return ["## Training", "", "| | |", "| --- | --- |", *rows, *(["", *_code(command)] if command else []), ""]


def _evaluation(run: Trained) -> list[str]:
    measured = {name: run.summary[name] for name in _MEASURED if isinstance(run.summary.get(name), float)}
    lines = ["## Evaluation", ""]
    if measured:
        lines += [
            f"At the end of training, on {run.summary['sequences']} windows of the {run.summary['split']} split, at "
            "the budget above (NLL in nats per token):",
            *("", "| metric | value |", "| --- | --- |"),
            *(f"| {name} | {value:.4f} |" for name, value in measured.items()),
            "",
        ]
    else:
        lines += ["The run was exported before it had measured itself on its test split.", ""]
    reports = _reports(run.folder)
    for report in reports:
        lines += _report(report)
    if not reports:
        lines += ["Other policies were not measured beside it: `python -m experiments.evaluate` does that.", ""]
    return lines


def _report(report: Mapping[str, Any]) -> list[str]:
    """The table of one `experiments.evaluate`."""
    command = _command(report.get("environment"))
    return [
        f"All policies, on {report['sequences']} windows of {report['window']} tokens of the {report['split']} split; "
        "`hindsight` has read what it is measured on and is no result:",
        *("", f"| {' | '.join(_POLICIES)} |", f"|{' --- |' * len(_POLICIES)}"),
        *(_row(row) for row in report["rows"]),
        *(["", *_code(command)] if command else []),
        "",
    ]


def _row(row: Mapping[str, Any]) -> str:
    cells = [row["policy"], row["information"], f"{row['budget_ratio']}x", row["entries"]]
    cells += [_interval([row["nll"], row["nll_ci_low"], row["nll_ci_high"]]), _interval(row.get("minus_recency"))]
    cells += [_number(row.get("hit_rate"))]
    return f"| {' | '.join(map(str, cells))} |"


def _limits(config: Config) -> list[str]:
    horizon = config.context.horizon
    return [
        "## Limits",
        "",
        f"- LensNet and GistNet fit this base model, blocks of {config.context.block_size} tokens and levels up to "
        f"{config.context.max_lod}; for another one they are noise.",
        f"- What is above was measured at the budgets, windows and data that it names, and NLL on the {horizon} tokens "
        "behind a cursor. Elsewhere nothing was measured.",
        f"- One seed ({config.seed}): how far another one lies from it, this card does not say.",
        "- What a budget leaves out is not read: an answer may rest on what was dropped.",
        "",
    ]


def _reports(folder: Path | None) -> list[dict[str, Any]]:
    """Evaluations in a run's folder."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        report = _read(path)
        if isinstance(report, dict) and isinstance(report.get("rows"), list) and "anti_theater" in report:
            found.append(report)
    return found


def _last_start(folder: Path | None) -> Any:
    entries = None if folder is None else _read(folder / "environment.json")
    return entries[-1] if isinstance(entries, list) and entries else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _command(environment: Any) -> str | None:
    """How a program was started; of paths, which are those of one machine, the last names alone."""
    words: Sequence[str] = environment.get("command", ()) if isinstance(environment, dict) else ()
    if not words or not words[0].endswith(".py") or "experiments" not in Path(words[0]).parts:
        return None
    module = ".".join(Path(words[0]).parts[Path(words[0]).parts.index("experiments") :]).removesuffix(".py")
    return f"python -m {module} {shlex.join(Path(w).name if w.startswith('/') else w for w in words[1:])}".rstrip()


def _code(command: str) -> list[str]:
    return ["```console", command, "```"]


def _interval(values: Sequence[float] | None) -> str:
    if values is None or any(value is None for value in values):
        return ""
    mean, low, high = values
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def _value(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value
