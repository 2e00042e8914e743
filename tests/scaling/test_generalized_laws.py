import math

import numpy as np
import pytest

from lablib.evidence.studies import matching
from lablib.evidence.studies import study as find
from lablib.scaling import generalized_scaling as gs
from lablib.scaling.laws import frantar
from lablib.studies import generalized_laws as laws
from lablib.studies import generalized_scaling as trainings


def runs():
    return find("generalized-scaling").runs()


def test_each_seed_has_the_whole_grid_once():
    seeds = trainings.by_seed(runs())
    assert sorted(seeds) == [*trainings.SEEDS]
    for rows in seeds.values():
        cells = {(r["n_layers"], r["dim"], r["n_experts"], r["tokens"]) for r in rows}
        assert len(rows) == len(cells) == 44
        whole = [cell for cell in laws.cells_of(rows).values() if len(cell) == 4]
        assert len(whole) == 10, "all but the two cells of a quarter of a MiB"


def test_what_is_left_out_is_sparse_and_the_largest_or_the_sparsest():
    near, far = laws.divided(trainings.by_seed(runs())[0])
    assert (len(near), len(far)) == (30, 14)
    assert all(row["n_experts"] > 1 for row in far)
    assert {row["n_experts"] for row in far if row["dim"] < 64} == {8}
    assert {row["n_experts"] for row in near if row["dim"] == 64} == {1}


def test_a_law_that_holds_is_told_from_laws_that_do_not():
    made = laws.run("made up", 0)
    assert made["told"] < 0.02 < 0.05 < made["untold"] == min(made["active"], made["total"])
    assert made["experts"] < made["dense"] and made["off"] < made["off_still"]


def test_a_floor_that_does_not_move_needs_no_gamma():
    rows = laws.made_up()
    law = {"e": 0.7, "a": 15.0, "b": 90.0, "c": 4.0, "alpha": 0.3, "beta": 0.35, "gamma": 0.0}
    table = trainings.columns(rows)
    exact = gs.generalized_loss(table["N"], table["D"], table["S"], **law)
    rows = [row | {"loss": float(loss)} for row, loss in zip(rows, exact)]
    found = laws.coefficients(rows)
    assert found["c"] == pytest.approx(found["c_still"], rel=0.02) == pytest.approx(4, rel=0.02)
    assert found["gamma"] == pytest.approx(0, abs=1e-3) and found["off_still"] < 1e-4


def test_rows_that_follow_frantars_law_are_predicted_by_it():
    law = {"a_S": 3.0, "b_S": 0.7, "c_S": 8.0, "b_N": 0.25, "a_D": 3e4, "b_D": 0.35, "c": 0.6}
    rows = laws.made_up()
    table = trainings.columns(rows)
    exact = frantar(law, N=table["N"], D=table["D"], S=table["S"])
    made = laws.rivals([row | {"loss": float(loss)} for row, loss in zip(rows, exact)])
    assert made["frantar"] < 1e-3 and made["frantar_warning"] == ""
    assert made["frantar"] < made["abnar"]


def test_an_error_is_the_mean_difference_of_logarithms():
    rows = [{"loss": 2.0}, {"loss": 3.0}]
    assert laws.trainings.off(np.array([2.0, 3.0 * math.e]), rows) == pytest.approx(0.5)


def test_means_are_of_one_size_each():
    rows = [
        {"tokens": 5, "n_experts": n, "N": N, "N_total": n * N, "loss": loss}
        for n, N, loss in ((1, 20, 2.0), (1, 10, 3.0), (1, 20, 4.0), (2, 10, 9.0))
    ]
    np.testing.assert_allclose(laws.means(rows, 5, 1), [[10, 20], [10, 20], [3, 3]])
    np.testing.assert_allclose(laws.means(rows, 5, 2), [[10], [20], [9]])


def test_laws_of_other_rows_are_refused():
    stored = runs()
    changed = [run | {"rows": [[*row[:-1], row[-1] + 0.1] for row in run["rows"]]}
               if run.get("rows") else run for run in stored]  # fmt: skip
    with pytest.raises(ValueError, match="study generalized-laws"):
        trainings.values(changed)
    assert len(trainings.values(stored)["held-out"]) == len(matching(stored, kind="grid")) == 5


def test_seeds_together_have_the_seeds_mean():
    stored = runs()
    (pooled,) = matching(stored, kind="pooled")
    for name in ("dense", "experts"):
        seeds = [run[name] for run in matching(stored, kind="grid")]
        assert pooled[name] == pytest.approx(np.mean(seeds))


def test_masked_losses_are_those_of_each_share_and_seed():
    rows = find("generalized-scaling").rows()
    losses = trainings.masked_losses(rows)
    assert {share: len(seeds) for share, seeds in losses.items()} == dict.fromkeys(
        (0.5, 0.75, 0.875), 5
    )
    sparser = [np.mean(seeds) for seeds in losses.values()]
    assert sparser == sorted(sparser), "the more is gone, the higher the loss"
