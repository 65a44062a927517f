"""Token windows from text files or from a synthetic task, as deterministic grain iterators.

Text is read as bytes. Each FAMILY of files with text in common (see `families`) belongs to one split: a hash of the
name of its first file decides, and so for most files, which share little with any other, a hash of their own name.
The split depends neither on the machine nor on the order of the files, and no window of a held-out file, or of a
near-duplicate of it, is ever trained on. Adding a file changes the split of others where it joins two families, or
comes first in one.
"""

import functools
import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from lensjax.runs.data.families import families
from lensjax.runs.data.quotes import Quotes
from lensjax.runs.data.recall import RecallSource
from lensjax.runs.data.splits import SPLITS, Split, digest, split_of
from lensjax.runs.data.task import DataConfig, Windows
from lensjax.runs.data.tracking import TrackingSource

Batch = dict[str, np.ndarray]

SEPARATOR = b"\0"
"""Stands between two files of a split."""

_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")


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
    out a last partial batch. Synthetic tasks never end; example i of one is a pure function of (seed, split, i).
    With `data.quote` windows of text quote themselves (see `quotes`), each time that they come in another place.

    Args:
      config: the run; read are `data`, `context` and `base.vocab_size`.
      split: which files, or which stream of examples.
      seed: fixes the order of the text and the content of synthetic examples.
      batch_size: sequences in a batch of all processes [B]; a multiple of their number.
      pretraining: synthetic tasks only: sequences dense in what the task asks for (see `RecallSource` and
        `TrackingSource`).
      share: index of this process, and number of processes.

    Returns:
      Iterator over dicts of `tokens` int32[B / processes, T] and, outside of pretraining, where the tokens are that
      have to be shown: `answers` int32[B / processes, A], first tokens of blocks, for recall of the one that is
      repeated, for tracking of the statements in the order in which they are needed.

    Raises:
      ValueError: there are too few files or bytes, or the task does not fit the context.
    """
    dataset = _examples(config, split, seed=seed, pretraining=pretraining)
    if config.data.is_text:
        if split == "train":
            dataset = dataset.shuffle(seed=_mixed(seed)).repeat()
            dataset = _quoting(config, dataset, seed=seed, pretraining=pretraining)
        else:
            _require_windows(config, split, found=len(dataset), needed=batch_size)
            dataset = _quoting(config, dataset, seed=seed)
    return iterate(dataset, batch_size=batch_size, share=share)


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


def corpus_files(data: DataConfig, split: Split) -> list[Path]:
    """Lists the files of one split, in the order of their names' hashes; empty and hidden files are left out.

    Files of all splits are read, to know which are alike.

    Raises:
      ValueError: `split` is unknown, the path does not exist, or there is no file at all.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    root, paths = _stdlib_files() if data.task == "stdlib" else _text_files(str(data.path))
    names = {path.relative_to(root).as_posix(): path for path in paths if path.is_file() and path.stat().st_size}
    if not names:
        raise ValueError(f"no file with text in it under {root} (data.path {data.path!r}); expected at least one")
    family = _families(tuple((name, path, _stamp(path)) for name, path in names.items()))
    members = sorted((name for name in names if split_of(family[name]) == split), key=digest)
    return [names[name] for name in members[: data.max_files]]


@functools.lru_cache(maxsize=1)
def _families(files: tuple[tuple[str, Path, tuple[int, int]], ...]) -> dict[str, str]:
    """Families of files by name. A run asks for each split in turn: the answer is kept while no file changes."""
    return families({name: path.read_bytes() for name, path, _ in files})


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _examples(config: Windows, split: Split, *, seed: int, pretraining: bool = False) -> grain.MapDataset:
    data, context, vocab_size = config.data, config.context, config.base.vocab_size
    if data.task == "recall":
        pool = data.recall_pool if pretraining else None
        return grain.MapDataset.source(RecallSource(context, vocab_size, split, seed, data.query, pool))
    if data.task == "tracking":
        return grain.MapDataset.source(TrackingSource(context, vocab_size, split, seed, data.hops, pretraining))
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


def _windows(config: Windows, split: Split) -> np.ndarray:
    """Packs the files of a split into uint8[n, T]; up to T - 1 bytes at the end stay out."""
    paths = corpus_files(config.data, split)
    packed = SEPARATOR.join(path.read_bytes() for path in paths)
    length = config.context.window
    if len(packed) < length:
        raise ValueError(
            f"split {split!r} holds {len(packed)} bytes in {len(paths)} files, and one window takes {length}. "
            "Whole files, with all that are like them, go to train, validation and test, 90/5/5 by a hash of their "
            "names: add files, cut long ones into several, raise data.max_files, or lower context.window"
        )
    count = len(packed) // length
    return np.frombuffer(packed, np.uint8, count * length).reshape(count, length)


def _require_windows(config: Windows, split: Split, *, found: int, needed: int) -> None:
    if found < needed:
        raise ValueError(
            f"split {split!r} holds {found} windows of {config.context.window} tokens, and {needed} are "
            "needed; lower batch_size, eval_batches or context.window, add files, or raise data.max_files"
        )


def _mixed(seed: int) -> int:
    # grain shuffles epoch e with seed + e: unmixed, run 1 would repeat run 0 with a delay of one epoch.
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _stdlib_files() -> tuple[Path, Iterator[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata* is written when an interpreter is built and differs from machine to machine.
    return root, (
        path
        for path in _walk(root, skip=_NOT_STDLIB)
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata") and os.access(path, os.R_OK)
    )


def _text_files(pattern: str) -> tuple[Path, Iterator[Path]]:
    """Resolves a folder, a file or a glob to the corpus root and its files."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return path, _walk(path)
    if path.is_file():
        return path.parent, iter([path])
    wild = [i for i, part in enumerate(path.parts) if any(char in part for char in "*?[")]
    if not wild:
        raise ValueError(f"data.path {pattern!r} does not exist; expected a folder, a file or a glob")
    return Path(*path.parts[: wild[0]]), map(Path, glob.iglob(str(path), recursive=True))


def _walk(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
