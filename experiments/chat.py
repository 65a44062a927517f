"""Reads a long document through a context of fixed size, and answers questions about it.

    python -m experiments.chat runs/smol --document book.txt --question "Who was the first to cross the river?"
    python -m experiments.chat runs/smol --document book.txt        asks for questions until an empty line

The base model sees at most `budget` tokens before a decision and `interval` after it, however long the document is;
LensNet decides which, every `interval` tokens, among the last `history`. Every question begins where the document ends.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from experiments import command
from lensjax._settings import NonNegative, PositiveInt, Seed, settings
from lensjax.runs.data.tokenizers import Tokenizer, read_tokenizer
from lensjax.runs.engine.progress import has_bars
from lensjax.runs.load import load
from lensjax.session import Refocus, Session, SessionState

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
"""ChatML, for models that have its tokens."""


@settings()
class Arguments:
    """What to read, and what to ask."""

    run: tyro.conf.Positional[Path]
    """Folder of a run on text."""
    document: Path
    """UTF-8 text."""
    question: str | None = None
    """None asks for questions in the terminal."""
    history: PositiveInt | None = None
    """Tokens that a decision can choose from; None as in training."""
    budget: PositiveInt | None = None
    """Entries of a context; None as in training."""
    interval: PositiveInt = 128
    """Tokens between two decisions."""
    answer: PositiveInt = 96
    """Tokens of an answer, at most."""
    temperature: NonNegative = 0.0
    """0 takes the likeliest token."""
    seed: Seed = 0


@dataclass(frozen=True)
class Reading:
    """A document, read."""

    state: SessionState
    nats: float
    """Mean loss of its tokens."""
    decisions: int
    kept: float
    """Share of the cache that was kept at a decision, mean."""
    tokens_per_second: float


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(lambda arguments: chat(arguments, Console()), Arguments, words, description=__doc__)


def chat(arguments: Arguments, console: Console) -> list[str]:
    """Reads the document and returns the answers."""
    text = arguments.document.read_text(encoding="utf-8")
    trained = load(arguments.run)
    tokenizer = read_tokenizer(trained.config.data.tokenizer)
    shape = trained.config.session
    history = shape.geometry.history if arguments.history is None else arguments.history
    budget = shape.budget if arguments.budget is None else arguments.budget
    session = trained.session(
        geometry=replace(shape.geometry, history=history), budget=budget, interval=arguments.interval
    )
    is_chat = len(tokenizer.encode(END, special=True)) == 1
    ids = tokenizer.encode(USER if is_chat else "", special=True).tolist() + tokenizer.encode(text).tolist()
    reading = read(session, np.asarray(ids, np.int32), console)
    console.out(
        f"read {len(ids)} tokens at {reading.tokens_per_second:.0f} a second, {reading.nats:.3f} nats a token; "
        f"{reading.decisions} decisions for {budget} of {history} tokens, {reading.kept:.0%} of the cache kept",
        highlight=False,
    )
    answers = []
    for number, question in enumerate(_questions(arguments.question, console)):
        key = jax.random.fold_in(jax.random.key(arguments.seed), number)
        started = time.perf_counter()
        asked = _asked(question, tokenizer, is_chat=is_chat)
        tokens = list(answer(session, reading.state, asked, tokenizer, key, arguments))
        answers.append(tokenizer.decode(tokens).strip())
        rate = len(tokens) / (time.perf_counter() - started)
        console.out(f"{answers[-1]}\n({len(tokens)} tokens, {rate:.1f} a second)", highlight=False)
    return answers


def read(session: Session, ids: np.ndarray, console: Console) -> Reading:
    """Reads a document from its beginning."""
    kept: list[float] = []

    def on_refocus(state: SessionState, report: Refocus) -> None:
        kept.append(float(report.kept) / session.config.budget)

    state, losses, size = session.init(), [], session.config.interval
    started = time.perf_counter()
    with Progress(console=console, transient=True, disable=not has_bars(console)) as progress:
        for start in progress.track(range(0, len(ids), size), description="reading"):
            state, nll = session.append(state, ids[start : start + size], on_refocus=on_refocus)
            losses.append(nll)
    seconds = time.perf_counter() - started
    nats = float(np.concatenate(losses).mean())
    return Reading(state, nats, len(kept), float(np.mean(kept)) if kept else 1.0, len(ids) / seconds)


def answer(
    session: Session,
    state: SessionState,
    asked: np.ndarray,
    tokenizer: Tokenizer,
    key: jax.Array,
    arguments: Arguments,
) -> Iterator[int]:
    """Tokens of an answer, up to the model's own end of it; the session that has read the document stays as it is."""
    of_turn = tokenizer.encode(END, special=True).tolist()
    ends = {tokenizer.end_of_text, *(of_turn if len(of_turn) == 1 else ())}
    state, _ = session.append(state, asked)
    for index in range(arguments.answer):
        state, tokens = session.generate(state, 1, jax.random.fold_in(key, index), temperature=arguments.temperature)
        if int(tokens[0]) in ends:
            return
        yield int(tokens[0])


def _asked(question: str, tokenizer: Tokenizer, *, is_chat: bool) -> np.ndarray:
    words = f"\n\n{question}"
    if not is_chat:
        return tokenizer.encode(f"{words}\n")
    return np.concatenate([tokenizer.encode(words), tokenizer.encode(ASSISTANT, special=True)])


def _questions(question: str | None, console: Console) -> Iterator[str]:
    if question is not None:
        yield question
        return
    while words := console.input("> ").strip():
        yield words


if __name__ == "__main__":
    main()
