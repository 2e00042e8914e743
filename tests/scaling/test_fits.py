import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress

from lablib.scaling.fits import fit_power_law


@given(st.floats(-2, -0.1), st.floats(0.1, 5))
def test_a_power_law_is_found_again(exponent, coefficient):
    n = np.array([1, 2, 5, 10, 100])
    law = fit_power_law(n, coefficient * n**exponent)
    assert law.exponent == pytest.approx(exponent)
    assert law(n) == pytest.approx(coefficient * n**exponent)


def test_noisy_points_give_the_line_of_scipy_on_logarithms():
    random = np.random.default_rng(0)
    n = 2.0 ** np.arange(12)
    values = 3 * n**-0.4 * np.exp(0.2 * random.normal(size=12))
    law, line = fit_power_law(n, values), linregress(np.log(n), np.log(values))
    assert law.exponent == pytest.approx(line.slope)
    assert law.coefficient == pytest.approx(np.exp(line.intercept))


@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_power_law_needs_positive_finite_numbers(values):
    with pytest.raises(ValueError, match="positive finite numbers"):
        fit_power_law(np.array([1, 2]), np.array(values))


def test_a_power_law_needs_two_places_and_one_value_for_each():
    with pytest.raises(ValueError, match="two different n"):
        fit_power_law(np.array([2, 2]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="one value for each n"):
        fit_power_law(np.array([1, 2]), np.array([1.0]))
