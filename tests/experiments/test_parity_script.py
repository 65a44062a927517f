"""`experiments.parity`: a checkpoint beside logits that someone hands over."""

import numpy as np
import pytest

from experiments import parity
from tests.models.checkpoint_files import FIXTURES


def test_a_checkpoint_read_right_passes(capsys):
    parity.main([str(FIXTURES / "qwen3"), "--reference", str(FIXTURES / "qwen3.npz"), "--tolerance", "1e-5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("largest difference") and lines[1] == "likeliest token equal in 64 of 64 places"
    _, loss, _, _, _, reference, *_ = lines[2].replace(",", "").split()
    assert float(loss) == pytest.approx(float(reference), abs=1e-5)


def test_numbers_are_those_worked_out_by_hand(tmp_path):
    with np.load(FIXTURES / "llama.npz") as file:
        tokens, logits = file["tokens"], file["logits"]
    changed = logits.copy()
    changed[:16, 7] += 100.0
    np.savez(tmp_path / "other.npz", tokens=tokens, logits=changed)
    found = parity.compare(parity.Arguments(FIXTURES / "llama", tmp_path / "other.npz"))
    assert found.difference == pytest.approx(100, abs=1e-3)
    assert found.agreement == 1 - (logits[:16].argmax(axis=1) != 7).sum() / 64
    wide = logits.astype(np.float64)
    exact = np.log(np.exp(wide[:-1]).sum(axis=1)) - wide[np.arange(63), tokens[1:]]
    assert found.loss == pytest.approx(exact.mean(), abs=1e-5)


def test_a_difference_above_the_tolerance_fails():
    with pytest.raises(SystemExit, match=r"error: the largest difference is above --tolerance 1e-09"):
        parity.main([str(FIXTURES / "llama"), "--reference", str(FIXTURES / "llama.npz"), "--tolerance", "1e-9"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": [1, 2]}, "must hold tokens and logits, got tokens"),
        ({"tokens": [1, 2], "logits": np.zeros((2, 47))}, r"logits \[S, 48\], got tokens \[2\] up to 2 and logits"),
        ({"tokens": [1, 48], "logits": np.zeros((2, 48))}, r"below 48 .* up to 48"),
        ({"tokens": [1.0, 2.0], "logits": np.zeros((2, 48))}, "two or more whole numbers"),
    ],
)
def test_references_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(SystemExit, match=message):
        parity.main([str(FIXTURES / "llama"), "--reference", str(tmp_path / "other.npz")])
    with pytest.raises(SystemExit, match=r"nowhere\.npz does not exist"):
        parity.main([str(FIXTURES / "llama"), "--reference", str(tmp_path / "nowhere.npz")])
