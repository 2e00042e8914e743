import csv

import numpy as np
import pytest

from lablib.exercises import data_constrained as exercises
from lablib.paths import data_dir
from lablib.scaling import data_constrained as dc
from lablib.scaling import laws

PAPER = dc.published()


def test_every_published_value_says_where_it_is_printed():
    path = data_dir() / "published" / "data-constrained.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] and float(row["value"]) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    assert len(dc.published_runs()) == 131
    assert all(run["U"] <= run["D"] for run in dc.published_runs())


def test_the_module_has_the_published_decays():
    assert (PAPER["R_D"], PAPER["R_N"]) == (dc.R_D, dc.R_N)
    assert PAPER["A"] == pytest.approx(521, rel=1e-3) and PAPER["E"] == pytest.approx(
        1.87, rel=1e-3
    )
    with pytest.raises(TypeError):
        PAPER["E"] = 0.0


@pytest.mark.parametrize("name", ["printed loss 1", "printed loss 2"])
def test_losses_are_those_that_the_authors_print(name):
    row = dc.printed(name)
    point = [float(row[key]) for key in ("parameters", "tokens", "unique")]
    assert dc.loss(*point) == pytest.approx(float(row["value"]), abs=1e-12)


def test_the_law_is_the_shared_modules():
    N, D, U = np.random.default_rng(0).uniform(7, 11, (3, 50))
    N, D, U = 10**N, 10**D, np.minimum(10**U, 10**D)
    ours = dc.loss(N, D, U)
    np.testing.assert_allclose(ours, laws.data_constrained(PAPER, N=N, D=D, U=U), rtol=1e-12)


def test_where_nothing_repeats_and_no_weight_is_idle_it_is_hoffmanns():
    D = np.geomspace(1e9, 1e12, 5)
    N = 0.5 * dc.useful_parameters(D)
    np.testing.assert_allclose(dc.loss(N, D, D), laws.hoffmann(PAPER, N=N, D=D), rtol=1e-14)
    assert dc.useful_parameters(1e9) / 1e9 == pytest.approx(0.051, rel=0.02)  # equation 17
    assert (dc.loss(4 * N, D, D) > laws.hoffmann(PAPER, N=4 * N, D=D)).all()


def test_effective_tokens_are_the_sum_of_each_ones_value():
    U, star, pieces = 1000.0, 6.0, 200_000
    for epochs in (1.0, 2.5, 9.0):
        D = epochs * U
        at = 1 + (np.arange(pieces) + 0.5) / pieces * (epochs - 1)  # the middle of each piece
        summed = U + dc.value_of(at, star).mean() * (D - U)
        assert dc.effective_tokens(D, U, star) == pytest.approx(summed, rel=1e-9)
    assert dc.effective_tokens(500.0, U) == 500.0, "less than one pass is all fresh"
    assert dc.effective_tokens(7 * U, U, 1e30) == pytest.approx(7 * U), "without decay all count"


def test_surprises_of_the_paper():
    worth = [dc.effective_tokens(epochs, 1.0) / epochs for epochs in (4, 16)]
    assert worth == pytest.approx([0.93, 0.66], abs=0.005)
    assert dc.effective_tokens(1e9, 1.0) == pytest.approx(16.39, abs=0.005)
    assert dc.value_of(dc.half_value()) == pytest.approx(0.5)
    assert dc.value_of(1.0) == 1.0


def test_allocation_is_a_grid_search_on_the_law():
    compute, U = 6 * 8.67e9 * 178e9, 25e9
    epochs = np.linspace(1, 30, 29_001)
    losses = dc.loss(compute / (6 * epochs * U), epochs * U, U)
    assert dc.best_epochs(compute, U) == pytest.approx(epochs[losses.argmin()], abs=0.001)
    assert dc.best_epochs(compute, U) == pytest.approx(
        float(dc.printed("printed epochs")["value"]), rel=0.01
    )


def test_a_fit_finds_the_decays_that_made_the_rows():
    N, D, passes = (
        axis.ravel() for axis in np.meshgrid([1e4, 5e4, 2e5], [5e5, 2e6, 8e6], [1, 2, 4, 8])
    )
    values = {"E": 0.9, "A": 30.0, "B": 300.0, "alpha": 0.4, "beta": 0.45, "R_D": 9.0, "R_N": 5.0}
    rows = {"N": N, "D": D, "U": D / passes}
    once = passes == 1
    rows["loss"] = dc.loss(N, D, D / passes, values)
    rows["loss"][once] = laws.hoffmann(values, N=N[once], D=D[once])
    assert dc.fit_decay(rows).values == pytest.approx(values, rel=1e-3)
    with pytest.raises(ValueError, match="nothing twice|no decay"):
        dc.fit_decay({name: column[once] for name, column in rows.items()})


def test_repeated_batches_see_the_first_tokens_alone_and_each_pass_anew():
    tokens = np.arange(2000)
    batches = dc.repeated(tokens, 512, 4, 8, seed=1)
    rows = [next(batches) for _ in range(2 * batches.batches_per_epoch)]
    seen = np.concatenate([row.numpy().ravel() for row in rows])
    assert seen.max() <= 512 + 8 and len(np.unique(seen)) >= 500
    first, second = rows[0], rows[batches.batches_per_epoch]
    assert not (first == second).all()
    with pytest.raises(ValueError, match="offset"):
        dc.repeated(tokens[:500], 512, 4, 8, seed=1)


def test_text_is_filled_up_with_other_text():
    made = dc.filled_up(np.array([1, 2]), 3, np.array([7, 8, 9]))
    assert made.tolist() == [1, 2, 1, 2, 1, 2, 7, 8, 9]
    with pytest.raises(ValueError, match="leave nothing"):
        dc.filled_up(made, 0, made)


def first_counts_as_repeat(unique, epochs, star):
    return unique + unique * star * (1 - np.exp(-epochs / star))


def without_the_first(unique, epochs, star):
    return unique * star * (1 - np.exp(-(epochs - 1) / star))


def all_fresh(unique, epochs, star):
    return unique * epochs


def forgets_6(compute, unique, epochs, loss):
    losses = [loss(compute / (e * unique), e * unique, unique) for e in epochs]
    return epochs[int(np.argmin(losses))]


def forgets_unique(compute, unique, epochs, loss):
    losses = [loss(compute / (6 * e * unique), e * unique, e * unique) for e in epochs]
    return epochs[int(np.argmin(losses))]


def place(compute, unique, epochs, loss):
    losses = [loss(compute / (6 * e * unique), e * unique, unique) for e in epochs]
    return float(np.argmin(losses))


def other_sign(N, U, epochs, loss):
    return loss(N, epochs * U, U) - loss(N / 2, 2 * epochs * U, U)


def grows_text(N, U, epochs, loss):
    return loss(N / 2, 2 * epochs * U, 2 * U) - loss(N, epochs * U, U)


def keeps_size(N, U, epochs, loss):
    return loss(N, 2 * epochs * U, U) - loss(N, epochs * U, U)


WRONG = {
    "effective_tokens": [first_counts_as_repeat, without_the_first, all_fresh],
    "best_epochs": [forgets_6, forgets_unique, place],
    "longer_or_larger": [other_sign, grows_text, keeps_size],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_code_stands_in_the_place_of_the_last_four_of_eight_passes():
    from lablib.evidence.studies import matching
    from lablib.studies import data_constrained as study

    repeated = study.ROLES["code"]["baseline"]
    (unique,) = {point["unique"] for point in matching(study.POINTS, kind="code")}
    for point in matching(study.POINTS, kind="code"):
        assert point["tokens"] == repeated["tokens"] == 8 * unique
        assert point["passes"] * unique == point["tokens"] // 2
    runs = matching(study.scaling_grid.POINTS, part="repetition", unique=unique)
    repeated = {key: value for key, value in repeated.items() if key != "kind"}
    assert len(matching(runs, **repeated)) == 5, "one a seed"


def test_the_laws_were_fitted_to_the_grid_that_is_stored():
    from lablib.evidence.studies import matching
    from lablib.evidence.studies import study as find
    from lablib.studies import data_constrained as study

    runs = find("data-constrained").runs()
    fits = matching(runs, kind="laws")
    assert len(fits) == 5
    for row in fits:
        total = study.columns(runs, row["seed"])["loss"].sum()
        assert row["sum"] == pytest.approx(total), "`python -m lablib study data-constrained`"


def test_three_texts_are_repeated_for_three_sizes():
    from lablib.evidence.studies import matching
    from lablib.studies import data_constrained as study

    KB, MB = study.KB, study.MB
    most = {(1, 32): 4 * MB, (2, 48): 4 * MB, (3, 64): 2 * MB}
    for (layers, dim), end in most.items():
        size = {"n_layers": layers, "dim": dim, "seed": 0}
        new = {p["tokens"] for p in matching(study.scaling_grid.POINTS, part="size-data", **size)}
        for unique in (64 * KB, 256 * KB, MB):
            where = size | {"part": "repetition", "unique": unique}
            read = {p["tokens"] for p in matching(study.scaling_grid.POINTS, **where)}
            assert max(read) == end and 2 * MB in read and read <= new


def rows_of_excess():
    """Rows whose loss above new text is the number of passes over 100, and 1 for another size."""
    rows = []
    for seed in range(2):
        for dim, add in ((32, 0.0), (48, 1.0)):
            for tokens in (2**18, 2**19):
                row = {"seed": seed, "n_layers": 1, "dim": dim, "tokens": tokens}
                repeated = {"part": "repetition", "unique": 2**16}
                cost = add + tokens / 2**16 / 100
                rows.append(row | {"part": "size-data", "loss": 2.0 + seed})
                rows.append(row | repeated | {"loss": 2.0 + seed + cost})
    return rows


def test_the_cost_of_passes_is_of_one_size_and_above_new_text():
    from lablib.studies import data_constrained as study

    costs = study.by_passes(rows_of_excess(), 2**16, 1, 32)
    assert {n: pytest.approx([n / 100] * 2) for n in (4, 8)} == costs
    assert study.by_passes(rows_of_excess(), 2**16, 1, 48)[8] == pytest.approx([1.08] * 2)
    assert study.by_passes(rows_of_excess(), 2**18, 1, 32) == {}


def test_epochs_are_judged_where_the_model_fits_its_data():
    from lablib.evidence.studies import exchanged, study

    one = study("data-constrained")
    roles, runs = one.module.ROLES["epochs"], one.runs()
    large = [run for run in runs if run.get("dim", 32) != 32]
    mixed = exchanged(runs, roles["method"], roles["baseline"])
    assert [run for run in mixed if run.get("dim", 32) != 32] == large
    without = [run for run in runs if run not in large or run.get("part") != "repetition"]
    few = one.module.values(without + [run for run in large if run.get("unique") == 2**18])
    assert few["epochs"] == one.module.values(runs)["epochs"]


def test_losses_above_the_law_are_counted_for_each_size_from_sixteen_passes_on():
    from lablib.studies import data_constrained as study

    law = dict(PAPER)
    fit = {"kind": "laws", "seed": 0, "law": [law[name] for name in laws.data_constrained.names]}
    rows = [fit]
    for N, off in ((1000, 0.1), (2000, -0.2)):
        for passes in (8, 16, 32):
            loss = float(dc.loss(N, passes * 1e6, 1e6))
            loss *= np.exp(off if passes >= 16 else 9.0)
            row = {"part": "repetition", "seed": 0, "N": N, "tokens": passes * 1e6, "unique": 1e6}
            rows.append(row | {"loss": loss})
    assert study.above_law(rows) == pytest.approx({1000: 0.1, 2000: -0.2})
