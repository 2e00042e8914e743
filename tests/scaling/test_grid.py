"""The shared grid: which trainings there are."""

import pytest

from lablib.evidence.studies import matching, study
from lablib.studies import scaling_grid as grid

MOST = 5.6e11  # parameters times bytes


def test_each_size_reads_every_doubling_up_to_one_product_of_size_and_bytes():
    parameters = {
        size: grid.build(0, *size, None).n_parameters(embeddings=False) for size in grid.SIZES
    }
    assert min(parameters.values()) > 3e3 and max(parameters.values()) > 1.2e6
    texts = [grid.MB // 4 * 2**i for i in range(6)]
    planned = {
        (*size, text) for size, N in parameters.items() for text in texts if N * text <= MOST
    }
    for seed in range(5):
        points = matching(grid.POINTS, part="size-data", seed=seed)
        made = [(point["n_layers"], point["dim"], point["tokens"]) for point in points]
        assert set(made) == planned and len(made) == len(planned)


def test_what_is_read_again_is_also_read_once_as_long():
    fresh = {
        (point["dim"], point["tokens"], point["seed"], point["lr"])
        for point in matching(grid.POINTS, part="size-data")
    }
    again = matching(grid.POINTS, part="repetition")
    assert {point["tokens"] // point["unique"] for point in again} == {2, 4, 8, 16, 32, 64}
    for point in again:
        assert (point["dim"], point["tokens"], point["seed"], point["lr"]) in fresh


def test_the_first_rows_have_three_rates_and_less_of_the_largest_model():
    rows = matching(grid.POINTS, part="batch-rate", seed=0)
    first = grid.at_first(rows)
    for tokens, batches in ((grid.MB // 8, 6), (grid.MB // 2, 6), (2 * grid.MB, 6)):
        assert len(matching(first, dim=32, tokens=tokens)) == 3 * batches
    for tokens in (grid.MB // 8, grid.MB // 2):
        assert len(matching(first, dim=48, tokens=tokens)) == 3 * 6
    assert len(matching(first, dim=64)) == 3 * 3
    assert {row["tokens"] for row in matching(first, dim=64)} == {grid.MB // 8}
    assert len(first) == 3 * (18 + 12 + 3)


def test_a_fourth_rate_lies_beyond_the_end_at_which_the_best_lay_on_the_tuning_seed():
    runs = matching(study("scaling-grid").runs("TUNING"), part="batch-rate", seed=100)
    cells = {(r["dim"], r["tokens"], r["batch"]) for r in runs}
    for cell in cells:
        dim, tokens, batch = cell
        three = grid.three_rates(dim, batch)
        rows = matching(runs, dim=dim, tokens=tokens, batch=batch)
        loss = {r["lr"]: r["loss"] for r in rows}
        best = min(three, key=loss.get)
        more = [lr for lr in loss if lr not in three]
        if best == three[1]:
            assert not more or cell == (
                32,
                grid.MB // 8,
                2048,
            )  # for as many tries as the most text
        else:
            (lr,) = more
            assert (lr < three[0]) == (best == three[0])


def test_seven_batches_read_to_a_loss_and_the_largest_read_longer():
    for dim, n_rates in ((32, 3), (48, 3), (64, 1)):
        rows = matching(grid.POINTS, part="steps", dim=dim, seed=0)
        read = {row["batch"]: row["tokens"] // grid.MB for row in rows}
        assert list(read) == [256 * 2**i for i in range(7)] and len(rows) == 7 * n_rates
        larger = {4096: 3, 8192: 4, 16384: 8} if dim == 32 else {8192: 3, 16384: 4}
        assert read == {batch: larger.get(batch, 2) for batch in read}
        for row in rows:
            every = row["tokens"] // row["points"]
            assert every % row["batch"] == 0 and grid.MB // 4 % every == 0, "a point at each target"


def test_rates_to_a_loss_lie_around_the_one_that_was_tuned():
    tuning = matching(study("scaling-grid").runs("TUNING"), part="steps")
    for dim in (32, 48, 64):
        for batch in (8192, 16384):
            rows = matching(tuning, dim=dim, batch=batch)
            best = min(rows, key=lambda row: min(losses[-1] for losses in row["averaged"]))
            tried = grid.rates_to_a_loss(dim, batch)
            assert grid.tuned_rate(dim, batch) in tried
            assert 0.5 <= best["lr"] / grid.tuned_rate(dim, batch) <= 2, (dim, batch)
            if len(tried) == 3:
                ratios = [lr / grid.tuned_rate(dim, batch) for lr in tried]
                assert ratios == pytest.approx([0.5, 1, 2], rel=0.02)
