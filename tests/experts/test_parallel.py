import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SCRIPT = Path(__file__).with_name("expert_parallel.py")


def _train(folder, processes):
    """Processes that meet in a file: torchrun's store would listen on every address."""
    command = [sys.executable, str(SCRIPT), str(folder)]
    shared = os.environ | {"WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": LOOPBACK}
    started = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), said[0][-3000:] + said[-1][-3000:]
    files = [folder / f"{processes}-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


def _check_addresses(listening):
    """Where Linux tells, they listened on something, and only on this machine itself."""
    assert listening or sys.platform != "linux"
    assert all(ipaddress.ip_address(address).is_loopback for address in listening), listening


def test_two_processes_train_as_one_does(tmp_path):
    """Experts split, balancing over all tokens, gradients clipped by their norm over processes.

    Also with padding, which leaves one process 4 tokens a row and the other 11.
    """
    (alone,) = _train(tmp_path, 1)
    pair = _train(tmp_path, 2)
    _check_addresses([address for one in pair for address in one["listening"] or []])
    losses = torch.tensor([one["losses"] for one in pair]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), atol=1e-4, rtol=1e-4)
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    assert alone["norm"] > 0.5  # so that gradients were scaled down
    for one in pair:
        assert one["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    for what, tolerance in {"grads": 1e-6, "padded": 1e-6, "weights": 1e-4}.items():
        for key, value in alone[what].items():
            parts = [torch.tensor(one[what][key]) for one in pair]
            found = torch.cat(parts) if "experts" in key else parts[0]
            expected = torch.tensor(value)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
            assert "experts" in key or torch.equal(*parts)
