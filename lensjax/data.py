"""Token windows from text files or from the recall task, as deterministic grain iterators.

Text is read as bytes. Each FILE belongs to one split for good: a hash of its name decides, so the split depends
neither on the machine nor on what other files there are, and no window of a held-out file is ever trained on.
"""

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import grain
import numpy as np

from lensjax.config import Config, ContextConfig, DataConfig

Split = Literal["train", "validation", "test"]
Batch = dict[str, np.ndarray]

SEPARATOR = b"\0"
"""Stands between two files of a split."""

_SPLITS: tuple[Split, ...] = get_args(Split)
_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")


def make_iterator(
    config: Config,
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
    out a last partial batch. Recall never ends; its example i is a pure function of (seed, split, i).

    Args:
      config: the run; read are `data`, `context` and `base.vocab_size`.
      split: which files, or which stream of recall examples.
      seed: fixes the order of the text and the content of the recall examples.
      batch_size: sequences in a batch of all processes [B]; a multiple of their number.
      pretraining: recall only: sequences full of repetitions, without an answer (see `RecallSource`).
      share: index of this process, and number of processes.

    Returns:
      Iterator over dicts of `tokens` int32[B / processes, T] and, for recall outside of pretraining, `answer`
      int32[B / processes], the position of the first token of the block which the tail repeats.

    Raises:
      ValueError: there are too few files or bytes, or the recall task does not fit the context.
    """
    dataset = _examples(config, split, seed=seed, pretraining=pretraining)
    if config.data.task != "recall":
        if split == "train":
            dataset = dataset.shuffle(seed=_mixed(seed)).repeat()
        else:
            _require_windows(config, split, found=len(dataset), needed=batch_size)
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
    config: Config,
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
      split: which files, or which stream of recall examples.
      batch_size: sequences in a batch of all processes [B]; a multiple of their number.
      count: number of batches.
      seed: chooses the windows, or the recall examples.
      share: index of this process, and number of processes.

    Returns:
      Batches as of `make_iterator`.

    Raises:
      ValueError: the split holds fewer than `count * batch_size` windows.
    """
    dataset = _examples(config, split, seed=seed)
    if config.data.task != "recall":
        _require_windows(config, split, found=len(dataset), needed=count * batch_size)
        dataset = dataset.shuffle(seed=_mixed(seed))
    batches = _own_rows(dataset, batch_size, share)
    return [batches[i] for i in range(count)]


def split_of(name: str, *, train: float = 0.9, validation: float = 0.05) -> Split:
    """Returns the split of a file, or of anything else that has a name, by the SHA-256 of that name.

    Args:
      name: of a file, its path from the corpus root, with forward slashes.
      train: share of the names that are trained on.
      validation: share that settings are chosen on; the rest is for tests.
    """
    position = position_of(name)
    return "train" if position < train else "validation" if position < train + validation else "test"


def position_of(name: str) -> float:
    """Where a name stands between 0 and 1, by its SHA-256: below a share for so large a share of all names."""
    return int.from_bytes(_digest(name)[:8], "big") / 2**64


def corpus_files(data: DataConfig, split: Split) -> list[Path]:
    """Lists the files of one split, in the order of their hashes; empty and hidden files are left out.

    Raises:
      ValueError: `split` is unknown, the path does not exist, or there is no file at all.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    root, paths = _stdlib_files() if data.task == "stdlib" else _text_files(str(data.path))
    names = {path.relative_to(root).as_posix(): path for path in paths if path.is_file() and path.stat().st_size}
    if not names:
        raise ValueError(f"no file with text in it under {root} (data.path {data.path!r}); expected at least one")
    members = sorted((name for name in names if split_of(name) == split), key=_digest)
    return [names[name] for name in members[: data.max_files]]


@dataclass(frozen=True)
class RecallSource:
    """Single-span recall: the last K tokens of a sequence repeat one earlier block; which one is known.

    Blocks are all different. Where the vocabulary suffices (at least T - K tokens) no token comes twice before
    the tail, so that the first token of the tail block names its source and the K - 1 tokens after it are
    predictable. The source is uniform over the candidates, the blocks wholly before the recent tokens.

    For pretraining, every block comes from a pool of `pool` different blocks, drawn anew for each sequence:
    most positions repeat something, and there is no single answer.

    Args:
      context: window [T], block size [K], recent tokens and horizon.
      vocab_size: tokens are drawn from 0 to vocab_size - 1.
      split: stream of the examples.
      seed: seed of the examples.
      pool: number of blocks in a pretraining sequence's pool; None for the task itself.

    Raises:
      ValueError: the task does not fit the context.
    """

    context: ContextConfig
    vocab_size: int
    split: Split
    seed: int
    pool: int | None = None

    def __post_init__(self) -> None:
        size, window = self.context.block_size, self.context.window
        if self.split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {self.split!r}")
        if window % size:
            raise ValueError(f"recall needs context.window as a multiple of block_size {size}, got {window}")
        if self.context.recent_tokens < size:
            raise ValueError(
                "recall needs context.recent_tokens of at least block_size (the tail block must stay in full): "
                f"expected {size} or more, got {self.context.recent_tokens}"
            )
        if self.context.horizon > size - 1:
            raise ValueError(
                "recall needs context.horizon of at most block_size - 1 (nothing foretells the first token of "
                f"the tail block): expected {size - 1} or less, got {self.context.horizon}; the preset "
                "`experiments/train.py recall` has sizes that fit"
            )
        if self.vocab_size**size < self._distinct:
            raise ValueError(
                f"recall needs {self._distinct} different blocks of {size} tokens, more than a vocabulary of "
                f"{self.vocab_size} gives; raise base.vocab_size or context.block_size"
            )

    @property
    def _distinct(self) -> int:
        return self.context.window // self.context.block_size - 1 if self.pool is None else self.pool

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `tokens` int32[T] and, for the task itself, `answer` int32."""
        is_pretraining = self.pool is not None
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), int(is_pretraining), index])
        size = self.context.block_size
        blocks = _distinct_blocks(rng, self._distinct, size, self.vocab_size)
        if is_pretraining:
            return {"tokens": blocks[rng.integers(len(blocks), size=self.context.window // size)].reshape(-1)}
        source = rng.integers(self.context.geometry.blocks(1))
        tokens = np.concatenate([blocks, blocks[source : source + 1]]).reshape(-1)
        return {"tokens": tokens, "answer": np.asarray(source * size, np.int32)}


def _distinct_blocks(rng: np.random.Generator, count: int, size: int, vocab_size: int) -> np.ndarray:
    """Draws int32[count, size] with no row twice, and no token twice where the vocabulary allows."""
    if vocab_size >= count * size:
        return rng.permutation(vocab_size)[: count * size].reshape(count, size).astype(np.int32)
    blocks = rng.integers(vocab_size, size=(count, size), dtype=np.int32)
    while True:
        _, first = np.unique(blocks, axis=0, return_index=True)
        repeats = np.setdiff1d(np.arange(count), first)
        if not len(repeats):
            return blocks
        blocks[repeats] = rng.integers(vocab_size, size=(len(repeats), size), dtype=np.int32)


def _examples(config: Config, split: Split, *, seed: int, pretraining: bool = False) -> grain.MapDataset:
    if config.data.task == "recall":
        pool = config.data.recall_pool if pretraining else None
        return grain.MapDataset.source(RecallSource(config.context, config.base.vocab_size, split, seed, pool))
    return grain.MapDataset.source(_windows(config, split)).map(_as_tokens)


def _own_rows(dataset: grain.MapDataset, batch_size: int, share: tuple[int, int]) -> grain.MapDataset:
    """Whole batches, and of each the rows of one process: process p of n has every n-th run of B / n examples."""
    process, processes = share
    runs = dataset.batch(batch_size // processes, drop_remainder=True)
    return runs[process : len(runs) // processes * processes : processes]


def _as_tokens(window: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": window.astype(np.int32)}


def _windows(config: Config, split: Split) -> np.ndarray:
    """Packs the files of a split into uint8[n, T]; up to T - 1 bytes at the end stay out."""
    paths = corpus_files(config.data, split)
    packed = SEPARATOR.join(path.read_bytes() for path in paths)
    length = config.context.window
    if len(packed) < length:
        raise ValueError(
            f"split {split!r} holds {len(packed)} bytes in {len(paths)} files, and one window takes {length}. "
            "Whole files go to train, validation and test, 90/5/5 by a hash of their names: add files, cut "
            "long ones into several, raise data.max_files, or lower context.window"
        )
    count = len(packed) // length
    return np.frombuffer(packed, np.uint8, count * length).reshape(count, length)


def _require_windows(config: Config, split: Split, *, found: int, needed: int) -> None:
    if found < needed:
        raise ValueError(
            f"split {split!r} holds {found} windows of {config.context.window} tokens, and {needed} are "
            "needed; lower batch_size, eval_batches or context.window, add files, or raise data.max_files"
        )


def _mixed(seed: int) -> int:
    # grain shuffles epoch e with seed + e: unmixed, run 1 would repeat run 0 with a delay of one epoch.
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


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
