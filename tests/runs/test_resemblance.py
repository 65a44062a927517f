"""Documents that are nearly the same, and the splits that they are in."""

import hashlib
import io
import random
import unicodedata
from itertools import combinations

import numpy as np
import pytest

from lensjax.runs.data import corpus as data
from lensjax.runs.data.families import MOST_FILES, families
from lensjax.runs.data.resemblance import ALIKE, SHINGLE, _resemblance, alike, sketch
from lensjax.runs.data.splits import SPLITS
from lensjax.runs.data.task import DataConfig
from tests.corpora import text_config, write_numbered

WORDS = ["".join(random.Random(i).choices("etaoinshrdlu", k=2 + i % 7)) for i in range(500)]


def prose(seed: int, words: int = 120) -> str:
    """One line of words that no other seed has in this order."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def known(*texts: str | bytes) -> list[np.ndarray]:
    return [sketch(io.BytesIO(text.encode() if isinstance(text, str) else text)) for text in texts]


def joined(*texts: str) -> bool:
    """Whether the second of two texts follows the first into its family."""
    found = families({str(i): text.encode() for i, text in enumerate(texts)})
    return found["0"] == found["1"]


def changed(text: str, **by: str) -> str:
    words = text.split(" ")
    for place, word in by.items():
        words[int(place.lstrip("w"))] = word
    return " ".join(words)


TEXT = prose(0)
NEARLY = {
    "a word": changed(TEXT, w60="different"),
    "two words": changed(TEXT, w3="once", w100="twice"),
    "a word more": changed(TEXT, w60=TEXT.split(" ")[60] + " more"),
    "a word less": " ".join(TEXT.split(" ")[1:]),
    "a heading": "Chapter 1\n\n" + TEXT,
    "lines": TEXT.replace(" ", "\n"),
    "other lines": TEXT[:300] + "\r\n" + TEXT[300:],
    "capitals": TEXT.upper(),
    "blanks": f"  {TEXT.replace(' ', '   ')}\t\r\n",
}


@pytest.mark.parametrize("name", NEARLY)
def test_d3_4_nearly_the_same_document_is_in_the_same_family(name):
    assert NEARLY[name] != TEXT and joined(TEXT, NEARLY[name])
    assert not joined(TEXT, prose(1)) and not joined(TEXT, prose(2) + "\n" + prose(3))


def test_d3_4_accents_may_be_written_in_either_normal_form():
    text = TEXT.replace("e", "é").replace("u", "ü")
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert joined(*forms) and joined(forms[0].upper(), forms[1])
    assert (known(bytes(range(256)) * 3)[0] < 2**32 - 1).any()  # any bytes are text


def test_d3_5_more_near_copies_than_a_line_may_stand_in_are_one_family():
    count = MOST_FILES + 50
    text = "".join(f"This is line {i} of a long text.\n" for i in range(40))
    found = families({f"{i:03d}": f"{text}Copy {i}.".encode() for i in range(count)})
    assert set(found.values()) == {"000"}


def test_documents_with_no_more_than_a_subject_in_common_stay_apart():
    texts = [f"{name} is in {split}. " * 6 for name in range(10) for split in SPLITS]
    texts += [f"Text {i} is like no other text." * 3 for i in range(50)]
    texts += [bytes([i]) * 100 for i in range(256)]
    texts += [prose(i) + prose(1000) for i in range(1, 20)]  # a half of each is one text
    assert list(alike(known(*texts))) == []


def test_splits_of_a_corpus_without_near_copies_are_those_of_names(tmp_path):
    config = text_config(write_numbered(tmp_path)).data
    found = [path for split in SPLITS for path in data.corpus_files(config, split)]
    assert len(found) == 200


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0])
def test_the_estimate_is_that_of_all_shingles(share):
    rng = random.Random(round(100 * share))
    one = rng.randbytes(20_000).hex()
    other = "".join(
        piece if rng.random() < share else rng.randbytes(50).hex()
        for piece in (one[i : i + 100] for i in range(0, len(one), 100))
    )
    sets = [{text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (one, other)]
    exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    first, second = known(one, other)
    (estimate,) = _resemblance(first, second[None])
    assert abs(estimate - exact) < 4 * np.sqrt(max(exact * (1 - exact), 1e-9) / 256) + 1e-6
    if abs(exact - ALIKE) > 0.1:
        assert list(alike([first, second])) == ([(0, 1)] if exact > ALIKE else [])


def test_all_that_are_alike_are_joined_as_if_each_were_compared_with_each():
    rng = random.Random(0)
    texts = []
    for seed in range(12):
        texts.append(prose(seed, words=rng.randint(20, 400)))
        for _ in range(rng.randint(0, 5)):
            words = texts[-1].split(" ")
            for _ in range(rng.randint(0, len(words) // 30)):
                words[rng.randrange(len(words))] = "changed"
            texts.append(" ".join(words))
    rng.shuffle(texts)
    sketches = known(*texts)
    slow = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if _resemblance(sketches[i], sketches[j][None])[0] >= ALIKE
    }
    assert len(slow) > 10 and components(len(texts), slow) == components(len(texts), set(alike(sketches)))


def components(count: int, pairs: set[tuple[int, int]]) -> list[int]:
    """The smallest index that each is connected to, found by asking until nothing changes."""
    smallest = list(range(count))
    for _ in range(count):
        for i, j in pairs:
            smallest[i] = smallest[j] = min(smallest[i], smallest[j])
    return smallest


def test_a_sketch_is_the_same_on_every_machine():
    (found,) = known(TEXT)
    assert hashlib.sha256(found.astype("<u4").tobytes()).hexdigest()[:16] == "0b1c94c59eb39cd4"
    assert found.shape == (256,) and found.dtype == np.uint32


def test_large_documents_are_read_in_blocks_and_small_ones_have_no_shingles():
    text = random.Random(0).randbytes(400_000).hex()
    one, other = known(text, "a few words before it. " + text)
    assert _resemblance(one, other[None])[0] > 0.95
    for text in ("", "       ", "\n" * 100, "seven..", "   a    b    c "):
        assert (known(text)[0] == 2**32 - 1).all()
    assert list(alike(known("", "", "the same", "the same"))) == []


# Folders that say what is held out


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return DataConfig(task="text", path=str(folder), split_by="folder")


@pytest.mark.parametrize("other", [TEXT, *NEARLY.values(), "tiny"])
def test_d3_6_one_document_in_two_folders_is_refused(tmp_path, other):
    texts = {"train/a/1.txt": other if other == "tiny" else TEXT, "train/2.txt": prose(2), "validation/v.txt": prose(3)}
    config = write(tmp_path, {**texts, "test/b/t.txt": other})
    with pytest.raises(
        ValueError,
        match=r"data.split_by folder: .*(train/a/1|test/b/t).* and .*(train/a/1|test/b/t).* the same text, or nearly",
    ):
        data.corpus_files(config, "train")
    (tmp_path / "test/b/t.txt").rename(tmp_path / "train/3.txt")
    assert {split: len(data.corpus_files(config, split)) for split in SPLITS} == {
        "train": 3,
        "validation": 1,
        "test": 0,
    }


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_d3_7_one_file_in_two_folders_is_refused(tmp_path, link):
    config = write(tmp_path, {"train/1.txt": prose(1), "validation/v.txt": prose(3), "test/t.txt": prose(4)})
    getattr(tmp_path / "test/x.txt", link)(tmp_path / "train/1.txt")
    with pytest.raises(ValueError, match="the same text, or nearly"):
        data.corpus_files(config, "validation")
