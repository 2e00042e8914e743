import csv

import numpy as np
import pytest

from lablib.exercises import batch_size_law as exercises
from lablib.paths import data_dir
from lablib.scaling import batch_size_law as law
from lablib.scaling.curves import valley

PRINTED = law.published()


def test_every_published_value_says_where_it_is_printed():
    with (data_dir() / "published" / "batch-size-law.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PRINTED) and all(row["source"] for row in rows)
    with pytest.raises(TypeError):
        PRINTED["B_D"] = 1.0


def test_printed_exponents_fit_together():
    at = PRINTED
    assert at["S_C"] + at["B_C"] == pytest.approx(at["D_C"]) == pytest.approx(1 - at["N_C"])
    assert law.printed_batch(300e9) == pytest.approx(3.47e6, rel=1e-3)


def test_recommendations_are_the_papers_own():
    from lablib.scaling.step_law import step_law

    D = np.geomspace(1e8, 1e13, 6)
    said = law.recommended(D)
    np.testing.assert_allclose(said["Li et al., 2025"], step_law(1.0, D).batch, rtol=1e-12)
    np.testing.assert_allclose(said["Shuai et al., 2024"], 3240 * D**0.264, rtol=1e-12)
    assert said["Zhang et al., 2024"][0] == pytest.approx(22.91 * 100**0.47 * 512)


def parabola(x, place=300.0, depth=2.0, width=0.05):
    return depth + width / 2 * np.log(np.asarray(x) / place) ** 2


def test_the_bottom_of_a_parabola_is_found_from_any_points_in_any_order():
    x = 2.0 ** np.random.default_rng(0).permutation(np.arange(6, 13))
    for points in (3, 4, 5, 7):
        found = law.bottom(x, parabola(x), points)
        assert found.inside and found.x == pytest.approx(300)
        assert (found.loss, found.curvature) == pytest.approx((2.0, 0.05))
    assert found.x == pytest.approx(valley(x, parabola(x)).x)


def test_noise_moves_the_bottom_less_than_a_parabola_through_three():
    random, x = np.random.default_rng(1), 2.0 ** np.arange(6, 13)
    noisy = [parabola(x) + random.normal(0, 0.004, len(x)) for _ in range(200)]
    spread = [np.std([np.log(law.bottom(x, y, n).x) for y in noisy]) for n in (3, 5)]
    assert spread[1] < 0.8 * spread[0]


def test_a_bottom_beyond_the_range_is_its_end_and_says_so():
    x = np.array([512.0, 1024.0, 2048.0, 4096.0])
    low = law.bottom(x, parabola(x))
    assert (low.x, low.inside) == (pytest.approx(512), False) and low.loss == parabola(512.0)
    high = law.bottom(x / 64, parabola(x / 64))
    assert (high.x, high.inside) == (pytest.approx(64), False)
    ridge = law.bottom(x, -parabola(x))
    assert not ridge.inside and ridge.x == pytest.approx(4096)
    for wrong in ([1, 2], [1, 2, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="3 or more different"):
            law.bottom(wrong, [1.0] * len(wrong))


BATCHES = 2.0 ** np.arange(6, 12)


def made(batches=BATCHES, N=1e4, D=2.0**17, gamma=0.4, place=200.0):
    """Runs whose best batch is `place`, at the rate 0.01 (B/256)^gamma."""
    runs = []
    for batch in batches:
        best = law.rate_for(batch, gamma, 256, 0.01)
        for lr in 0.011 * (batch / 256) ** 0.3 * np.array([1 / 2.2, 1, 2.2]):
            loss = parabola(batch, place) + 0.1 * np.log(lr / best) ** 2
            runs.append({"N": N, "tokens": D, "batch": batch, "lr": lr, "loss": loss})
    return runs


def test_the_rate_is_tuned_for_each_batch_before_batches_are_compared():
    runs = made()
    rows = law.tuned(runs)
    np.testing.assert_allclose(rows.loss, parabola(rows.batch, 200), rtol=1e-9)
    np.testing.assert_allclose(rows.lr, law.rate_for(rows.batch, 0.4, 256, 0.01), rtol=1e-6)
    (one,) = law.optimal_batch(runs)
    assert one.batch == pytest.approx(200) and one.inside
    assert one.steps == pytest.approx(2**17 / 200) and one.compute == 6 * 1e4 * 2**17
    falling = [run | {"loss": 2 - run["lr"]} for run in runs]
    highest = [max(r["lr"] for r in runs if r["batch"] == batch) for batch in rows.batch]
    assert law.tuned(falling).lr.tolist() == highest, "never beyond what was tried"


def test_gamma_is_that_of_the_rows_also_where_each_batch_has_other_losses():
    random = np.random.default_rng(2)
    for gamma in (0.0, 0.5, 1.0):
        floors = dict(zip(2.0 ** np.arange(6, 12), random.uniform(0, 1, 6)))
        runs = [r | {"loss": r["loss"] + floors[r["batch"]]} for r in made(gamma=gamma)]
        assert law.fit_gamma(runs) == pytest.approx(gamma, abs=1e-8)
    with pytest.raises(ValueError, match="no valley over the learning rate"):
        law.fit_gamma([r | {"loss": -r["loss"]} for r in made()])


def test_gamma_of_a_part_of_the_batches():
    from lablib.studies import batch_size_law as study

    bent = [run for run in made(gamma=0.5) if run["batch"] <= 512]
    bent += [run for run in made(gamma=0.1) if run["batch"] > 512]
    runs = [
        r | {"part": "batch-rate", "seed": seed, "N": N}
        for seed in (0, 1)
        for N in (1, 2)
        for r in bent
    ]
    assert study.gammas(runs, 64, 512) == pytest.approx([0.5, 0.5], abs=1e-8)
    assert study.gammas(runs, 1024, 8192) == pytest.approx([0.1, 0.1], abs=1e-8)
    assert study.gammas(runs, 1, 1e6) == pytest.approx([law.fit_gamma(bent)] * 2)


def test_rates_follow_gamma():
    assert law.rate_for(1024, 0.5, 256, 0.01) == pytest.approx(0.02)
    assert law.rate_for(1024, 1.0, 256, 0.01) == pytest.approx(0.04)


def grid(rule):
    return [
        run | {"loss": run["loss"] + 40 / N**0.4 + 300 / D**0.4}
        for N in (1e4, 4e4)
        for D in (2.0**17, 2.0**19, 2.0**21)
        for run in made(2.0 ** np.arange(5, 14), N, D, place=rule(D))
    ]


def test_the_frontier_has_no_point_that_another_undercuts():
    runs = grid(lambda D: 100 * (D / 2**17) ** 0.5)
    points = law.optimal_batch(runs, hold="compute")
    every = law.optimal_batch(runs)
    assert len(every) == 6 and 2 <= len(points) <= 6
    assert [one.D for one in every] == sorted(one.D for one in every)
    for one in points:
        assert not [o for o in every if o.loss < one.loss and o.compute <= one.compute]
    b = law.exponent([p.D for p in points], [p.batch for p in points])
    s = law.exponent([p.D for p in points], [p.steps for p in points])
    assert b == pytest.approx(0.5, abs=1e-3) and s == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="'data' or 'compute'"):
        law.optimal_batch(runs, hold="steps")


def test_a_batch_is_foretold_from_less_text_and_its_loss_read_off():
    runs = [r for r in grid(lambda D: 100 * (D / 2**17) ** 0.25) if r["N"] == 1e4]
    optima = law.optimal_batch(runs)
    batch = law.predict_batch(optima[:-1], 2**21)
    assert batch == pytest.approx(200, rel=1e-3) == pytest.approx(optima[-1].batch, rel=1e-3)
    last = [run for run in runs if run["tokens"] == 2**21]
    assert law.loss_at(batch, last) == pytest.approx(optima[-1].loss)
    off = law.loss_at(2 * batch, last) - law.loss_at(batch, last)
    assert off == pytest.approx(law.loss_off(2, 0.05), rel=1e-6)
    assert law.loss_at(1.0, last) == law.loss_at(32.0, last), "never beyond what was tried"
    high = [run for run in last if run["batch"] >= 512]
    assert law.loss_at(600, high) == pytest.approx(
        np.interp(np.log(600), *(np.log([512, 1024]), law.tuned(high).loss[:2]))
    )


def over_b(batch, loss):
    a, b, _ = np.polyfit(batch, loss, 2)
    return -b / (2 * a)


def still_log(batch, loss):
    a, b, _ = np.polyfit(np.log(batch), loss, 2)
    return -b / (2 * a)


def best_tried(batch, loss):
    return batch[loss.argmin()]


def square_root(new, batch, rate):
    return rate[batch.argmax()] * (new / batch.max()) ** 0.5


def straight(new, batch, rate):
    slope, start = np.polyfit(batch, rate, 1)
    return start + slope * new


def gamma_alone(new, batch, rate):
    return np.polyfit(np.log(batch), np.log(rate), 1)[0]


def steps_are_samples(batch, samples, rate, noise):
    return exercises._expected_loss(1, samples, rate, noise / np.sqrt(batch))


def noise_of_one(batch, samples, rate, noise):
    return exercises._expected_loss(batch, samples, rate, noise * np.sqrt(batch))


def no_half(batch, samples, rate, noise):
    return 2 * exercises._expected_loss(batch, samples, rate, noise)


WRONG = {
    "best_batch": [over_b, still_log, best_tried],
    "rate_for": [square_root, straight, gamma_alone],
    "expected_loss": [steps_are_samples, noise_of_one, no_half],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_noisy_quadratic_is_that_of_simulated_runs():
    random = np.random.default_rng(3)
    batch, samples, rate, noise = 4, 40, 0.2, 1.5
    x = np.ones(40_000)
    for _ in range(samples // batch):
        x -= rate * (x + noise / np.sqrt(batch) * random.normal(size=len(x)))
    said = exercises._expected_loss(batch, samples, rate, noise)
    assert said == pytest.approx((x**2).mean() / 2, rel=0.03)


def test_the_laws_were_read_off_the_grid_that_is_stored():
    from lablib.evidence.studies import matching
    from lablib.evidence.studies import study as find

    runs = find("batch-size-law").runs()
    fits = matching(runs, kind="laws")
    assert len(fits) == 5
    for row in fits:
        total = sum(r["loss"] for r in matching(runs, part="batch-rate", seed=row["seed"]))
        assert row["sum"] == pytest.approx(total), "`python -m lablib study batch-size-law`"
