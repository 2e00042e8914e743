"""The tier: how much this machine, or the reader, wants to spend."""

import importlib.util
import os
import shutil

TIERS = ("smoke", "cpu", "gpu")
SEEDS = {"smoke": 1, "cpu": 3, "gpu": 5}
BUDGETS = {"smoke": (15, 1.2), "cpu": (120, 1.6), "gpu": (300, 15.0)}  # seconds, GB


def current() -> str:
    """`$LABLIB_TIER`; without it "gpu" where CUDA is, else "cpu".

    Raises ValueError when the variable holds something else.
    """
    tier = os.environ.get("LABLIB_TIER", "").strip().lower()
    if not tier:
        return "gpu" if has_cuda() else "cpu"
    if tier not in TIERS:
        raise ValueError(f"LABLIB_TIER is {tier!r}; it can be {', '.join(TIERS)}")
    return tier


def has_cuda() -> bool:
    """Whether torch sees a CUDA device; torch is not imported where there is no driver."""
    if not shutil.which("nvidia-smi") or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def static() -> bool:
    """Whether outputs are being stored: figures as they start, no live widgets."""
    return os.environ.get("LABLIB_STATIC") == "1"
