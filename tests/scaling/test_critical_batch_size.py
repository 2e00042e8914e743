"""Critical batch size: the closed form, the published law, gradient noise, and exact SGD."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from lablib.exercises import critical_batch_size as exercises
from lablib.scaling import critical_batch_size as cbs
from lablib.studies import critical_batch_size as study
from lablib.studies import scaling_grid as grid


@pytest.mark.parametrize("overhead", [0.05, 0.2, 0.5])
def test_the_closed_form_is_the_root_of_the_definition(overhead):
    a, b, optimal = 1300.0, 2.8e6, 256.0

    def more(batch):
        data = (cbs.steps_of(size, a, b) * size for size in (batch, optimal))
        return math.log(next(data)) - math.log(next(data)) - math.log(1 + overhead)

    root = brentq(more, optimal, 1e6, xtol=1e-9, rtol=1e-14)
    assert cbs.critical_batch(a, b, optimal, overhead) == pytest.approx(root, rel=1e-10)
    assert cbs.critical_batch(a, b, optimal) == pytest.approx(b / (5 * a) + 1.2 * optimal)
    with pytest.raises(ValueError, match="above 0"):
        cbs.critical_batch(0.0, b, optimal)


def test_steps_give_their_law_again():
    batches = 64 * 2.0 ** np.arange(8)
    found = cbs.fit_steps(batches, cbs.steps_of(batches, 700.0, 5e6), 256)
    assert (found.a, found.b) == (pytest.approx(700), pytest.approx(5e6))
    assert found.critical(0.1) == pytest.approx(1.1 * 256 + 500e3 / 700)
    with pytest.raises(ValueError, match="three different batches"):
        cbs.fit_steps([64, 128, 128], [3, 2, 2], 64)


def test_the_published_counts_give_the_printed_law():
    sizes, critical = cbs.published_critical()
    law = cbs.critical_law(sizes, critical)
    assert sizes.tolist() == [85, 151, 302, 604, 1200]
    assert law.exponent == pytest.approx(0.47, rel=0.01)
    assert law.coefficient == pytest.approx(93.20, rel=0.01)
    assert study.coefficient(tokens=20) == pytest.approx(22.91, rel=0.01)
    assert sum(map(len, cbs.published().values())) == 45


def test_overhead_moves_the_batch_and_its_exponent():
    made = {o: cbs.published_critical(o) for o in (0.05, 0.5)}
    assert (made[0.5][1] > 1.8 * made[0.05][1]).all()
    exponents = [cbs.critical_law(*made[o]).exponent for o in made]
    assert 0.25 < exponents[0] < exponents[1] < 0.6, "1.05 B_opt does not grow: it is a floor"


def test_the_noise_scale_is_gns_pytorchs():
    gns = pytest.importorskip("gns_pytorch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    random.seed(0)
    theirs = gns.compute_gns(losses, model, param_percentage=1.0, batch_percentage=1.0)

    def loss(model, row):
        return torch.nn.functional.cross_entropy(model(x[row]), y[row])

    norms = cbs.squared_norms(model, loss, list(torch.arange(16).split(1)))
    assert cbs.noise_scale(*norms, 1, 16) == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(ValueError, match="two sizes"):
        cbs.noise_scale(*norms, 4, 4)


def test_noise_scale_of_gradients_of_known_noise():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(50))
    model = torch.nn.ParameterList([weight])
    rows = list((torch.randn(4000, 50) * 3 + 2).split(1))
    norms = cbs.squared_norms(model, lambda m, row: (m[0] * row[0]).sum(), rows)
    assert cbs.noise_scale(*norms, 1, 4000) == pytest.approx(9 / 4, rel=0.05)


def test_squared_norms_are_those_of_each_gradient_and_of_their_mean():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    model[0].requires_grad_(False)
    rows = list(torch.randn(5, 3, 4))

    def loss(model, row):
        return (model[1](model[0](row)) - row).square().mean()  # the last layer has no part in it

    used = list(model[1].parameters())
    each = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, row), used)])
        for row in rows
    ]
    small = np.mean([float(g.square().sum()) for g in each])
    large = float(torch.stack(each).mean(0).square().sum())
    loss(model, rows[0]).backward()  # what the model holds must not count
    assert cbs.squared_norms(model, loss, rows) == pytest.approx((small, large), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert cbs.squared_norms(model, loss, rows) == pytest.approx((small, large), rel=1e-5)


def test_no_hook_stays_where_a_loss_fails():
    model = torch.nn.Linear(2, 1)

    def fails(model, row):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cbs.squared_norms(model, fails, [torch.ones(2)])
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_the_recursion_is_the_mean_of_simulations(batch):
    problem = cbs.LeastSquares(dim=20)
    exact = problem.risks(0.1, batch, 40)[-1]
    made = problem.simulate(0.1, batch, 40, 2000)
    assert abs(made.mean() - exact) < 4 * made.std() / math.sqrt(len(made))
    assert problem.risks(0.1, batch, 0).tolist() == [problem.eigenvalues @ problem.target**2 / 2]


def test_more_data_makes_room_for_larger_batches():
    problem = cbs.LeastSquares(dim=60)
    critical = [problem.critical(data) for data in (128, 1024, 8192)]
    assert critical == sorted(critical) and critical[2] > 1.3 * critical[0]
    risks = [problem.best_risk(batch, 256) for batch in (1, 4, 16, 64)]
    assert risks == sorted(risks), "of one pass, the smallest batch makes the most"


def test_the_studys_table_of_a_known_law():
    made = study.run(**study.CANARY)
    assert made["late"] > made["early"] > 256 and abs(made["in_size"]) < 1e-3
    rows = study.made_up(7)
    batches, steps = study.steps_needed(rows, 32, study.target(rows, 32, study.TARGETS[0]))
    assert batches[0] == 256 and steps[0] * 256 == pytest.approx(study.TARGETS[0], rel=1e-6)
    assert (np.diff(steps) < 0).all() and (np.diff(steps * batches) > 0).all()
    never = study.steps_needed(rows, 32, 0.5)
    assert len(never[0]) == 0


def on_a_line(longer=1):
    """Rows of one seed for which every loss takes 1 + B/3000 times as much text as single rows.

    longer: how many times as much the largest batch takes.
    """
    every, rows = 64 * study.KB, []
    seen = every * np.arange(1, 97)
    for batch in (256 * 2**i for i in range(7)):
        needs = (1 + batch / 3000) * (longer if batch == 16384 else 1)
        row = {"part": "steps", "batch": batch, "tokens": every * 96, "points": 96}
        row["averaged"] = [(1 + 50 * (seen / needs) ** -0.3).tolist()]
        rows += [row | {"dim": dim, "N": 100 * dim, "loss": 1.0} for dim in study.SIZES]
    return rows


def test_small_batches_foretell_what_larger_ones_need_where_the_line_holds(monkeypatch):
    monkeypatch.setattr(study, "SIZES", study.SIZES[:2])
    monkeypatch.setattr(study, "TARGETS", study.TARGETS[:2])
    made = study.from_few(on_a_line())
    assert np.shape(made["beyond"]) == (2, 2, 2), "sizes, targets, larger batches"
    np.testing.assert_allclose(made["beyond"], 1, rtol=0.02)
    assert max(abs(made["few_in_size"]), abs(made["few_in_data"])) < 0.02
    few = [row for row in on_a_line() if row["batch"] <= study.FEW]
    line = study.fitted(few, 32, study.TARGETS[0])
    one, twice = study.beyond(on_a_line(longer=2), 32, study.TARGETS[0], line)
    assert (one, twice) == (pytest.approx(1, rel=0.02), pytest.approx(2, rel=0.02))
    never = study.beyond(on_a_line(longer=100), 32, study.TARGETS[0], line)
    assert never == [pytest.approx(1, rel=0.02), None]
    runs = [made | {"kind": "grid"}, {"kind": "grid", "beyond": [[[1.5, None], [1.5, 2.0]]] * 2}]
    more = study.beside_foretold([*runs, *on_a_line()])
    assert list(more) == [8192, 16384]
    np.testing.assert_allclose([more[8192], more[16384]], [[0, 50], [0, 100]], atol=2)


def test_of_several_rates_the_best_counts_for_each_batch_and_target():
    rates = {batch: grid.rates_to_a_loss(32, batch) for batch in (256, 512, 1024, 2048)}
    assert all(len(tried) == 3 for tried in rates.values())
    flat = [row for row in on_a_line() if row["dim"] == 32 and row["batch"] in rates]
    rows = [
        row | {"lr": lr, "averaged": [[loss + off for loss in row["averaged"][0]]]}
        for row in flat
        for lr, off in zip(rates[row["batch"]], late(row["batch"]))
    ]
    seen = study.TARGETS[0]
    assert study.best_rates(rows, 32, seen) == [0, 1, 2, 1]
    best, one = (study.steps_needed(r, 32, study.target(flat, 32, seen)) for r in (rows, flat))
    np.testing.assert_allclose(best, one, rtol=1e-6)
    assert [row["lr"] for row in study.tuned(rows)] == [tried[1] for tried in rates.values()]
    few = study.steps_needed(study.tuned(rows), 32, study.target(flat, 32, seen))
    more = few[1] / one[1]
    assert more[0] > 1.01 and more[2] > 1.01, "there the tuned rate is not the best"
    np.testing.assert_allclose(more[[1, 3]], 1, rtol=1e-6)


def late(batch):
    """What is added to the losses of three rates: nothing to the best of a batch."""
    best = {256: 0, 1024: 2}.get(batch, 1)
    return [0.05 * abs(at - best) for at in range(3)]


def test_a_batch_that_never_reaches_a_target_has_no_best_rate():
    rows = [row | {"lr": lr} for row in on_a_line(longer=100) for lr in (1, 2, 3)]
    assert len(study.best_rates(rows, 32, study.TARGETS[0])) == 6, "of seven batches"
    alone = [row for row in rows if row["lr"] == 2]
    assert study.best_rates(alone, 32, study.TARGETS[0]) == [], "one rate has no place"


def test_the_published_exponent_when_counts_are_drawn_again():
    drawn = [study.redrawn(np.random.default_rng(seed)) for seed in range(40)]
    low, middle, high = np.quantile(drawn, [0.1, 0.5, 0.9])
    assert 0.37 < low < 0.44 < middle < 0.47 < high < 0.52


def test_the_exponent_in_size_is_a_slope_over_all_sizes():
    flat, steep = study.made_up(7), study.made_up(7, by_size=0.3)
    largest = [row if row["dim"] < 64 else other for row, other in zip(flat, steep, strict=True)]
    slopes = [study.exponents(rows)["in_size"] for rows in (flat, largest, steep)]
    assert abs(slopes[0]) < 1e-3 and slopes[0] + 0.05 < slopes[1] < slopes[2] < 0.3
    sizes, seen = np.array([1e4, 5e4, 2e5]), np.array(study.TARGETS)
    exact = 3 * sizes[:, None] ** 0.2 * seen**0.4
    assert study.slopes(exact, sizes) == pytest.approx((0.4, 0.2))
    assert study.slopes(exact[:2], sizes[:2]) == pytest.approx((0.4, 0.2))


def from_zero(a, b, optimal, overhead):
    return overhead * b / a


def a_fifth(a, b, optimal, overhead):
    return cbs.critical_batch(a, b, optimal)


def one_norm(small, large, b_small, b_large):
    return small / large


def upside_down(small, large, b_small, b_large):
    return 1 / cbs.noise_scale(small, large, b_small, b_large)


def no_root(a, b, wait, token):
    return wait * b / (token * a)


def prices_exchanged(a, b, wait, token):
    return exercises._cheapest(a, b, token, wait)


WRONG = {
    "critical": [from_zero, a_fifth],
    "noise": [one_norm, upside_down],
    "cheapest": [no_root, prices_exchanged],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_last_weights_an_average_and_a_cosine_stand_side_by_side():
    from lablib.evidence.studies import study as find
    from lablib.studies import critical_batch_size as study

    losses = study.at_the_end(find("critical-batch-size").runs(), dim=64)
    assert losses.shape == (5, 3)
    assert (losses[:, 1] < losses[:, 0]).all(), "at a constant rate averaged weights are better"
