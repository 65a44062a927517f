"""A document is read through a context of fixed size, and questions are answered from where it ends."""

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import chat
from lensjax.runs.data.tokenizers import Bytes
from tests.experiments.test_stream_script import text_run

__all__ = ["text_run"]  # the fixture

WORDS = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(3 * WORDS)
    return path


@pytest.mark.slow
def test_a_document_is_read_and_questions_are_answered(text_run, document):
    console = Console(record=True, width=200)
    arguments = chat.Arguments(run=text_run, document=document, question="who?", interval=8, answer=3)
    (answer,) = chat.chat(arguments, console)
    printed = console.export_text()
    assert "read 135 tokens at" in printed and "16 decisions" in printed and answer in printed
    assert chat.chat(arguments, Console(quiet=True)) == [answer], "the likeliest tokens are always the same"


def test_an_answer_ends_where_the_model_says_so_and_leaves_the_reading_as_it_is():
    class Spells:
        """Says the next letter of a word, and then the end."""

        def append(self, state, tokens):
            return state + len(tokens), np.zeros(len(tokens))

        def generate(self, state, count, key, *, temperature):
            word = [104, 105, Bytes.end_of_text, 33]
            return state + 1, np.asarray([word[state - 5]])

    arguments = chat.Arguments(run=".", document=".", answer=10)
    said = chat.answer(Spells(), 3, np.arange(2), Bytes(), jax.random.key(0), arguments)
    assert Bytes().decode(list(said)) == "hi"


@pytest.mark.parametrize(("field", "value"), [("interval", 0), ("answer", 0)])
def test_bad_arguments_are_named(document, field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        chat.chat(chat.Arguments(run=document.parent, document=document, **{field: value}), Console(quiet=True))


def test_a_folder_without_a_run_is_one_message(tmp_path, document):
    with pytest.raises(SystemExit, match="holds no run"):
        chat.main([str(tmp_path), "--document", str(document), "--question", "why?"])
