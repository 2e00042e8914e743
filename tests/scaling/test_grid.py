"""The shared grid: which trainings there are."""

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
    longer = {8192: 2 * grid.MB, 16384: 4 * grid.MB}
    for dim in (32, 48, 64):
        rows = matching(grid.POINTS, part="steps", dim=dim, seed=0)
        read = {row["batch"]: row["tokens"] for row in rows}
        assert list(read) == [256 * 2**i for i in range(7)] and len(rows) == 7
        more = longer | ({4096: 2 * grid.MB} if dim == 32 else {})
        assert read == {batch: more.get(batch, grid.MB) for batch in read}
        for row in rows:
            every = row["tokens"] // row["points"]
            assert every % row["batch"] == 0 and grid.MB // 8 % every == 0, "a point at each target"
