import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lablib import kernels
from lablib.bench import kernels as bench
from lablib.kernels.cases import Case
from lablib.kernels.linear_cross_entropy import bench as loss_bench
from lablib.kernels.moe_mlp import bench as moe_bench

LIMITS = {"flops": 1e12, "bandwidth": 1e12}


def test_a_way_that_fails_is_named_and_the_others_are_timed(capsys):
    def absent():
        raise ImportError("no such peer")

    a = torch.ones(200, 200)
    case = Case("products", {"ours": lambda: a @ a, "peer": absent}, flops=2 * 200**3)
    row = bench.show(case, LIMITS, repeats=3)
    assert row["ours"] > 0
    assert row["peer"] == "not run: ImportError"
    printed = capsys.readouterr().out
    assert re.search(r"ours .* ms +1.00 x ours +\d+% of peak", printed)
    assert "not run: ImportError" in printed


def test_every_op_has_its_cases():
    names = {module.__name__.split(".")[-2] for module in bench.benches()}
    definitions = Path(kernels.__file__).parent.glob("*/naive.py")
    assert names == {file.parent.name for file in definitions} and len(names) > 5


@pytest.mark.parametrize("case", moe_bench.cases("cpu", torch.float32), ids=lambda c: c.title[:30])
def test_the_moe_layers_that_are_timed_agree(case):
    outputs = {key: way() for key, way in case.ways.items()}
    assert len(outputs) == 3
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["ours"], atol=1e-5, rtol=1e-5)


def test_the_loss_ways_agree(monkeypatch):
    def small(device, dtype):
        torch.manual_seed(0)
        hidden = torch.randn(12, 8, requires_grad=True)
        return hidden, torch.randn(9, 8, requires_grad=True), torch.randint(9, (12,))

    monkeypatch.setattr(loss_bench, "inputs", small)
    outputs = [way() for way in loss_bench.ways("cpu", torch.float32).values()]
    assert len(outputs) == 2
    torch.testing.assert_close(*outputs)


def test_memory_is_that_of_the_way():
    code = """
import torch
from lablib.kernels.linear_cross_entropy import bench
bench.ways = lambda *_: {"ours": lambda: torch.ones(2**25).sum()}
print(bench.peak("ours", "cpu", torch.float32))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 * 2**27 < int(done.stdout) < 1.5 * 2**27
