"""Documents that are nearly the same, found without comparing each with each: MinHash over their shingles.

The shingles of a document are all runs of 8 bytes in it, once small and capital letters are one, characters are in
normal form C, and white space is one blank. With A and B those of two documents,

    resemblance(A, B) = |A and B| / |A or B|

and two are alike from 0.8 on: a word is another one, a line more or less. Hash values of shingles are cut into 256
bins, and a document is known by the smallest of each bin, its sketch. Of the bins that either has, the share that is
equal is the resemblance, with a standard error of 0.025 at the bound. Only documents that have 8 bins in a row in
common are compared. All is a function of the documents alone: the hash is fixed. Documents of fewer than 16 different
shingles or so are alike where they are equal, which is left to the caller.

References:
  Broder, On the resemblance and containment of documents (1997): shingles, sketches.
  Li, Owen, Zhang, One permutation hashing, NeurIPS 2012: bins, and the estimate from them.
  Leskovec, Rajaraman, Ullman, Mining of massive datasets, chapter 3: bands of a sketch.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

ALIKE = 0.8
SHINGLE = 8
FEWEST = 16
"""Bins that a sketch must have."""
BINS = 256
_ROWS, _BLOCK, _CHUNK = 8, 2**18, 1024
_EMPTY = np.uint32(2**32 - 1)


def sketch(document: BinaryIO) -> np.ndarray:
    """The smallest hash value in each bin.

    Args:
      document: an open file; 256 KiB of it at a time are in memory, and shingles across two of these do not count.

    Returns:
      uint32[256]; 2**32 - 1 where a bin has none.
    """
    smallest = np.full(BINS, _EMPTY)
    for block in iter(functools.partial(document.read, _BLOCK), b""):
        text = b" ".join(_plain(block).lower().split())
        if len(text) >= SHINGLE:
            hashes = _mixed(np.ndarray(len(text) - SHINGLE + 1, "<u8", text, strides=(1,)).astype(np.uint64))
            np.minimum.at(smallest, (hashes >> np.uint64(56)).astype(np.intp), hashes.astype(np.uint32))
    return smallest


def alike(sketches: Sequence[np.ndarray] | np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of documents that are alike, by their indices: enough of them to join all that are.

    Args:
      sketches: of all documents, uint32[n, 256]; they may be mapped from a file. 256 bytes of each are in memory.

    Example:
      >>> import io
      >>> from lensjax.runs.data.resemblance import alike, sketch
      >>> text = b"All happy families are alike; each unhappy family is unhappy in its own way. Tolstoy"
      >>> texts = (text, b"Call me Ishmael. Some years ago, never mind how long", text + b", 1878")
      >>> list(alike([sketch(io.BytesIO(one)) for one in texts]))
      [(0, 2)]
    """
    sketches = np.asarray(sketches, np.uint32).reshape(-1, BINS)
    compared: set[bytes] = set()
    kept, bands = _bands(sketches)
    for band in bands:
        order = np.argsort(band, kind="stable")
        begins = np.flatnonzero(np.diff(band[order], prepend=~band[order][:1]))
        sizes = np.diff(begins, append=len(order))
        for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
            bucket = kept[order[begin : begin + size]]
            if bucket.tobytes() in compared:
                continue
            compared.add(bucket.tobytes())
            rows = sketches[bucket]
            while len(bucket) > 1:
                same = _resemblance(rows[0], rows[1:]) >= ALIKE
                yield from ((int(bucket[0]), int(i)) for i in bucket[1:][same])
                bucket, rows = bucket[1:][~same], rows[1:][~same]


def _bands(sketches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which documents have enough bins [k], and a hash of 8 bins in a row of theirs: uint64[bands, k]."""
    kept, bands = [], []
    for first in range(0, len(sketches), _CHUNK):
        chunk = sketches[first : first + _CHUNK]
        (enough,) = np.nonzero(np.count_nonzero(chunk != _EMPTY, axis=1) >= FEWEST)
        rows = _filled(chunk[enough]).reshape(len(enough), BINS // _ROWS, _ROWS).astype(np.uint64)
        total = np.zeros(rows.shape[:2], np.uint64)
        for place in range(_ROWS):
            total = _mixed(total + rows[..., place] + np.uint64(1))
        kept.append(first + enough)
        bands.append(total.T)
    if not kept:
        return np.empty(0, np.intp), np.empty((0, 0), np.uint64)
    return np.concatenate(kept), np.concatenate(bands, axis=1)


def _plain(block: bytes) -> bytes:
    """Letters with accents as one character each, and small, as `lower` makes those of ASCII."""
    if block.isascii():
        return block
    text = unicodedata.normalize("NFC", block.decode("utf-8", "surrogateescape")).lower()
    return text.encode("utf-8", "surrogateescape")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Bits of uint64[n] well mixed, in place: the finaliser of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def _resemblance(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of a sketch [256] with each of others [n, 256]: float[n]."""
    either = (one != _EMPTY) | (others != _EMPTY)
    return np.sum(either & (one == others), axis=1) / np.sum(either, axis=1)


def _filled(sketches: np.ndarray) -> np.ndarray:
    """Sketches [n, 256] with the next bin's value in those that have none: few shingles then stand in all bands."""
    places = np.where(sketches != _EMPTY, np.arange(BINS), 2 * BINS)
    twice = np.concatenate([places, places + BINS], axis=1)
    after = np.minimum.accumulate(twice[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    return np.take_along_axis(sketches, after % BINS, axis=1)
