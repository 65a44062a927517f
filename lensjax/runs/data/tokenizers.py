"""Tokenizers: text to token ids and back, of other people's models or of plain bytes.

    tokenizer.json           whatever the `tokenizers` library reads
    a Hugging Face folder    its `tokenizer.json`
    a GGUF file              byte-level BPE of the tokens and merges in its metadata

Special tokens are control, not text: a document that spells one out gets ordinary tokens, unless it is asked for.
"""

import functools
import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lensjax._settings import require

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
"""What stands behind a document in pretraining, in the vocabularies that have it. A chat model's own end of sequence is
the end of a turn."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_WORD_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama-bpe": rf"{_WORD_ENDS}|\p{{N}}{{1,3}}|{_REST}", "qwen2": rf"{_WORD_ENDS}|\p{{N}}|{_REST}"}
PRE_TOKENIZERS = ("gpt-2", "smollm", *_PATTERNS)
"""Values of `tokenizer.ggml.pre` that are read: how text is cut before pairs are merged."""


class Tokenizer(Hashable, Protocol):
    """What turns text into tokens."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    def end_of_text(self) -> int:
        """The id that stands behind a document."""

    @property
    def digest(self) -> str:
        """Two tokenizers that differ have two of them."""

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Ids int32[n] of a text; with `special`, names of special tokens in it stand for these."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids [n]; what is no whole character becomes U+FFFD."""


class Bytes:
    """Bytes as tokens; a document ends with byte 0.

    Example:
      >>> from lensjax.runs.data.tokenizers import Bytes
      >>> Bytes().encode("né")
      array([110, 195, 169], dtype=int32)
      >>> Bytes().decode([110, 195, 169])
      'né'
    """

    vocab_size = 256
    end_of_text = 0
    digest = "bytes"

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """UTF-8 of a text; there are no special tokens."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Text of UTF-8; ids from 256 on, which only models have, are no text."""
        return bytes(id if id < 256 else 255 for id in np.asarray(ids).tolist()).decode("utf-8", "replace")


class Subwords:
    """A tokenizer of the `tokenizers` library (extra `hf`).

    Args:
      inner: `tokenizers.Tokenizer`.
      end_of_text: the id that stands behind a document.
      vocab_size: above all ids; None for the highest that has a token.
    """

    def __init__(self, inner: Any, *, end_of_text: int, vocab_size: int | None = None) -> None:
        self._inner = inner
        self.end_of_text = end_of_text
        self.vocab_size = vocab_size or 1 + max(inner.get_vocab(with_added_tokens=True).values())
        self.digest = hashlib.sha256(f"{end_of_text} {inner.to_str()}".encode()).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Ids int32[n], with nothing put before or behind them."""
        self._inner.encode_special_tokens = not special
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Text, special tokens by their names; ids without a token are left out."""
        return self._inner.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def read_tokenizer(path: str | Path | None, *, name: str = "data.tokenizer") -> Tokenizer:
    """Reads a tokenizer; the answer is kept while the file stays as it is.

    Args:
      path: a `tokenizer.json`, a folder that holds one, or a GGUF file; None for bytes.
      name: of the setting, for messages.

    Returns:
      `Tokenizer`.

    Raises:
      ValueError: there is no such file, it is damaged, or of a kind that is not read.
      ImportError: the extra `hf`, or for GGUF `gguf`, is not installed.

    Example:
      >>> from lensjax.runs.data.tokenizers import read_tokenizer
      >>> read_tokenizer(None).vocab_size
      256
    """
    if path is None:
        return Bytes()
    file = Path(path).expanduser()
    if file.is_dir():
        folder, file = file, file / "tokenizer.json"
        require(file.is_file(), f"{name} {str(folder)!r} holds no tokenizer.json: name a folder that does")
    require(file.is_file(), f"{name} {str(path)!r} does not exist: name a tokenizer.json, its folder, or a GGUF file")
    status = file.stat()
    return _read(file, name, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read(file: Path, name: str, _stamp: tuple[int, int]) -> Tokenizer:
    with file.open("rb") as opened:
        is_gguf = opened.read(4) == b"GGUF"
    try:
        return _from_gguf(file) if is_gguf else _from_json(file)
    except ImportError as error:
        extra = "gguf" if error.name == "gguf" else "hf"
        raise ImportError(f"{name} {str(file)!r} needs {error.name}: pip install 'lensjax[{extra}]'") from error
    except Exception as error:  # the libraries raise bare exceptions
        raise ValueError(f"{name} {str(file)!r} cannot be read: {' '.join(str(error).split())}") from error


def _from_json(file: Path) -> Tokenizer:
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(file))
    beside, declared = file.with_name("tokenizer_config.json"), None
    if beside.is_file():
        try:
            declared = json.loads(beside.read_text("utf-8")).get("eos_token")
        except (ValueError, RecursionError, AttributeError) as error:
            raise ValueError(f"{beside} is not the JSON object of a tokenizer's settings: {error}") from error
        declared = declared.get("content") if isinstance(declared, dict) else declared
    return Subwords(inner, end_of_text=_separator(inner, declared))


def _from_gguf(file: Path) -> Tokenizer:
    import gguf

    fields = gguf.GGUFReader(file).fields

    def metadata(key: str) -> Any:
        require(f"tokenizer.ggml.{key}" in fields, f"it has no tokenizer.ggml.{key}")
        return fields[f"tokenizer.ggml.{key}"].contents()

    kind, pre, tokens = metadata("model"), metadata("pre"), metadata("tokens")
    require(kind == "gpt2", f"tokenizer.ggml.model must be gpt2 (byte-level BPE), got {kind!r}: give a tokenizer.json")
    types = metadata("token_type") if "tokenizer.ggml.token_type" in fields else [_NORMAL] * len(tokens)
    inner = byte_level(tokens, metadata("merges"), pre=pre, types=types)
    declared = tokens[metadata("eos_token_id")] if "tokenizer.ggml.eos_token_id" in fields else None
    return Subwords(inner, end_of_text=_separator(inner, declared), vocab_size=len(tokens))


def byte_level(tokens: Sequence[str], merges: Sequence[str], *, pre: str, types: Sequence[int] | None = None) -> Any:
    """Builds byte-level BPE from its tables, as GGUF files hold them (extra `hf`).

    Args:
      tokens: names of ids 0 to V - 1, bytes written as in GPT-2.
      merges: pairs "left right", the first merged first.
      pre: one of `PRE_TOKENIZERS`.
      types: of each token in GGUF's numbers; None for ordinary ones.

    Returns:
      `tokenizers.Tokenizer`.

    Raises:
      ValueError: `pre` is unknown, or the tables do not go together.

    A byte that has no token is dropped, as the reference implementation does; SmolLM2 lacks 21 of them, among them six
    control characters and what begins U+40000 to U+BFFFF.

    Example:
      >>> from lensjax.runs.data.tokenizers import byte_level
      >>> byte_level([*"ab1", "ab"], ["a b"], pre="smollm").encode("ab11a").tokens
      ['ab', '1', '1', 'a']

    References:
      `gpt-2`: Radford et al., Language Models are Unsupervised Multitask Learners (2019). `smollm`: digits one by one,
      then as GPT-2, as in SmolLM2's own tokenizer.json. `llama-bpe`, `qwen2`: the patterns of Llama 3 and Qwen2, as in
      transformers 5.24.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    require(pre in PRE_TOKENIZERS, f"tokenizer.ggml.pre must be one of {', '.join(PRE_TOKENIZERS)}, got {pre!r}")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    require(len(vocabulary) == len(tokens), f"{len(tokens) - len(vocabulary)} of its {len(tokens)} tokens stand twice")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    inner = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    plain = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    if pre in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, plain(use_regex=False)])
    elif pre == "smollm":
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain()])
    else:
        inner.pre_tokenizer = plain()
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types or [_NORMAL] * len(tokens), strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            inner.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    return inner


def _separator(inner: Any, declared: str | None) -> int:
    """The id of the token that separates documents."""
    for token in (*SEPARATORS, declared):
        if token is not None and (id := inner.token_to_id(token)) is not None:
            return id
    raise ValueError(
        f"no token ends a text: expected one of {', '.join(SEPARATORS)}, or an eos_token that it has, got {declared!r}"
    )
