import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers look the functions up by name
import runs_for_tests as functions

from lablib.evidence.sweeps import RunFailed, call, grid, sweep

POINTS = grid(lr=(0.1, 0.2), seed=range(3))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def spawned(workers=1):
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def test_the_grid_has_every_combination_in_order():
    assert [(p["lr"], p["seed"]) for p in POINTS] == [(r, s) for r in (0.1, 0.2) for s in range(3)]
    assert grid(kind="dense", seed=(4, 5)) == [
        {"kind": "dense", "seed": 4},
        {"kind": "dense", "seed": 5},
    ]


def test_rows_come_in_the_points_order_after_a_training_in_the_parent(tmp_path):
    import torch

    # Two threads in the parent: a forked pool would wait for their locks for ever.
    torch.set_num_threads(2)
    layer = torch.nn.Linear(256, 256)
    layer(torch.randn(512, 256)).square().mean().backward()
    rows = sweep(functions.product, POINTS, tmp_path, workers=2)
    assert [row["point"] for row in rows] == POINTS
    assert [row["result"] for row in rows] == [functions.product(**point) for point in POINTS]


def test_what_is_there_is_not_run_again_unless_the_code_changed(tmp_path):
    made = []
    options = {"executor": None, "workers": 1, "done": made.append}
    sweep(functions.product, POINTS[:2], tmp_path, code="a", **options)
    sweep(functions.product, POINTS[:3], tmp_path, code="a", **options)
    assert [row["point"] for row in made] == POINTS[:3]
    sweep(functions.product, POINTS[:2], tmp_path, code="b", **options)
    assert len(made) == 5


def test_numpy_values_are_kept(tmp_path):
    import numpy as np

    points = [{"size": np.int64(3), "seed": np.int64(1)}]
    rows = sweep(functions.in_numpy, points, tmp_path, workers=1)
    assert rows[0]["point"] == {"size": 3, "seed": 1}
    assert rows[0]["result"] == {"mean": 1.0, "row": [0, 1, 2]}


@pytest.mark.parametrize(
    ("function", "message"),
    [(functions.unlucky, "'seed': 2.*out of luck"), (functions.killed, "'seed': 2")],
)
def test_a_failed_run_is_named_and_the_finished_ones_are_kept(function, message, tmp_path):
    with pytest.raises(RunFailed, match=message):
        sweep(function, grid(seed=range(4)), tmp_path, workers=1)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_result_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(RunFailed, match="'seed': 0"):
        sweep(functions.not_finite, grid(seed=0), tmp_path, workers=1)


def test_a_worker_has_one_thread(tmp_path):
    assert sweep(functions.threads, grid(seed=0), tmp_path)[0]["result"]["threads"] == 1


def test_functions_that_no_process_can_import_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not in a notebook"):
        sweep(lambda seed: {}, grid(seed=0), tmp_path)


def test_never_more_runs_than_cores_whoever_starts_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "home"))
    marks = tmp_path / "marks"
    marks.mkdir()
    script = (
        "import os; os.cpu_count = lambda: 1\n"
        "import sys, runs_for_tests as f\nfrom lablib.evidence.sweeps import call_in_turn, grid\n"
        "for seed in range(2):\n"
        "    print(call_in_turn(f.busy, dict(seed=seed, folder=sys.argv[1]))['result']['going'])\n"
    )
    line = [sys.executable, "-c", script, str(marks)]
    shells = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [int(count) for shell in shells for count in shell.communicate()[0].split()]
    assert counts == [1] * 6


INTERRUPTED = """
import os, signal, sys, threading, runs_for_tests as f
from lablib.evidence.sweeps import grid, sweep
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    made = []
    def stop(row):
        made.append(row)
        if len(made) == 2:
            signal.raise_signal(signal.SIGINT)
    try:
        sweep(f.slow_product, grid(lr=0.1, seed=range(8)), sys.argv[1], workers=1, done=stop)
    except KeyboardInterrupt:
        print("stopped")
"""


def test_ctrl_c_keeps_what_was_finished(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    line = [sys.executable, str(script), str(tmp_path / "rows")]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "stopped", ran.stderr
    assert len(list((tmp_path / "rows").glob("*.json"))) in (2, 3)


def test_dask_runs_a_sweep_on_two_processes(tmp_path):
    distributed = pytest.importorskip("distributed")
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True}
    with (
        distributed.LocalCluster(host="127.0.0.1", dashboard_address=None, **settings) as cluster,
        distributed.Client(cluster) as client,
    ):
        rows = sweep(functions.slow_product, POINTS, tmp_path, executor=client.get_executor())
    assert [row["result"]["loss"] for row in rows] == [p["lr"] * p["seed"] for p in POINTS]
    assert len({row["result"]["process"] for row in rows}) == 2


def test_a_run_sees_no_gpu_unless_it_may(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert call(functions.sees_a_gpu, {})["result"] == {"gpu": False}
    assert call(functions.sees_a_gpu, {}, gpu=True)["result"] == {"gpu": True}
    assert torch.cuda.is_available()
