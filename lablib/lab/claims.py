"""Verdicts, computed from values."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lablib.lab.intervals import interval
from lablib.papers import Claim

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced at this scale"
NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Verdict:
    """What came of one claim.

    measured: the number, the largest difference, or the mean paired difference; interval: its
    95 % t-interval over seeds, when there are any; values: what it was computed from.
    """

    claim: str
    kind: str
    verdict: str
    measured: float
    interval: tuple[float, float] | None
    summary: str
    values: Any
    tier: str
    note: str = ""


def judge(claim: Claim, values: Any, tier: str, note: str = "") -> Verdict:
    """The verdict on `claim` from values alone.

    values: for a number, it, or several to average; for a formula, the pair (ours, independent)
    of arrays of one shape; for a direction, the pair (method, baseline) of sequences, one value a
    seed, or one sequence of differences. A direction is judged from three seeds on, at the cpu or
    gpu tier; numbers and formulas are judged everywhere.
    Raises ValueError when the values have another form, or there are none.
    """
    judges = {"number": _number, "formula": _formula, "direction": _direction}
    verdict, measured, bounds, summary, kept = judges[claim.kind](claim, values, tier)
    return Verdict(claim.id, claim.kind, verdict, measured, bounds, summary, kept, tier, note)


def _number(claim: Claim, values: Any, tier: str):
    found = np.atleast_1d(np.asarray(values, dtype=float))
    if not found.size:
        raise ValueError(f"claim {claim.id}: no value was given")
    measured = float(found.mean())
    off = abs(measured - claim.value) / abs(claim.value)
    verdict = REPRODUCED if off <= claim.tolerance else NOT_REPRODUCED
    summary = (
        f"{measured:.6g} beside {claim.value:g} (off by {off:.2%}; {claim.tolerance:.2%} allowed)"
    )
    return verdict, measured, None, summary, found.tolist()


def _formula(claim: Claim, values: Any, tier: str):
    ours, independent = (np.asarray(part, dtype=float) for part in _pair(claim, values))
    if ours.shape != independent.shape or not ours.size:
        raise ValueError(
            f"claim {claim.id}: shapes {ours.shape} and {independent.shape} can't be compared"
        )
    difference = float(np.abs(ours - independent).max())
    verdict = REPRODUCED if difference <= claim.tolerance else NOT_REPRODUCED
    summary = f"largest difference {difference:.3g} over {ours.size} values"
    return verdict, difference, None, f"{summary} ({claim.tolerance:g} allowed)", None


def _direction(claim: Claim, values: Any, tier: str):
    rows = np.asarray(values, dtype=float)
    if rows.ndim == 2 and len(rows) == 2:
        differences = rows[0] - rows[1]
    elif rows.ndim == 1:
        differences = rows
    else:
        raise ValueError(f"claim {claim.id}: give (method, baseline), one value a seed in each")
    mean, low, high = interval(differences)
    seeds = f"{len(differences)} seed{'s' if len(differences) != 1 else ''}"
    if tier == "smoke" or len(differences) < 3:
        return NOT_JUDGED, mean, None, f"difference {mean:+.4g}, {seeds}", rows.tolist()
    clear = high < 0 if claim.better == "lower" else low > 0
    summary = f"difference {mean:+.4g}, 95 % interval [{low:+.4g}, {high:+.4g}], {seeds}"
    return REPRODUCED if clear else NOT_REPRODUCED, mean, (low, high), summary, rows.tolist()


def _pair(claim: Claim, values: Any) -> Sequence:
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise ValueError(f"claim {claim.id}: give the pair (ours, independent)")
    return values


def record(verdict: Verdict) -> None:
    """Append the verdict to the file that `verify` names in `$LABLIB_RECORD`, if it does."""
    target = os.environ.get("LABLIB_RECORD")
    if target:
        row = asdict(verdict)
        if not math.isfinite(row["measured"]):
            row["measured"] = None
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
