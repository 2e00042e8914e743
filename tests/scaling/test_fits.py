import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress

from lablib.scaling.fits import (
    JointLaw,
    PowerLaw,
    SumLaw,
    bootstrap,
    fit_joint_law,
    fit_power_law,
    fit_saturating_law,
    fit_sum_law,
    huber_fit,
)


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


A, B = (axis.ravel() for axis in np.meshgrid([1e2, 4e2, 2e3, 9e3], [1e2, 3e2, 1e3, 5e3]))
LAWS = [
    JointLaw(5.0, 0.1, 0.3, 0.02, 1.0),
    JointLaw(16.3, 0.043, 0.085, 7.98e-4, 0.165),
    JointLaw(3.0, 0.05, 0.2, -0.01, 2.0),
]


@pytest.mark.parametrize("law", LAWS)
def test_a_joint_law_is_found_again(law):
    made = fit_joint_law(A, B, law(A, B))
    for name in ("coefficient", "alpha", "beta", "interaction", "floor"):
        assert getattr(made, name) == pytest.approx(getattr(law, name), rel=1e-2, abs=1e-5)
    given_floor = fit_joint_law(A, B, law(A, B), floor=law.floor)
    assert given_floor.interaction == pytest.approx(law.interaction, rel=1e-4)


def test_a_law_without_the_term_misses_what_has_it_and_finds_what_has_not():
    with_term, without = LAWS[0](A, B), JointLaw(5.0, 0.1, 0.3, 0.0, 1.0)(A, B)
    miss = fit_joint_law(A, B, with_term, interaction=False)
    assert miss.interaction == 0 and np.abs(miss(A, B) / with_term - 1).max() > 0.01
    plain = fit_joint_law(A, B, without, interaction=False)
    assert plain(A, B) == pytest.approx(without, rel=1e-5)
    assert fit_joint_law(A, B, without).interaction == pytest.approx(0, abs=1e-4)


def test_the_exponent_falls_with_the_other_quantity_as_the_law_says():
    law = LAWS[0]
    for a in (10.0, 1e4):
        far = law(a, 1e3) - law.floor, law(a, 2e3) - law.floor
        assert np.log2(far[0] / far[1]) == pytest.approx(law.exponent(a))
    assert law.exponent(10.0) > law.exponent(1e4)


def test_a_sum_of_two_laws_is_found_again():
    law = SumLaw(PowerLaw(6.0, -0.4), PowerLaw(3.0, -0.2), 1.0)
    made = fit_sum_law(A, B, law(A, B))
    assert made(A, B) == pytest.approx(law(A, B), rel=1e-4)
    assert made(1e5, 1e5) == pytest.approx(law(1e5, 1e5), rel=0.03)


def test_a_saturating_law_is_found_again():
    n = np.array([100, 200, 400, 800, 1600])
    law = fit_saturating_law(n, 9 * n**-0.5 + 2)
    assert (law.exponent, law.floor) == pytest.approx((-0.5, 2), rel=1e-3)
    law = fit_saturating_law(n[:2], 9 * n[:2] ** -0.5 + 2, floor=2.0)
    assert law(3200) == pytest.approx(9 * 3200**-0.5 + 2)


def test_an_outlier_pulls_less_than_in_least_squares():
    n = 2.0 ** np.arange(4, 14)
    values = 9 * n**-0.5 + 2
    values[1] *= 1.4
    law = fit_saturating_law(n, values, floor=2.0)
    assert law.exponent == pytest.approx(-0.5, abs=2e-3)
    assert abs(fit_power_law(n, values - 2).exponent + 0.5) > 0.02


def test_huber_takes_the_best_of_its_starts():
    def waves(theta):
        return np.exp(np.sin(3 * theta) + theta**2 / 10)

    best = huber_fit(waves, [np.array([2.0]), np.array([-0.5]), np.array([4.0])], np.array([0.37]))
    assert waves(best) == pytest.approx(0.378, abs=1e-3)  # the others end at 0.47 and above


def test_a_bootstrap_draws_whole_groups_and_covers_the_truth():
    random = np.random.default_rng(0)
    groups = [LAWS[0](A, B) * np.exp(0.01 * random.normal(size=len(A))) for _ in range(6)]

    def fit(drawn):
        values = np.concatenate(drawn)
        return fit_joint_law(np.tile(A, 6), np.tile(B, 6), values, floor=1.0).interaction

    low, high = np.quantile(bootstrap(fit, groups, 30), [0.01, 0.99])
    assert low < LAWS[0].interaction < high and high - low < 0.01
    seen = bootstrap(lambda drawn: sorted(drawn), [1, 2, 3], 50)
    assert all(set(draw) <= {1, 2, 3} and len(draw) == 3 for draw in seen) and [1, 1, 2] in seen
    with pytest.raises(ValueError, match="fewer than two"):
        bootstrap(fit, groups[:1])


def test_laws_of_two_quantities_refuse_what_does_not_determine_them():
    law = LAWS[0]
    with pytest.raises(ValueError, match="3 points do not determine a law of 5"):
        fit_joint_law(A[:3], B[:3], law(A, B)[:3])
    with pytest.raises(ValueError, match="do not determine"):
        fit_joint_law(np.full(16, 7.0), B, law(A, B))
    with pytest.raises(ValueError, match="do not determine"):
        fit_sum_law(A[:5], B[:5], law(A, B)[:5])
    with pytest.raises(ValueError, match="not below the least value"):
        fit_joint_law(A, B, law(A, B), floor=50.0)
    with pytest.raises(ValueError, match="three different n"):
        fit_saturating_law(np.array([1, 2]), np.array([2.0, 1.0]))
