"""Byte-level BPE of SmolLM2, slow and obvious: digits one by one, then GPT-2's words, then pairs merged by rank."""

import unicodedata
from itertools import pairwise

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_names() -> dict[int, str]:
    """How GPT-2 writes each byte: as itself where that can be seen, as a letter from 256 on where not."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def kind(char: str) -> str:
    """Space, letter, number or other."""
    return "space" if char.isspace() and char not in "\x1c\x1d\x1e\x1f" else unicodedata.category(char)[0]


def words(text: str) -> list[str]:
    """GPT-2's pattern by hand: contractions, then runs of letters, numbers or others behind one blank, then blanks."""
    found, at = [], 0
    while at < len(text):
        contraction = next((one for one in CONTRACTIONS if text.startswith(one, at)), None)
        if contraction:
            end = at + len(contraction)
        else:
            first = at + (text[at] == " " and at + 1 < len(text) and kind(text[at + 1]) != "space")
            own = kind(text[first])
            if own == "space":
                end = first
                while end < len(text) and kind(text[end]) == "space":
                    end += 1
                if end < len(text) and end - first > 1:
                    end -= 1  # the last blank belongs to what follows, or stands alone
            else:
                same = {own} if own in "LN" else {"C", "M", "P", "S", "Z"}
                end = first
                while end < len(text) and kind(text[end]) in same:
                    end += 1
        found.append(text[at:end])
        at = end
    return found


def pieces(text: str) -> list[str]:
    """Digits one by one, and the words of what is between them."""
    found, start = [], 0
    for at, char in enumerate(text):
        if kind(char) == "N":
            found += [*words(text[start:at]), char]
            start = at + 1
    return found + words(text[start:])


def encode(text: str, ids: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Token ids: in each piece the pair of lowest rank is merged, leftmost first, until there is none."""
    names, found = byte_names(), []
    for piece in pieces(text):
        parts = [names[byte] for byte in piece.encode()]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found
