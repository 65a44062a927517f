import sys

import matplotlib
import pytest

from lensjax.plots import style


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(style, "_DPI", 40)


@pytest.fixture(autouse=True)
def _global_state_stays(monkeypatch):
    """No picture touches matplotlib's global state."""
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(matplotlib.rcParams)
    yield
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(matplotlib.rcParams) == before
