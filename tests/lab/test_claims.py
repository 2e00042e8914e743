import json

import numpy as np
import pytest

from lablib.lab.claims import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, judge, record
from lablib.lab.intervals import interval
from lablib.papers import Claim

NUMBER = Claim("n", "number", "t", "p", value=0.35, tolerance=0.02)
FORMULA = Claim("f", "formula", "t", "p", tolerance=1e-5)
LOWER = Claim("d", "direction", "t", "p", better="lower")
HIGHER = Claim("d", "direction", "t", "p", better="higher")


@pytest.mark.parametrize(
    ("claim", "values", "verdict"),
    [
        (NUMBER, 0.352, REPRODUCED),
        (NUMBER, 0.36, NOT_REPRODUCED),
        (NUMBER, [0.30, 0.40], REPRODUCED),
        (FORMULA, ([1.0, 2.0], [1.0, 2.000001]), REPRODUCED),
        (FORMULA, ([1.0, 2.0], [1.0, 2.1]), NOT_REPRODUCED),
        (FORMULA, ([1.0, 2.0], [1.0, np.nan]), NOT_REPRODUCED),
        (LOWER, ([1.0, 1.1, 1.2], [2.0, 2.05, 2.3]), REPRODUCED),
        (HIGHER, ([1.0, 1.1, 1.2], [2.0, 2.05, 2.3]), NOT_REPRODUCED),
        (LOWER, ([1.0, 2.4, 1.2], [2.0, 2.05, 2.3]), NOT_REPRODUCED),
        (HIGHER, [0.1, 0.11, 0.12], REPRODUCED),
        (HIGHER, [0.1, 0.11], NOT_JUDGED),
        (LOWER, [0.0, 0.0, 0.0], NOT_REPRODUCED),
    ],
)
def test_verdicts_follow_from_values(claim, values, verdict):
    assert judge(claim, values, "cpu").verdict == verdict


def test_a_direction_is_not_judged_at_the_smoke_tier():
    assert judge(LOWER, [-1.0, -1.1, -1.2, -1.3], "smoke").verdict == NOT_JUDGED


@pytest.mark.parametrize(
    ("claim", "values", "message"),
    [
        (NUMBER, [], "no value was given"),
        (FORMULA, 3.0, "give the pair"),
        (FORMULA, ([1.0], [1.0, 2.0]), "can't be compared"),
        (LOWER, np.zeros((3, 3)), "give .method, baseline."),
        (LOWER, [1.0, float("nan"), 2.0], "finite values"),
    ],
)
def test_values_of_another_form_are_refused(claim, values, message):
    with pytest.raises(ValueError, match=message):
        judge(claim, values, "cpu")


def test_intervals_cover_at_their_level():
    random = np.random.default_rng(0)
    bounds = [interval(random.normal(3, 2, size=3)) for _ in range(2000)]
    covered = np.mean([low < 3 < high for _, low, high in bounds])
    assert covered == pytest.approx(0.95, abs=0.015)
    assert interval([2.0]) == (2.0, -np.inf, np.inf)


def test_verdicts_are_recorded_for_verify(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_RECORD", str(tmp_path / "rows.jsonl"))
    record(judge(LOWER, ([1.0, 1.1, 1.2], [2.0, 2.05, 2.3]), "cpu", "a note"))
    record(judge(FORMULA, ([1.0], [np.nan]), "cpu"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["verdict"] == REPRODUCED and rows[0]["note"] == "a note"
    assert rows[0]["interval"][0] < rows[0]["measured"] < rows[0]["interval"][1] < 0
    assert rows[1]["measured"] is None
