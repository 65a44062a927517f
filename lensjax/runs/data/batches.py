"""Token windows from text or from a synthetic task, as deterministic grain iterators."""

import hashlib
from dataclasses import dataclass

import grain
import numpy as np

from lensjax.runs.data.corpus import described, text_digest, token_row
from lensjax.runs.data.quotes import Quotes
from lensjax.runs.data.recall import RecallSource
from lensjax.runs.data.splits import Split
from lensjax.runs.data.suite import SuiteSource
from lensjax.runs.data.task import Windows
from lensjax.runs.data.tracking import TrackingSource

Batch = dict[str, np.ndarray]

_VERSIONS = {"text": 1, "stdlib": 1, "recall": 1, "tracking": 1, "suite": 1, "quotes": 1}
"""To be raised where a task's examples change: they are then other data under the same name."""

_WHO_DECIDES = {
    "file": "Whole documents, with all that are like them, go to train, validation and test, 90/5/5 by a hash of names",
    "folder": "The folders train, validation and test say what is in which split",
}
_OR_MORE_FILES = ", or raise data.max_files"


def make_iterator(
    config: Windows,
    split: Split,
    *,
    seed: int,
    batch_size: int,
    pretraining: bool = False,
    share: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Iterates over batches; `get_state` and `set_state` restore the position to the bit.

    Several processes together read the batches that one would read alone, each the rows of its own; a position of one
    of them is that of all, in any number of processes.

    Text: `train` shuffles anew each epoch and never ends; the other splits pass once, in file order, and leave
    out a last partial batch. Windows lie one behind the other, over ends of documents too, which their separator
    shows; those of a tokenizer's text begin, in `train`, each epoch up to T - 1 tokens later. Synthetic tasks never
    end; example i of one is a pure function of (seed, split, i). With `data.quote` windows of text quote themselves
    (see `quotes`), each time that they come in another place.

    Args:
      config: the run; read are `data`, `context` and `base.vocab_size`.
      split: which files, or which stream of examples.
      seed: fixes the order of the text and the content of synthetic examples.
      batch_size: sequences in a batch of all processes [B]; a multiple of their number.
      pretraining: synthetic tasks only: sequences dense in what the task asks for (see `RecallSource`,
        `TrackingSource` and `SuiteSource`).
      share: index of this process, and number of processes.

    Returns:
      Iterator over dicts of `tokens` int32[B / processes, T] and, outside of pretraining, where the tokens are that
      have to be shown: `answers` int32[B / processes, A], first tokens of blocks, for recall of the one that is
      repeated, for tracking of the statements in the order in which they are needed, for the suite of all that the
      answer stands in.

    Raises:
      ValueError: there are too few files or tokens, or the task does not fit the context; see `corpus.token_row`.
    """
    if not config.data.is_text:
        dataset = _examples(config, split, seed=seed, pretraining=pretraining)
    elif split == "train":
        windows = _windows(config, split)
        _require_windows(config, split, found=len(windows), needed=batch_size)
        dataset = _quoting(config, _without_end(config, windows, seed), seed=seed, pretraining=pretraining)
    else:
        dataset = _examples(config, split, seed=seed)
        _require_windows(config, split, found=len(dataset), needed=batch_size)
        dataset = _quoting(config, dataset, seed=seed)
    return iterate(dataset, batch_size=batch_size, share=share)


def digest(config: Windows) -> str:
    """SHA-256 of all that a run's examples are made of, beside its settings.

    Of text these are the names and contents of the files of each split, and the tokenizer; where the corpus lies does
    not matter. Of a synthetic task it is the version of its rule.

    Args:
      config: the run; read is `data`.

    Returns:
      64 hexadecimal digits.

    Raises:
      ValueError: see `corpus.token_row`.

    Example:
      >>> import lensjax as lx
      >>> from lensjax.runs.data import batches
      >>> from lensjax.runs.data.task import DataConfig
      >>> recall, tracking = (lx.Config(data=DataConfig(task=task)) for task in ("recall", "tracking"))
      >>> batches.digest(recall) == batches.digest(tracking)
      False
    """
    data = config.data
    parts = [f"{data.task} {_VERSIONS[data.task]}"]
    parts += [f"quotes {_VERSIONS['quotes']}"] if data.quote else []
    parts += [text_digest(data)] if data.is_text else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def iterate(dataset: grain.MapDataset, *, batch_size: int, share: tuple[int, int] = (0, 1)) -> grain.DatasetIterator:
    """Iterates over the batches of any data set, as `make_iterator` does; arguments are those.

    Args:
      dataset: examples, dicts of arrays that are in memory or quick to compute.
      batch_size: examples in a batch of all processes [B].
      share: index of this process, and number of processes.

    Returns:
      Iterator over dicts of arrays [B / processes, ...].
    """
    batches = _own_rows(dataset, batch_size, share)
    # Everything is in memory or computed in microseconds: threads would only wait for each other.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def fixed_batches(
    config: Windows,
    split: Split,
    *,
    batch_size: int,
    count: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Draws the same `count` batches in every run with the same data, context and seed; no window comes twice.

    Args:
      config: the run; read are `data`, `context` and `base.vocab_size`.
      split: which files, or which stream of examples.
      batch_size: sequences in a batch of all processes [B]; a multiple of their number.
      count: number of batches.
      seed: chooses the windows, or the synthetic examples.
      share: index of this process, and number of processes.

    Returns:
      Batches like those of `make_iterator`.

    Raises:
      ValueError: the split holds fewer than `count * batch_size` windows.
    """
    dataset = _examples(config, split, seed=seed)
    if config.data.is_text:
        _require_windows(config, split, found=len(dataset), needed=count * batch_size)
        dataset = _quoting(config, dataset.shuffle(seed=_mixed(seed)), seed=seed)
    batches = _own_rows(dataset, batch_size, share)
    return [batches[i] for i in range(count)]


def _examples(config: Windows, split: Split, *, seed: int, pretraining: bool = False) -> grain.MapDataset:
    data, context, vocab_size = config.data, config.context, config.base.vocab_size
    if data.task == "recall":
        pool = data.recall_pool if pretraining else None
        return grain.MapDataset.source(RecallSource(context, vocab_size, split, seed, data.query, pool))
    if data.task == "tracking":
        return grain.MapDataset.source(TrackingSource(context, vocab_size, split, seed, data.hops, pretraining))
    if data.task == "suite":
        return grain.MapDataset.source(SuiteSource(context, vocab_size, split, seed, pretraining))
    return grain.MapDataset.source(_windows(config, split)).map(_as_tokens)


def _quoting(config: Windows, dataset: grain.MapDataset, *, seed: int, pretraining: bool = False) -> grain.MapDataset:
    """Windows that quote themselves, where `data.quote` asks for it: new quotes each time that a window comes."""
    if config.data.quote == 0:
        return dataset
    return dataset.random_map(Quotes(config.context, config.data.quote, pretraining), seed=_mixed(seed))


def _own_rows(dataset: grain.MapDataset, batch_size: int, share: tuple[int, int]) -> grain.MapDataset:
    """Whole batches, and of each the rows of one process: process p of n has every n-th run of B / n examples."""
    process, processes = share
    runs = dataset.batch(batch_size // processes, drop_remainder=True)
    return runs[process : len(runs) // processes * processes : processes]


def _as_tokens(window: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": window.astype(np.int32)}


def _without_end(config: Windows, windows: np.ndarray, seed: int) -> grain.MapDataset:
    """Windows of the text to train on, in another order each epoch; of a tokenizer's, at another place too."""
    if config.data.tokenizer is None:
        return grain.MapDataset.source(windows).map(_as_tokens).shuffle(seed=_mixed(seed)).repeat()
    anywhere = _Anywhere(token_row(config, "train"), config.context.window)
    dataset = grain.MapDataset.range(len(windows)).shuffle(seed=_mixed(seed)).repeat()
    return dataset.random_map(anywhere, seed=_mixed(seed, 1))


@dataclass(frozen=True)
class _Anywhere:
    """Maps i to the window that begins at a random place of tokens i T to (i + 1) T."""

    row: np.ndarray
    length: int

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        begin = index * self.length
        begin += int(rng.integers(min(self.length, len(self.row) - self.length - begin + 1)))
        return _as_tokens(self.row[begin : begin + self.length])


def _windows(config: Windows, split: Split) -> np.ndarray:
    """The tokens of a split as [n, T], without a copy; up to T - 1 tokens at the end stay out."""
    row, length = token_row(config, split), config.context.window
    if len(row) < length:
        raise ValueError(
            f"split {split!r} holds {len(row)} tokens in {described(config.data, split)}, and one window "
            f"takes {length}. {_WHO_DECIDES[config.data.split_by]}: add files, cut long ones into several"
            f"{_OR_MORE_FILES if config.data.max_files else ''}, or lower context.window"
        )
    count = len(row) // length
    return row[: count * length].reshape(count, length)


def _require_windows(config: Windows, split: Split, *, found: int, needed: int) -> None:
    if found < needed:
        other = "pretrain.batch_size" if split == "train" else "eval_batches"
        raise ValueError(
            f"split {split!r} holds {found} windows of {config.context.window} tokens, and {needed} are "
            f"needed; lower batch_size, {other} or context.window, or add files"
            f"{_OR_MORE_FILES if config.data.max_files else ''}"
        )


def _mixed(seed: int, *stream: int) -> int:
    # grain shuffles epoch e with seed + e: unmixed, run 1 would repeat run 0 with a delay of one epoch.
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)[0])
