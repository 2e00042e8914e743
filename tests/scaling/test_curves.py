import math

import numpy as np
import pytest

from lablib.scaling.curves import around, first_below, frontier, valley


def test_the_vertex_of_a_parabola_is_found():
    x = np.array([1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    loss = 2.0 + 0.3 * (np.log(x) - np.log(3e-3)) ** 2
    for points in (3, 4, 5):
        found = valley(x[::-1], loss[::-1], points)
        assert found.x == pytest.approx(3e-3) and found.loss == pytest.approx(2.0)
        assert found.curvature == pytest.approx(0.6) and found.bracketed


def test_a_vertex_is_never_extrapolated():
    for loss in ([3, 2, 1], [1, 2, 3], [1, 3, 1]):
        found = valley([1, 2, 4], loss)
        assert not found.bracketed and math.isnan(found.x) and math.isnan(found.loss)
    with pytest.raises(ValueError, match="as many different x"):
        valley([1, 2, 2], [3, 1, 2])
    with pytest.raises(ValueError, match="above 0"):
        valley([0, 1, 2], [3, 1, 2])


def test_the_frontier_is_the_lower_envelope():
    small, large = ([1, 2, 4, 8], [3.0, 2.5, 2.3, 2.2]), ([2, 4, 8, 16], [2.8, 2.4, 2.1, 1.9])
    found = frontier([small, large])
    assert found.compute.tolist() == [1, 2, 4, 8, 16]
    assert found.loss.tolist() == [3.0, 2.5, 2.3, 2.1, 1.9]
    assert found.curve.tolist() == [0, 0, 0, 1, 1]
    assert len(frontier([]).loss) == 0


def test_when_a_curve_first_reaches_a_loss():
    x, loss = [1, 2, 4], [3.0, 2.0, 1.0]
    assert first_below(x, loss, 1.5) == pytest.approx(2 * math.sqrt(2))
    assert first_below(x, loss, 5.0) == 1 and math.isnan(first_below(x, loss, 0.5))
    assert first_below(x, [3.0, 2.0, 2.5], 2.0) == 2


@pytest.mark.parametrize(
    ("place", "count", "kept"),
    [(0, 3, [0, 1, 2]), (3, 3, [2, 3, 4]), (6, 3, [4, 5, 6]), (4, 9, [0, 1, 2, 3, 4, 5, 6])],
)
def test_around_a_place_lie_so_many_at_the_ends_too(place, count, kept):
    assert list(range(7))[around(place, count, 7)] == kept
