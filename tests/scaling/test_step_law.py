import csv

import numpy as np
import pytest

from lablib.exercises import step_law as exercises
from lablib.paths import data_dir
from lablib.scaling import laws, step_law

PRINTED = step_law.published()
N, D = np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5)


def test_every_published_value_says_where_it_is_printed():
    with (data_dir() / "published" / "step-law.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PRINTED) and all(row["source"] for row in rows)
    with pytest.raises(TypeError):
        PRINTED["lr_D"] = 1.0


def test_laws_have_the_printed_constants():
    at = PRINTED
    made = {name: law(N, D) for name, law in step_law.LAWS.items()}
    said = laws.hyperparameter({"c": at["lr_c"], "a": at["lr_N"], "b": at["lr_D"]}, N=N, D=D)
    np.testing.assert_allclose(made["Step Law"].lr, said, rtol=1e-12)
    np.testing.assert_allclose(made["Step Law"].batch, at["B_c"] * D ** at["B_D"])
    C = 6 * N * D
    np.testing.assert_allclose(made["DeepSeek"].lr, at["deepseek_lr_c"] * C ** at["deepseek_lr_C"])
    np.testing.assert_allclose(made["DeepSeek"].batch, at["deepseek_B_c"] * C ** at["deepseek_B_C"])
    np.testing.assert_allclose(made["Porian"].lr, at["porian_lr_c"] * N ** at["porian_lr_N"])
    np.testing.assert_allclose(made["Porian"].batch, at["porian_B_c"] * N ** at["porian_B_N"])
    said = at["openai_lr"] + at["openai_slope"] * np.log(N)
    np.testing.assert_allclose(made["OpenAI"].lr, said)
    said = at["microsoft_c"] * (N / 1e9) ** at["microsoft_N"] * (D / 1e9) ** at["microsoft_D"]
    np.testing.assert_allclose(made["Microsoft"].lr, said)
    assert made["OpenAI"].batch is None is made["Microsoft"].batch


def test_a_known_model_gets_the_size_of_rate_that_such_models_have():
    rates = [float(law(1e9, 1e11).lr) for law in step_law.LAWS.values()]
    assert all(1e-4 < rate < 4e-3 for rate in rates)
    batches = [law(1e9, 1e11).batch for law in step_law.LAWS.values()]
    assert all(5e5 < batch < 5e6 for batch in batches if batch is not None)


def cell(n, tokens, rate, batch, width=0.1, tilt=0.02, floor=2.0):
    """Runs on an exact bowl."""
    hessian = np.array([[width, tilt], [tilt, 0.05]])
    made = []
    for lr in rate * 1.3 * 2.2 ** np.arange(-1.0, 2):
        for size in 2.0 ** np.arange(6, 12):
            x = np.log([lr / rate, size / batch])
            loss = floor + x @ hessian @ x / 2
            made.append({"N": n, "tokens": tokens, "lr": lr, "batch": size, "loss": loss})
    return made, hessian


def test_a_surface_is_the_bowl_that_made_the_runs():
    runs, hessian = cell(1e4, 1e6, 0.01, 300.0)
    surface = step_law.quadratic_surface(runs)
    best = surface.best()
    assert (best.lr, best.batch) == (pytest.approx(0.01), pytest.approx(300.0))
    np.testing.assert_allclose(surface.hessian, hessian, atol=1e-9)
    np.testing.assert_allclose(surface.eigenvalues, np.linalg.eigvalsh(hessian), atol=1e-9)
    said = [float(surface.loss(run["lr"], run["batch"])) for run in runs]
    np.testing.assert_allclose(said, [run["loss"] for run in runs])
    grid = surface.loss(np.array([[0.01], [0.02]]), np.array([100.0, 300.0, 900.0]))
    assert grid.shape == (2, 3) and grid[0, 1] == pytest.approx(2.0)


def test_a_surface_is_numpys_least_squares_of_noisy_runs():
    runs, _ = cell(1e4, 1e6, 0.01, 300.0)
    random = np.random.default_rng(0)
    runs = [run | {"loss": run["loss"] + random.normal(0, 0.05)} for run in runs]
    x, y = np.log([[run["lr"], run["batch"]] for run in runs]).T
    terms = np.column_stack([np.ones(len(x)), x, y, x**2, x * y, y**2])
    values = np.linalg.lstsq(terms, [run["loss"] for run in runs], rcond=None)[0]
    surface = step_law.quadratic_surface(runs, batches=6)
    said = [float(surface.loss(run["lr"], run["batch"])) for run in runs]
    np.testing.assert_allclose(said, terms @ values, atol=1e-10)
    *_, aa, ab, bb = values
    np.testing.assert_allclose(surface.hessian, [[2 * aa, ab], [ab, 2 * bb]], atol=1e-8)


@pytest.mark.parametrize(
    ("place", "kept"), [(300.0, (64, 1024)), (60.0, (64, 1024)), (9e3, (256, 4096))]
)
def test_a_surface_is_laid_through_the_five_batches_nearest_the_best(place, kept):
    runs, _ = cell(1e4, 1e6, 0.01, place)
    runs += [
        run | {"batch": 4096, "loss": run["loss"] + 0.3} for run in runs if run["batch"] == 2048
    ]
    if place > 4096:
        runs = [run | {"loss": run["loss"] - (run["batch"] == 4096)} for run in runs]
    surface = step_law.quadratic_surface(runs)
    assert np.exp([surface.low[1], surface.high[1]]) == pytest.approx(kept)
    far = [run["batch"] < kept[0] or run["batch"] > kept[1] for run in runs]
    worse = [run | {"loss": run["loss"] + 9 * off} for run, off in zip(runs, far)]
    np.testing.assert_array_equal(step_law.quadratic_surface(worse).hessian, surface.hessian)
    every = step_law.quadratic_surface(runs, batches=9)
    assert np.exp(every.high[1]) == pytest.approx(4096) and not np.allclose(
        every.hessian, surface.hessian
    )


@pytest.mark.parametrize(
    "place", [(0.01, 300.0), (0.01, 20.0), (0.9, 300.0), (1e-4, 9e3), (0.01, 3e4)]
)
@pytest.mark.parametrize("width", [0.1, -0.02])
def test_the_lowest_point_is_that_of_a_fine_grid_over_what_was_tried(place, width):
    runs, _ = cell(1e4, 1e6, 0.01, 300.0)
    tried = np.log([[run["lr"], run["batch"]] for run in runs])
    hessian = np.array([[width, 0.02], [0.02, 0.05]])
    off = tried - np.log(place)
    runs = [run | {"loss": 2 + x @ hessian @ x / 2} for run, x in zip(runs, off)]
    surface = step_law.quadratic_surface(runs, batches=6)
    lowest = surface.lowest()
    ends = [np.exp(np.linspace(a, z, 401)) for a, z in zip(surface.low, surface.high)]
    least = surface.loss(ends[0][:, None], ends[1]).min()
    assert float(surface.loss(*lowest)) == pytest.approx(least, abs=1e-4)
    assert surface.inside(lowest) == pytest.approx(lowest), "it lies within what was tried"
    choices = [step_law.Choice(lr, batch) for lr in ends[0][::80] for batch in ends[1][::80]]
    assert min(step_law.regret(choice, surface) for choice in choices) > -1e-12


def test_a_saddle_has_no_bottom_and_too_few_runs_no_surface():
    runs, _ = cell(1e4, 1e6, 0.01, 300.0, width=-0.1)
    surface = step_law.quadratic_surface(runs)
    assert surface.eigenvalues[0] < 0
    with pytest.raises(ValueError, match="no bottom"):
        surface.best()
    with pytest.raises(ValueError, match="3 rates and 3 batches"):
        step_law.quadratic_surface([run for run in runs if run["batch"] == 64])


def test_regret_is_the_share_above_the_least_and_never_looks_beyond_what_was_tried():
    runs, hessian = cell(1e4, 1e6, 0.01, 300.0)
    surface = step_law.quadratic_surface(runs)
    assert step_law.regret(surface.best(), surface) == pytest.approx(0, abs=1e-12)
    off = step_law.regret(step_law.Choice(0.02, 300.0), surface)
    assert off == pytest.approx(hessian[0, 0] * np.log(2) ** 2 / 2 / 2.0)
    far, edge = (step_law.Choice(lr, 300.0) for lr in (99.0, max(run["lr"] for run in runs)))
    assert step_law.regret(far, surface) == pytest.approx(step_law.regret(edge, surface))


def test_the_plateau_is_as_large_as_points_counted_on_it():
    runs, _ = cell(1e4, 1e6, 0.01, 300.0)
    surface = step_law.quadratic_surface(runs)
    best = surface.best()
    x = np.linspace(-1.5, 1.5, 1501)
    losses = surface.loss(best.lr * np.exp(x[:, None]), best.batch * np.exp(x))
    for within in (0.001, 0.0025):
        counted = (losses <= (1 + within) * losses.min()).mean() * 9
        assert step_law.plateau(surface, within) == pytest.approx(counted, rel=0.01)


def law_runs(a=-0.6, b=0.2, e=0.5):
    runs = []
    for n in (1e4, 5e4, 2e5):
        for tokens in (1e5, 1e6, 1e7):
            rate, batch = 2.0 * n**a * tokens**b, 0.8 * tokens**e
            for off, loss in ((1.0, 2.0), (0.5, 2.01), (3.0, 2.4)):
                row = {"N": n, "tokens": tokens, "lr": rate * off, "batch": batch * off}
                runs.append(row | {"loss": loss + n * 1e-6})
    return runs


def test_near_optimal_runs_are_those_within_a_share_of_their_own_cells_best():
    runs = law_runs()
    assert len(step_law.near_optimal(runs, 0.0)) == 9
    assert len(step_law.near_optimal(runs, 0.0055)) == 18
    assert len(step_law.near_optimal(runs, 1.0)) == 27
    assert all(run["loss"] < 2.3 for run in step_law.near_optimal(runs))


def test_a_fitted_law_has_the_exponents_that_made_the_runs():
    best = step_law.near_optimal(law_runs(), 0.0)
    made = step_law.fit_law(best)
    assert (made.lr["N"], made.lr["D"]) == (pytest.approx(-0.6), pytest.approx(0.2))
    assert made.batch["D"] == pytest.approx(0.5)
    choice = made(3e4, 4e6)
    assert choice.lr == pytest.approx(2.0 * 3e4**-0.6 * 4e6**0.2)
    assert choice.batch == pytest.approx(0.8 * 4e6**0.5)
    same = step_law.fit_law(best, lr=(), batch=())
    assert same(1, 1) == same(1e9, 1e9)
    assert same(1, 1).lr == pytest.approx(np.exp(np.mean(np.log([r["lr"] for r in best]))))
    by_compute = step_law.fit_law(best, lr=("C",), batch=("C",))
    assert by_compute(1e4, 4e6).lr == pytest.approx(by_compute(4e4, 1e6).lr)
    with pytest.raises(ValueError, match="can't tell"):
        step_law.fit_law(best, lr=("N", "D", "C"))


def test_the_bootstrap_varies_and_repeats():
    runs = step_law.near_optimal(law_runs(), 0.01)
    draws = step_law.bootstrap(runs, n=40)
    slopes = [draw.lr["D"] for draw in draws]
    assert np.std(slopes) > 0 and abs(np.mean(slopes) - 0.2) < 0.1
    assert slopes == [draw.lr["D"] for draw in step_law.bootstrap(runs, n=40)]


def test_along_20_tokens_a_parameter_the_rate_falls_and_the_batch_grows():
    rate, batch = step_law.along(np.geomspace(1e18, 1e24, 7))
    assert rate == pytest.approx((PRINTED["lr_N"] + PRINTED["lr_D"]) / 2)
    assert batch == pytest.approx(PRINTED["B_D"] / 2)


def no_constant(N, D, lr):
    return tuple(np.linalg.lstsq(np.log(np.column_stack([N, D])), np.log(lr), rcond=None)[0])


def one_by_one(N, D, lr):
    return tuple(float(np.polyfit(np.log(x), np.log(lr), 1)[0]) for x in (N, D))


def turned(N, D, lr):
    return exercises._rate_exponents(D, N, lr)


def no_loss(hessian, least, within):
    return exercises._plateau_area(hessian, 1.0, within)


def no_root(hessian, least, within):
    return 2 * np.pi * within * least / np.linalg.det(hessian)


def diagonal(hessian, least, within):
    return exercises._plateau_area(np.diag(np.diag(hessian)), least, within)


def plain_mean(lr, loss, width):
    weight = np.exp(-(loss / loss.min() - 1) / width)
    return (weight * lr).sum() / weight.sum()


def best_alone(lr, loss, width):
    return lr[loss.argmin()]


def nats(lr, loss, width):
    weight = np.exp(-(loss - loss.min()) / width)
    return np.exp((weight * np.log(lr)).sum() / weight.sum())


WRONG = {
    "rate_exponents": [no_constant, one_by_one, turned],
    "plateau_area": [no_loss, no_root, diagonal],
    "weighted_rate": [plain_mean, best_alone, nats],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_rows_within_a_surface_and_by_how_much_it_misses_them():
    from lablib.studies import step_law as study

    runs = [run | {"seed": seed} for seed in (0, 1) for run in cell(1e4, 1e6, 0.01, 300.0)[0]]
    bent = [run | {"loss": run["loss"] + 0.2 * (run["batch"] == 2048)} for run in runs]
    surface = step_law.quadratic_surface(bent)
    near = study.within(bent, surface)
    assert sorted({run["batch"] for run in near}) == [64, 128, 256, 512, 1024]
    assert study.misses(bent, 5) < 1e-9 < 0.01 < study.misses(bent, 6) < 0.1
    higher = [run | {"loss": run["loss"] + run["seed"]} for run in runs]
    means = study.averaged(higher)
    assert len(means) == len(runs) / 2
    at = runs[0]["lr"], runs[0]["batch"]
    assert means[at] == pytest.approx(runs[0]["loss"] + 0.5)


def test_the_laws_were_read_off_the_grid_that_is_stored():
    from lablib.evidence.studies import matching
    from lablib.evidence.studies import study as find

    runs = find("step-law").runs()
    fits = matching(runs, kind="laws")
    assert len(fits) == 5
    for row in fits:
        total = sum(r["loss"] for r in matching(runs, part="batch-rate", seed=row["seed"]))
        assert row["sum"] == pytest.approx(total), "`python -m lablib study step-law`"
