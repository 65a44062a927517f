"""Pictures look the same in anybody's settings, whatever is written in them."""

import matplotlib
import numpy as np
import pytest

from lensjax.plots.stream import StreamQuality, stream_quality
from lensjax.plots.style import new_figure, own_look, write

HOSTILE = {
    "text.usetex": True,  # there is no LaTeX here
    "font.family": "no such font",
    "axes.facecolor": "black",
    "savefig.format": "pdf",
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "figure.constrained_layout.use": False,
    "axes.unicode_minus": False,
}


def quality(title, rival="b"):
    return StreamQuality(title, np.arange(3), {"a": np.ones(3), rival: np.zeros(3)}, {rival: (-1.0, -1.0, -1.0)})


def test_d11_1_the_users_style_does_not_matter(tmp_path):
    stream_quality(quality("runs/a"), tmp_path / "plain.png")
    with matplotlib.rc_context(HOSTILE):
        stream_quality(quality("runs/a"), tmp_path / "hostile.png")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "hostile.png").read_bytes()


@pytest.mark.parametrize("text", ["研究", "😀", "مرحبا नमस्ते", "$x^ _{", "\\frac", "a\x07\u200d", "a\tb"])
def test_e8_any_name_can_be_drawn(tmp_path, text):
    stream_quality(quality(f"runs/{text}", text), tmp_path / f"{text.strip()[:1]}.png")


def test_a_picture_has_the_name_that_was_asked_for(tmp_path):
    for name in ("no-ending", "a.svg", "with.dots.png"):
        write(new_figure(1, 1), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"no-ending", "a.svg", "with.dots.png"}


def test_a_picture_that_fails_leaves_the_one_that_is_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("before")
    figure = new_figure(1, 1)
    figure.text(0, 0, "$\\nothing$")  # no symbol of this name
    with own_look(), pytest.raises(ValueError, match="Unknown symbol"):
        write(figure, path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
