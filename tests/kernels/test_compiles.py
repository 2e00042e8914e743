"""Each kernel compiled for GPUs, without one: the interpreter lets more pass than the compiler."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_gpus.py")
KERNELS = Path(__file__).parents[2] / "lablib" / "kernels"


@pytest.mark.parametrize("gpu", ["T4", "H100"])
def test_every_kernel_compiles(gpu):
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, str(SCRIPT), gpu], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
    seen = {line.split()[0] for line in made.stdout.splitlines()}
    written = {
        f"lablib.kernels.{file.parent.name}.triton.{line.split('(')[0].removeprefix('def ')}"
        for file in KERNELS.glob("*/triton.py")
        for before, line in itertools.pairwise(file.read_text("utf-8").splitlines())
        if before == "@triton.jit"
    }
    assert seen == written
