import json

import numpy as np
import pytest

from lablib.evidence.claims import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Pair, judge, record
from lablib.evidence.intervals import interval
from lablib.papers import Claim

NUMBER = Claim("n", "number", "t", "p", value=0.35, tolerance=0.02)
FORMULA = Claim("f", "formula", "t", "p", tolerance=1e-5)
LOWER = Claim("d", "direction", "t", "p", better="lower", unit="nats")
HIGHER = Claim("d", "direction", "t", "p", better="higher")
FASTER = Claim("r", "direction", "t", "p", better="higher", effect="ratio", unit="as fast")

METHOD = [1.0, 1.1, 1.2, 1.3, 1.1]
BASELINE = [2.0, 2.05, 2.3, 2.2, 2.1]


def pairs(method, baseline=None):
    baseline = [0.0] * len(method) if baseline is None else baseline
    return [Pair(seed, *row) for seed, row in enumerate(zip(method, baseline, strict=True))]


@pytest.mark.parametrize(
    ("claim", "values", "verdict"),
    [
        (NUMBER, 0.352, REPRODUCED),
        (NUMBER, 0.36, NOT_REPRODUCED),
        (NUMBER, [0.349, 0.351, 0.35, 0.352], REPRODUCED),
        (NUMBER, [0.30, 0.40], NOT_REPRODUCED),  # their mean would fit; they disagree
        (FORMULA, ([1.0, 2.0], [1.0, 2.000001]), REPRODUCED),
        (FORMULA, ([1.0, 2.0], [1.0, 2.1]), NOT_REPRODUCED),
        (LOWER, pairs(METHOD, BASELINE), REPRODUCED),
        (HIGHER, pairs(METHOD, BASELINE), NOT_REPRODUCED),
        (LOWER, pairs([1.0, 2.9, 1.2, 2.6, 1.1], BASELINE), NOT_REPRODUCED),
        (HIGHER, pairs([0.1, 0.11, 0.12, 0.1, 0.13]), REPRODUCED),
        (HIGHER, pairs([0.1, 0.11, 0.12, 0.1]), NOT_JUDGED),
        (FASTER, pairs(BASELINE, METHOD), REPRODUCED),
        (FASTER, pairs(METHOD, BASELINE), NOT_REPRODUCED),
    ],
)
def test_verdicts_follow_from_values(claim, values, verdict):
    assert judge(claim, values).verdict == verdict


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        (NUMBER, [0.349, 0.351, 0.35]),
        (FORMULA, (np.eye(3), np.eye(3) + 1e-6 * np.arange(9).reshape(3, 3))),
        (LOWER, pairs(METHOD, BASELINE)),
        (FASTER, pairs(BASELINE, METHOD)),
    ],
)
def test_what_a_verdict_keeps_gives_it_again(claim, values):
    first = judge(claim, values)
    again = judge(claim, json.loads(json.dumps(first.values)))
    assert (again.verdict, again.summary) == (first.verdict, first.summary)


def test_a_formula_keeps_where_it_is_off_most():
    ours = np.zeros((2, 3))
    ours[1, 2] = 3e-6
    kept = judge(FORMULA, (ours, np.zeros((2, 3)))).values
    assert kept == {"count": 6, "largest": 3e-6, "at": [1, 2], "ours": 3e-6, "independent": 0.0}
    with pytest.raises(ValueError, match="is not the largest"):
        judge(FORMULA, kept | {"ours": 3.0})


def test_summaries_say_effect_unit_and_meaning():
    text = judge(LOWER, pairs(METHOD, BASELINE)).summary
    assert text.startswith("-0.99 nats [-1.08, ") and "below 0 is better; 5 seeds" in text
    fast = judge(FASTER, pairs([2.0, 2.2, 1.9, 2.1, 2.0], [1.0] * 5))
    assert (
        fast.summary.startswith("2.04 times as fast [1.9") and "above 1 is better" in fast.summary
    )
    assert fast.measured == pytest.approx(2.037, abs=1e-3)
    assert fast.interval[0] < fast.measured < fast.interval[1]


@pytest.mark.parametrize(
    ("claim", "values", "message"),
    [
        (NUMBER, [], "no value was given"),
        (NUMBER, [1.0, np.nan], "finite values"),
        (FORMULA, 3.0, "give the pair"),
        (FORMULA, ([1.0], [1.0, 2.0]), "can't be compared"),
        (FORMULA, ([1.0], [np.nan]), "not finite"),
        (LOWER, np.zeros((3, 2)), "give one .seed, method, baseline."),
        (LOWER, [], "give one .seed, method, baseline."),
        (LOWER, pairs([1.0, float("nan"), 2.0]), "finite values"),
        (LOWER, [Pair(0, 1.0, 2.0), Pair(0, 1.1, 2.2)], "seeds repeat"),
        (LOWER, pairs([1.0, 1.0, 1.0]), "one and the same effect"),
        (FASTER, pairs([1.0, 0.0], [1.0, 1.0]), "above zero"),
        (FASTER, pairs([1.0, np.inf], [1.0, 1.0]), "finite"),
    ],
)
def test_doubtful_values_are_refused(claim, values, message):
    with pytest.raises(ValueError, match=message):
        judge(claim, values)


def test_intervals_cover_at_their_level():
    random = np.random.default_rng(0)
    bounds = [interval(random.normal(3, 2, size=3)) for _ in range(2000)]
    covered = np.mean([low < 3 < high for _, low, high in bounds])
    assert covered == pytest.approx(0.95, abs=0.015)
    assert interval([2.0]) == (2.0, -np.inf, np.inf)


def test_verdicts_are_recorded_for_verify(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_RECORD", str(tmp_path / "rows.jsonl"))
    record(judge(LOWER, pairs(METHOD, BASELINE), "a note"))
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["verdict"] == REPRODUCED and row["note"] == "a note" and row["source"] == "lab"
    assert row["interval"][0] < row["measured"] < row["interval"][1] < 0
