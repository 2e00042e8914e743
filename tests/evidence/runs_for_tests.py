"""Functions that sweeps call in tests: other processes import them from here."""

import os
import signal

import numpy as np
import torch


def product(lr, seed):
    return {"loss": lr * seed}


def slow_product(lr, seed):
    import time

    time.sleep(0.3)
    return {"loss": lr * seed, "process": os.getpid()}


def in_numpy(size, seed):
    return {"mean": np.float32(seed), "row": np.arange(size)}


def unlucky(seed):
    if seed == 2:
        raise RuntimeError("out of luck")
    return {"seed": seed}


def killed(seed):
    if seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seed": seed}


def not_finite(seed):
    return {"loss": float("nan")}


def threads(seed):
    return {"threads": torch.get_num_threads(), "sum": float(torch.ones(64, 64).sum())}


def busy(seed, folder):
    """How many runs were going on at the same time, as seen by this one."""
    import pathlib
    import time

    mark = pathlib.Path(folder) / f"{os.getpid()}-{seed}"
    mark.touch()
    time.sleep(0.3)
    count = len(list(mark.parent.iterdir()))
    mark.unlink()
    return {"going": count}


def sees_a_gpu():
    import torch

    return {"gpu": torch.cuda.is_available()}
