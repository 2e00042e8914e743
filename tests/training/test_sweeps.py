import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lablib.training import sweep
from lablib.training.sweeps import grid

AXES = {"lr": [0.1, 0.2], "seed": [0, 1, 2]}


def product(lr, seed):
    return {"loss": lr * seed}


def test_the_grid_has_every_combination_in_order():
    assert [(p["lr"], p["seed"]) for p in grid(AXES)] == [
        (lr, seed) for lr in (0.1, 0.2) for seed in (0, 1, 2)
    ]


def test_rows_come_in_the_grids_order_from_processes(tmp_path):
    rows = sweep(product, AXES, tmp_path, workers=2)
    assert rows == [{**p, "result": product(**p)} for p in grid(AXES)]


def test_what_is_there_is_not_run_again(tmp_path):
    calls = []

    def fragile(lr, seed):
        calls.append((lr, seed))
        if (lr, seed) == (0.2, 1) and len(calls) < 7:
            raise RuntimeError("out of luck")
        return seed

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="out of luck"):
            sweep(fragile, AXES, tmp_path, executor=pool)
        assert len(calls) == 6 and len(list(tmp_path.iterdir())) == 5
        rows = sweep(fragile, AXES, tmp_path, executor=pool)
    assert calls[6:] == [(0.2, 1)]
    assert [row["result"] for row in rows] == [0, 1, 2, 0, 1, 2]
    assert all(json.loads(file.read_text()) in rows for file in tmp_path.iterdir())
