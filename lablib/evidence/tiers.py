"""The tier: how much this machine, or the reader, wants to spend."""

import importlib.util
import os
import shutil

TIERS = ("smoke", "cpu", "gpu")
# nbgrader sets these while it grades and validates; courses without it can set LABLIB_GRADE.
GRADING = ("LABLIB_GRADE", "NBGRADER_EXECUTION", "NBGRADER_VALIDATING")
BUDGETS = {"smoke": (20, 1.2), "cpu": (120, 1.6), "gpu": (300, 15.0)}  # seconds, GB


def current() -> str:
    """`$LABLIB_TIER`; without it "smoke" under grading, "gpu" where CUDA is, else "cpu".

    Raises ValueError when the variable holds something else.
    """
    tier = os.environ.get("LABLIB_TIER", "").strip().lower()
    if not tier and grading():
        return "smoke"
    if not tier:
        return "gpu" if has_cuda() else "cpu"
    if tier not in TIERS:
        raise ValueError(f"LABLIB_TIER is {tier!r}; it can be {', '.join(TIERS)}")
    return tier


def grading() -> bool:
    """Whether a submission is graded: a wrong or missing answer must raise."""
    return any(os.environ.get(name) for name in GRADING)


def has_cuda() -> bool:
    """Whether torch sees a CUDA device; torch is not imported where there is no driver."""
    if not shutil.which("nvidia-smi") or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def static() -> bool:
    """Whether outputs are being stored: figures as they start, no live widgets."""
    return os.environ.get("LABLIB_STATIC") == "1"
