import json
import time

import numpy as np
import pytest
import record_peers
from scipy.optimize import curve_fit

from lablib.paths import PACKAGE
from lablib.scaling import inference, laws
from lablib.scaling.inference import bootstrap, compare, fit, holdout, profile, table

TRUE = {"E": 0.9, "A": 30.0, "B": 300.0, "alpha": 0.4, "beta": 0.45}


@pytest.fixture(scope="module")
def runs():
    """300 runs of a Hoffmann law, with the noise of seeds."""
    random = np.random.default_rng(0)
    n, d = np.exp(random.uniform(np.log(3e3), np.log(1e6), (2, 300)))
    d *= 30
    loss = laws.hoffmann(TRUE, N=n, D=d) * np.exp(random.normal(0, 0.005, 300))
    return {"N": n, "D": d, "C": 6 * n * d, "loss": loss}


@pytest.fixture(scope="module")
def squares(runs):
    return fit(laws.hoffmann, runs, "loss", loss="squares")


def test_least_squares_is_scipys(runs, squares):
    def predict(x, E, A, B, alpha, beta):
        return E + A / x[0] ** alpha + B / x[1] ** beta

    exact = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    start = list(TRUE.values())
    found, _ = curve_fit(
        predict, (runs["N"], runs["D"]), runs["loss"], p0=start, maxfev=10**5, **exact
    )
    assert list(squares.values.values()) == pytest.approx(found, rel=1e-6)


def test_exact_points_give_the_law_again_and_starts_agree():
    n, d = np.meshgrid(np.logspace(3, 6, 5), np.logspace(5, 7, 5))
    rows = {"N": n.ravel(), "D": d.ravel()}
    rows["loss"] = laws.hoffmann(TRUE, **rows)
    found = fit(laws.hoffmann, rows, "loss")
    assert found.values == pytest.approx(TRUE, rel=1e-5)
    assert found.objective < 1e-12 and not found.warning
    assert np.abs(found.residuals).max() < 1e-6


def test_huber_pays_less_for_outliers_and_several_starts_find_one_optimum(runs):
    spoiled = runs | {"loss": runs["loss"] * np.where(np.arange(300) % 30 == 0, 1.2, 1.0)}
    robust = fit(laws.hoffmann, spoiled, "loss")
    plain = fit(laws.hoffmann, spoiled, "loss", loss="log-squares")
    assert robust.agreeing > 1 and robust.tried >= robust.agreeing
    off = [abs(one.values["E"] - TRUE["E"]) for one in (robust, plain)]
    assert off[0] < off[1]


def test_the_optimum_is_exact(runs):
    found = fit(laws.hoffmann, runs, "loss")
    again = found.again()
    assert again.objective == pytest.approx(found.objective, rel=1e-12)
    for name in found.values:
        for factor in (0.999, 1.001):
            moved = fit(laws.hoffmann, runs, "loss", fixed={name: found.values[name] * factor})
            assert moved.objective > found.objective


def test_two_hundred_draws_take_less_than_ten_seconds(runs):
    """On a core that takes 1,850 gradients a second, as a quiet one did; others are compared."""
    found, shares = fit(laws.hoffmann, runs, "loss"), []
    objective = inference._Objective(
        laws.hoffmann, found.table, "loss", "log-huber", 1e-3, {}, None
    )
    (theta,) = objective.begin([found.values])
    for _ in range(3):  # in turns, since other work slows a processor
        start = time.process_time()
        for _ in range(370):
            objective.with_gradient(theta)
        middle = time.process_time()
        bootstrap(found, 20)
        shares.append((time.process_time() - middle) / (middle - start))
    assert 10 * 370 / 1850 * min(shares) < 10


def test_draws_hold_what_made_the_runs(runs):
    draws = bootstrap(fit(laws.hoffmann, runs, "loss"), 60)
    low, high = draws.interval("alpha")
    assert low < TRUE["alpha"] < high and high - low < 0.1
    ratio = draws.interval(lambda values: values["beta"] / (values["alpha"] + values["beta"]))
    assert 0 < ratio[0] < 0.45 / 0.85 < ratio[1] < 1


def test_draws_of_groups_are_wider_when_groups_differ(runs):
    group = np.arange(300) % 5
    shifted = runs | {"loss": runs["loss"] * np.exp(0.03 * (group - 2))}
    found = fit(laws.hoffmann, shifted, "loss", loss="log-squares")

    def middle(values):
        return laws.hoffmann(values, N=5e4, D=1.5e6)

    widths = [
        np.subtract(*bootstrap(found, 40, group=g).interval(middle)[::-1]) for g in (None, group)
    ]
    assert widths[1] > 2 * widths[0]
    with pytest.raises(ValueError, match="fewer than two groups"):
        bootstrap(found, 5, group=np.zeros(300))


def test_profile_intervals_are_minos():
    peer = json.loads((PACKAGE / "scaling" / "peers.json").read_text("utf-8"))["minos"]
    rows = {"x": np.array(peer["x"]), "loss": np.array(peer["y"])}
    found = fit(laws.power_plus, rows, "loss", loss="squares")
    for name, (low, high) in peer["intervals"].items():
        best, width = found.values[name], high - low
        assert best == pytest.approx(peer["values"][name], rel=1e-3)
        values = np.linspace(max(best - 2 * width, best / 20), best + 2 * width, 9)
        made = profile(found, name, values).interval(peer["noise"])
        assert made == pytest.approx((low, high), abs=0.01 * width)
    narrow = profile(found, "b", [found.values["b"]])
    assert narrow.interval(peer["noise"]) == (-np.inf, np.inf)


def test_the_recorded_intervals_are_minos():
    pytest.importorskip("iminuit")
    peer = json.loads((PACKAGE / "scaling" / "peers.json").read_text("utf-8"))["minos"]
    again = record_peers.minos(np.array(peer["x"]), np.array(peer["y"]), peer["noise"])
    assert again["values"] == pytest.approx(peer["values"], rel=1e-5)
    for name, ends in again["intervals"].items():
        assert ends == pytest.approx(peer["intervals"][name], rel=1e-4)
    x, y = record_peers.noisy()
    assert x == pytest.approx(peer["x"]) and y == pytest.approx(peer["y"], abs=1e-12)


def test_holding_out_the_largest_runs(runs):
    held = holdout(laws.hoffmann, runs, "loss", largest="C", n=20)
    assert len(held.errors) == 20 and held.error < 0.02
    assert held.fit.table["N"].shape == (280,)
    rows = compare([laws.hoffmann, laws.kaplan_nd], runs, "loss", largest="C", n=20, draws=8)
    assert [row["law"] for row in rows] == ["Hoffmann", "Kaplan, size and data"]
    assert rows[0]["difference"] == (0, 0) and rows[1]["error"] > rows[0]["error"]
    assert rows[1]["difference"][0] > 0
    with pytest.raises(ValueError, match="can't be left out"):
        holdout(laws.hoffmann, runs, "loss", largest="C", n=300)


def test_what_rows_do_not_tell_is_said(runs):
    one_size = {name: column[:20] for name, column in runs.items()} | {"N": np.full(20, 1e5)}
    one_size["loss"] = 1.0 + 300 / one_size["D"] ** 0.45
    found = fit(laws.hoffmann, one_size, "loss")
    assert found.agreeing > 0 and np.abs(found.residuals).max() < 1e-3


def test_bad_input_is_named(runs):
    with pytest.raises(ValueError, match="is none of log-huber"):
        fit(laws.hoffmann, runs, "loss", loss="huber")
    with pytest.raises(ValueError, match="has no parameter 'gamma'"):
        fit(laws.hoffmann, runs, "loss", fixed={"gamma": 1.0})
    with pytest.raises(ValueError, match="'loss' holds something"):
        fit(laws.hoffmann, runs | {"loss": -runs["loss"]}, "loss")
    with pytest.raises(ValueError, match="3 rows can't tell 5 parameters"):
        fit(laws.hoffmann, {name: column[:3] for name, column in runs.items()}, "loss")
    with pytest.raises(ValueError, match="of one length"):
        fit(laws.hoffmann, runs | {"N": runs["N"][:7]}, "loss")
    with pytest.raises(ValueError, match="has no parameter 'gamma'"):
        profile(fit(laws.power, {"x": [1, 2, 3], "y": [3, 2, 1]}, "y"), "gamma", [1.0])


def test_columns_of_runs():
    made = table([{"N": 3, "tokens": 5, "loss": 1.0}], N="N", D="tokens", loss="loss")
    assert {name: column.tolist() for name, column in made.items()} == {
        "N": [3.0],
        "D": [5.0],
        "loss": [1.0],
    }
