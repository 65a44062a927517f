import numpy as np
import pytest

from lensjax import _numerics


def test_masked_mean_and_std():
    values, where = np.asarray([1, 5, np.nan, 3], np.float32), np.asarray([True, True, False, True])
    assert float(_numerics.masked_mean(values, where)) == 3
    assert float(_numerics.masked_std(values, where)) == pytest.approx((8 / 3) ** 0.5)
    nothing = np.zeros(4, bool)
    assert float(_numerics.masked_mean(values, nothing)) == 0
    assert float(_numerics.masked_std(values, nothing)) == 0
    assert np.isnan(_numerics.masked_mean(values, ~nothing))
    # A mask for rows counts each of their values.
    assert float(_numerics.masked_mean(np.asarray([[1, 2], [3, 6]], np.float32), np.asarray([[False], [True]]))) == 4.5
