"""Which data a run is about."""

from typing import Literal, Protocol

from lensjax._settings import Count, PositiveInt, require, settings
from lensjax.models.base_lm import BaseConfig
from lensjax.training.scoring import ContextConfig


@settings("data")
class DataConfig:
    """Where tokens come from."""

    task: Literal["stdlib", "text", "recall", "tracking", "suite"] = "stdlib"
    """The running Python's standard library, the user's own text files, single-span recall, variable tracking, or
    twelve kinds of question over a text, a token a word."""
    path: str | None = None
    """Folder or glob of text, JSON lines, Parquet or Hugging Face data sets, packed or not; for task text."""
    text_column: str = "text"
    """Where the text of a row stands, of files that have rows; `a.b` is b in the object a."""
    id_column: str | None = None
    """Where the id of a row stands, which says its split; None takes the file's name and the row's number."""
    tokenizer: str | None = None
    """A tokenizer.json, a Hugging Face folder that holds one, or a GGUF file; None reads text as bytes."""
    cache: str = "runs/.tokens"
    """Folder of token files, each made once of a tokenizer and its texts."""
    split_by: Literal["file", "folder"] = "file"
    """Files or rows, by a hash of their names and with all that are like them, or the folders train, validation and
    test of `path`."""
    max_files: PositiveInt | None = None
    """Read at most this many files or rows a split, in hash order; None reads all."""
    quote: Count = 0
    """Tokens of text before the cursor that begin an earlier passage again, which the horizon goes on with; 0 leaves
    text as it is."""
    recall_pool: PositiveInt = 4
    """Distinct blocks in a recall pretraining sequence; few, so that most positions repeat something."""
    query: PositiveInt = 2
    """First tokens of the block to recall that stand before the cursor; the rest of it is scored."""
    hops: PositiveInt = 2
    """Statements in a chain of variables to track, each of which takes a look-up."""

    def _check(self) -> None:
        require(
            self.task != "text" or bool(self.path),
            f"data.path must name a folder or a glob where data.task is text, got {self.path!r}",
        )
        require(
            self.task == "text" or self.path is None,
            f"data.path is read only where data.task is text: set data.task text, got {self.task!r}",
        )
        require(
            self.tokenizer is None or self.is_text,
            f"data.tokenizer is of text: set data.task to text or stdlib, got {self.task!r}",
        )
        require(bool(self.text_column), "data.text_column must name a column, got an empty string")
        require(self.id_column != "", "data.id_column must name a column or be None, got an empty string")
        require(
            self.task == "text" or (self.text_column, self.id_column) == ("text", None),
            f"data.text_column and data.id_column are read only where data.task is text: set data.task text, got "
            f"{self.task!r}",
        )
        require(bool(self.cache), "data.cache must name a folder, got an empty string")
        require(
            self.split_by == "file" or self.task == "text",
            f"data.split_by folder is of a folder of text: set data.task text, got {self.task!r}",
        )
        require(
            self.quote == 0 or self.is_text,
            f"data.quote is of text: set data.task to text or stdlib, got {self.task!r}",
        )

    @property
    def is_text(self) -> bool:
        """Whether tokens are of files; otherwise they are of a synthetic task."""
        return self.task in ("stdlib", "text")


class Windows(Protocol):
    """What is read of a configuration, such as `lensjax.Config`."""

    @property
    def data(self) -> DataConfig: ...  # noqa: D102
    @property
    def context(self) -> ContextConfig: ...  # noqa: D102
    @property
    def base(self) -> BaseConfig: ...  # noqa: D102
