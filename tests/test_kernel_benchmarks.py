import re
import subprocess
import sys

import pytest
import torch

from lablib import kernel_benchmarks as bench

LIMITS = {"flops": 1e12, "bandwidth": 1e12}


def test_a_way_that_fails_is_named_and_the_others_are_timed(capsys):
    def absent():
        raise ImportError("no such peer")

    a = torch.ones(200, 200)
    case = bench.Case("products", {"ours": lambda: a @ a, "peer": absent}, flops=2 * 200**3)
    found = bench._show(case, LIMITS, repeats=3)
    assert found["ours"] > 0
    assert found["peer"] == "not run: ImportError"
    printed = capsys.readouterr().out
    assert re.search(r"ours .* ms +1.00 x ours +\d+% of peak", printed)
    assert "not run: ImportError" in printed


@pytest.mark.parametrize("case", bench.moe_cases("cpu", torch.float32), ids=lambda c: c.title[:30])
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

    monkeypatch.setattr(bench, "_loss_inputs", small)
    outputs = [way() for way in bench._loss_ways("cpu", torch.float32).values()]
    torch.testing.assert_close(*outputs)


def test_memory_is_that_of_the_way():
    code = """
import torch
from lablib import kernel_benchmarks as bench
bench._loss_ways = lambda *_: {"ours": lambda: torch.ones(2**25).sum()}
print(bench._peak("ours", "cpu", torch.float32))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 * 2**27 < int(done.stdout) < 1.5 * 2**27
