import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("expert_parallel.py")


def _train(folder, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / f"{processes}-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_train_as_one_does(tmp_path):
    """Experts split, balancing over all tokens, gradients clipped by their norm over processes."""
    (alone,) = _train(tmp_path, 1)
    pair = _train(tmp_path, 2)
    losses = torch.tensor([one["losses"] for one in pair]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), atol=1e-4, rtol=1e-4)
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    assert alone["norm"] > 0.5  # so that gradients were scaled down
    for one in pair:
        assert one["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    for what, tolerance in {"grads": 1e-6, "weights": 1e-4}.items():
        for key, value in alone[what].items():
            parts = [torch.tensor(one[what][key]) for one in pair]
            found = torch.cat(parts) if "experts" in key else parts[0]
            expected = torch.tensor(value)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
            assert "experts" in key or torch.equal(*parts)
