"""Draws `docs/concepts/tree.svg`: the tree, the cursor, the horizon, a cut, and omission beside it.

python docs/site/tree.py
"""

from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).parents[1] / "concepts" / "tree.svg"
NAME = "A tree of gists, the cursor and the horizon; under it a cut of 11 entries, and one of 12 with omission"
HISTORY, HORIZON, BLOCK, TAIL = 32, 5, 4, 4
WIDTH, HEIGHT, LEFT, STEP, BOX = 480, 402, 14, 12, 15
"""Pixels: of the picture, left of the first token, from one token to the next, and of a node from top to bottom."""
LEVELS = ("#08306b", "#3a8ac2", "#a3cce3")
"""Colours of LOD 0, 1 and 2, as in the maps."""
INK, MUTED, FAINT, QUERY, HORIZON_COLOR, CURSOR = "#222222", "#666666", "#c4c4c4", "#f6efdc", "#e69f00", "#b0005a"
CUT = ((0, 2), (16, 0), (17, 0), (18, 0), (19, 0), (20, 1), (24, 1), *((token, 0) for token in range(28, 32)))
"""First token and level of each entry."""
OMITTED = (0, 4, 12, 20, 24)


def at(token: float) -> float:
    """Where a token begins, in pixels; the horizon stands a little apart."""
    return LEFT + token * STEP + (8 if token >= HISTORY else 0)


def box(token: int, tokens: int, y: float, color: str, *, hollow: bool = False) -> str:
    """A node that covers some tokens."""
    x, width = at(token) + 1, tokens * STEP - 2
    style = f'fill="none" stroke="{color}" stroke-dasharray="3 2"' if hollow else f'fill="{color}"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{BOX}" rx="2" {style}/>'


def text(
    x: float, y: float, words: str, *, color: str = INK, size: int = 13, anchor: str = "start", bold: bool = False
) -> str:
    """One line of words."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = FAINT, width: float = 1) -> str:
    """A straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="{width:g}"/>'


def tree(y: float) -> Iterator[str]:
    """All nodes of the history, each gist above what it stands for."""
    rows = [y + 60, y + 30, y]
    for lod in (1, 2):
        for first in range(0, HISTORY, BLOCK**lod):
            centre = at(first + BLOCK**lod / 2)
            for child in range(first, first + BLOCK**lod, BLOCK ** (lod - 1)):
                yield line(centre, rows[lod] + BOX, at(child + BLOCK ** (lod - 1) / 2), rows[lod - 1])
    for lod, row in enumerate(rows):
        for first in range(0, HISTORY, BLOCK**lod):
            yield box(first, BLOCK**lod, row, LEVELS[lod])


def horizon(y: float) -> Iterator[str]:
    """The tokens behind the cursor."""
    for token in range(HISTORY, HISTORY + HORIZON):
        yield box(token, 1, y, HORIZON_COLOR)


def notes() -> Iterator[str]:
    """All words of the picture."""
    for y, words in (
        (22, "The history is a tree"),
        (166, "A cut with gists: 11 entries"),
        (272, "Omission: 12 entries"),
    ):
        yield text(LEFT, y, words, bold=True)
    explanations = (
        (LEFT, 184, "Every token is covered once, in full or by a gist."),
        (LEFT, 231, "16 tokens as one gist"),
        (at(16), 231, "4 in full"),
        (at(21), 231, "4, and 4"),
        (LEFT, 290, "The model reads the tokens alone. The policy sees"),
        (LEFT, 307, "a map besides: the gists of what is omitted."),
        (at(HISTORY) + 1, 134, "horizon:"),
        (at(HISTORY) + 1, 149, "is scored"),
    )
    yield from (text(x, y, words, color=MUTED, size=12) for x, y, words in explanations)
    yield text(at(HISTORY) - 4, 22, "cursor", color=CURSOR, anchor="middle", bold=True)
    yield text(at(HISTORY - TAIL / 2), 356, "query", color=MUTED, size=12, anchor="middle")


def legend(y: float) -> Iterator[str]:
    """What each colour is."""
    entries = (LEFT, LEVELS[0], "token"), (84, LEVELS[1], "gist of 4"), (182, LEVELS[2], "gist of 16")
    for x, color, words in (*entries, (288, HORIZON_COLOR, "token of the horizon")):
        yield f'<rect x="{x}" y="{y:g}" width="12" height="12" rx="2" fill="{color}"/>'
        yield text(x + 17, y + 11, words, size=12)


def picture() -> str:
    """The picture as SVG."""
    shown = [first for first in range(0, HISTORY, BLOCK) if first not in OMITTED]
    parts = [
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6" fill="#ffffff" stroke="{FAINT}"/>',
        f'<rect x="{at(HISTORY - TAIL):g}" y="32" width="{TAIL * STEP}" height="330" fill="{QUERY}"/>',
        *tree(38),
        *(box(first, BLOCK**lod, 197, LEVELS[lod]) for first, lod in CUT),
        *(box(first + i, 1, 320, LEVELS[0]) for first in shown for i in range(BLOCK)),
        *(box(first, BLOCK, 320, LEVELS[1], hollow=True) for first in OMITTED),
        *(part for y in (98, 197, 320) for part in horizon(y)),
        line(at(HISTORY) - 4, 32, at(HISTORY) - 4, 362, CURSOR, 2),
        *notes(),
        *legend(378),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">\n'
        f"<title>{NAME}</title>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PATH.write_text(picture())
