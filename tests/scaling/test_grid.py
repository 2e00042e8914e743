"""The shared grid: which trainings there are."""

from lablib.evidence.studies import matching
from lablib.studies import scaling_grid as grid

MOST = 5.6e11  # parameters times bytes


CUT = {(1, 32, 8), (2, 32, 8), (2, 48, 4), (2, 48, 8)}  # layers, dim, MiB: for time


def test_each_size_reads_every_doubling_up_to_one_product_of_size_and_bytes():
    parameters = {
        size: grid.build(0, *size, None).n_parameters(embeddings=False) for size in grid.SIZES
    }
    assert min(parameters.values()) > 3e3 and max(parameters.values()) > 1.2e6
    texts = [grid.MB // 4 * 2**i for i in range(6)]
    planned = {
        (*size, text) for size, N in parameters.items() for text in texts if N * text <= MOST
    } - {(*size, MiB * grid.MB) for *size, MiB in CUT}
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


def test_the_first_rows_lack_most_batches_and_a_text_of_the_largest_model():
    rows = matching(grid.POINTS, part="batch-rate", seed=0)
    first = grid.at_first(rows)
    later = [row for row in rows if row not in first]
    assert matching(first, dim=32) == matching(rows, dim=32)
    assert matching(first, dim=48) == matching(rows, dim=48)
    assert {row["dim"] for row in later} == {64} and len(matching(first, dim=64)) == 3 * 3
    assert {row["tokens"] for row in later} == {grid.MB // 8, grid.MB // 2}
