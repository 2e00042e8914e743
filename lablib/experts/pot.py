"""A Gromov-Wasserstein coupling by POT, the package for optimal transport: recorded once.

Six points on a line and nine in the plane, coupled by POT 0.9.6.post1 in an environment of its own,
as "made" in `pot.json` says.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

EPSILON = 0.05  # weight of the entropy


@lru_cache(maxsize=1)
def recorded() -> tuple[Tensor, Tensor, Tensor]:
    """Distances in the first set (6, 6) and in the second (9, 9), and the coupling (6, 9)."""
    case = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    first, second, plan = (
        torch.tensor(case[key], dtype=torch.float64) for key in ("first", "second", "plan")
    )
    return first, second, plan
