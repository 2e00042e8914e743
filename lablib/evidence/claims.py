"""Verdicts, computed from values."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lablib.evidence.intervals import interval
from lablib.papers import Claim

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced at this scale"
NOT_JUDGED = "not judged"
SIGNS = {REPRODUCED: "✔", NOT_REPRODUCED: "✘", NOT_JUDGED: "·"}
MIN_SEEDS = 5


class Pair(NamedTuple):
    """One seed's outcome: of the method, and of the baseline that it is compared with."""

    seed: int
    method: float
    baseline: float


@dataclass(frozen=True)
class Verdict:
    """What came of one claim.

    measured: the number, the largest difference, or the mean effect over seeds; interval: its 95 %
    t-interval over seeds, when there are several; values: what it was computed from, from which
    `judge` gives the same verdict again. source: "lab" for values that a notebook computed, "study"
    for those of stored runs.
    """

    claim: str
    kind: str
    verdict: str
    measured: float
    interval: tuple[float, float] | None
    summary: str
    values: Any
    note: str = ""
    source: str = "lab"


def judge(claim: Claim, values: Any, note: str = "") -> Verdict:
    """The verdict on `claim` from values alone.

    values: for a number, it, or one a seed; for a formula, the pair (ours, independent) of arrays
    of one shape, or what an earlier verdict kept of it; for a direction, a `Pair` a seed, or the
    same as a triple. A direction is judged from five seeds on.
    Raises ValueError when values have another form, when there are none or one is not finite, and
    for directions whose seeds repeat or whose effects are all equal.
    """
    judges = {"number": _number, "formula": _formula, "direction": _direction}
    verdict, measured, bounds, summary, kept = judges[claim.kind](claim, values)
    return Verdict(claim.id, claim.kind, verdict, measured, bounds, summary, kept, note)


def _number(claim: Claim, values: Any):
    rows = np.atleast_1d(np.asarray(values, dtype=float))
    if not rows.size:
        raise ValueError(f"claim {claim.id}: no value was given")
    if len(rows) > 1 and np.ptp(rows) == 0:
        raise ValueError(f"claim {claim.id}: all {len(rows)} values are one and the same; give one")
    mean, low, high = _interval(claim, rows)
    bounds = (mean, mean) if len(rows) == 1 else (low, high)
    offs = [abs(bound - claim.value) / abs(claim.value) for bound in (mean, *bounds)]
    off = max(offs)
    verdict = REPRODUCED if off <= claim.tolerance else NOT_REPRODUCED
    unit = f" {claim.unit}" if claim.unit else ""
    spread = f" {_bracket(low, high)}, {len(rows)} seeds," if len(rows) > 1 else ""
    beside = f"{mean:.{3 if len(rows) > 1 else 6}g}{unit}{spread} beside {claim.value:g}"
    told = f"off by {offs[0]:.2%}" + (f", its far end by {off:.2%}" if len(rows) > 1 else "")
    summary = f"{beside} ({told}; {claim.tolerance:.2%} allowed)"
    return verdict, mean, None if len(rows) == 1 else bounds, summary, rows.tolist()


def _formula(claim: Claim, values: Any):
    kept = values if isinstance(values, dict) else _largest(claim, values)
    difference, count = abs(kept["ours"] - kept["independent"]), kept["count"]
    if not count or not difference == kept["largest"]:
        raise ValueError(f"claim {claim.id}: {kept} is not the largest of {count} differences")
    verdict = REPRODUCED if difference <= claim.tolerance else NOT_REPRODUCED
    summary = f"largest difference {difference:.3g} over {count} values"
    return verdict, difference, None, f"{summary} ({claim.tolerance:g} allowed)", kept


def _largest(claim: Claim, values: Any) -> dict[str, Any]:
    """How many values were compared, and where they differ most: what a formula's record keeps."""
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise ValueError(f"claim {claim.id}: give the pair (ours, independent)")
    ours, independent = (np.asarray(part, dtype=float) for part in values)
    if ours.shape != independent.shape or not ours.size:
        raise ValueError(
            f"claim {claim.id}: shapes {ours.shape} and {independent.shape} can't be compared"
        )
    if not (np.isfinite(ours).all() and np.isfinite(independent).all()):
        raise ValueError(f"claim {claim.id}: values that are not finite can't be compared")
    place = int(np.abs(ours - independent).argmax())
    here, there = float(ours.flat[place]), float(independent.flat[place])
    at = [int(index) for index in np.unravel_index(place, ours.shape)]
    return {
        "count": ours.size,
        "largest": abs(here - there),
        "at": at,
        "ours": here,
        "independent": there,
    }


def _direction(claim: Claim, values: Any):
    rows = [Pair(*row) for row in values] if _triples(values) else None
    if not rows:
        raise ValueError(f"claim {claim.id}: give one (seed, method, baseline) a seed")
    seeds = [row.seed for row in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"claim {claim.id}: seeds repeat in {seeds}")
    effects = effects_of(claim, rows)
    mean, low, high = _interval(claim, effects)
    if len(rows) > 1 and np.ptp(effects) == 0:
        raise ValueError(f"claim {claim.id}: {len(rows)} seeds with one and the same effect")
    back = math.exp if claim.effect == "ratio" else float
    kept = [list(row) for row in rows]
    if len(rows) < MIN_SEEDS:
        summary = f"{_effect(claim, back(mean))}; {len(rows)} of {MIN_SEEDS} seeds"
        return NOT_JUDGED, back(mean), None, summary, kept
    clear = high < 0 if claim.better == "lower" else low > 0
    spread = _bracket(back(low), back(high), back(0))
    summary = f"{_effect(claim, back(mean))} {spread}; {_better(claim)}; {len(rows)} seeds"
    return (
        REPRODUCED if clear else NOT_REPRODUCED,
        back(mean),
        (back(low), back(high)),
        summary,
        kept,
    )


def effects_of(claim: Claim, pairs: Sequence[Pair]) -> np.ndarray:
    """Each seed's effect: method - baseline, or for a ratio log(method / baseline): (seeds,).

    Raises ValueError for a ratio of values that are not above zero.
    """
    method = np.array([pair[1] for pair in pairs], dtype=float)
    baseline = np.array([pair[2] for pair in pairs], dtype=float)
    if claim.effect == "difference":
        return method - baseline
    if not (np.isfinite(method).all() and np.isfinite(baseline).all()):
        raise ValueError(f"claim {claim.id}: a ratio needs finite values")
    if min(method.min(), baseline.min()) <= 0:
        raise ValueError(f"claim {claim.id}: a ratio needs values above zero")
    return np.log(method) - np.log(baseline)


def _triples(values: Any) -> bool:
    try:
        return len(values) > 0 and all(len(row) == 3 for row in values)
    except TypeError:
        return False


def _interval(claim: Claim, rows: np.ndarray) -> tuple[float, float, float]:
    try:
        return interval(rows)
    except ValueError as error:
        raise ValueError(f"claim {claim.id}: {error}") from None


def _effect(claim: Claim, effect: float) -> str:
    unit = f" {claim.unit}" if claim.unit else ""
    return f"{effect:.3g} times{unit}" if claim.effect == "ratio" else f"{effect:+.3g}{unit}"


def _bracket(low: float, high: float, neutral: float | None = None) -> str:
    """Both ends, with as many digits as tell them from where there is no effect."""
    ends = [(f"{end:.3g}", f"{end:.5g}") for end in (low, high)]
    short, long = zip(*ends)
    return f"[{', '.join(long if neutral is not None and f'{neutral:g}' in short else short)}]"


def _better(claim: Claim) -> str:
    side = "below" if claim.better == "lower" else "above"
    if claim.effect == "ratio":
        return f"{side} 1 is better"
    return f"method minus baseline, {side} 0 is better"


def record(verdict: Verdict) -> None:
    """Append the verdict to the file that `verify` names in `$LABLIB_RECORD`, if it does."""
    target = os.environ.get("LABLIB_RECORD")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")
