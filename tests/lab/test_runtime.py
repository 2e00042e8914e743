import os

import pytest

from lablib.evidence import tiers
from lablib.lab import Lab
from lablib.lab.map import paper_map
from lablib.papers import papers


@pytest.mark.parametrize(("tier", "size"), [("smoke", 1), ("cpu", 2), ("gpu", 2)])
def test_a_tier_sets_sizes(tier, size, monkeypatch, shown):
    monkeypatch.setenv("LABLIB_TIER", tier)
    lab = Lab("markov-chains")
    assert lab.tier == tier
    assert lab.pick(smoke=1, cpu=2) == size
    assert lab.pick(smoke=1, cpu=2, gpu=3) == (3 if tier == "gpu" else size)
    assert "Large Language Models as Markov Chains" in shown[0] and tier in shown[0]


def test_a_wrong_tier_is_one_sentence(monkeypatch):
    monkeypatch.setenv("LABLIB_TIER", "huge")
    with pytest.raises(ValueError, match="LABLIB_TIER is 'huge'; it can be smoke, cpu, gpu"):
        tiers.current()


def test_a_claim_shows_paper_and_measured_and_knows_its_paper(monkeypatch, shown):
    monkeypatch.setenv("LABLIB_TIER", "cpu")
    measured = next(row for row in papers() if row.claims)
    lab = Lab(measured.slug)
    formula = next(claim for claim in measured.claims if claim.kind == "formula")
    lab.claim(formula.id, ([1.0], [1.0]), note="<b>note</b>")
    assert lab.verdicts[formula.id].verdict == "reproduced"
    assert "&lt;b&gt;note" in shown[-1] and "reproduced" in shown[-1]
    with pytest.raises(KeyError, match="has no claim 'nonsense'"):
        lab.claim("nonsense", 1.0)
    with pytest.raises(ValueError, match="has no paper"):
        Lab("start-here").claim("x", 1.0)


def test_the_map_shows_each_paper_once():
    fig = paper_map()
    assert sum(len(trace.x) for trace in fig.data) == 120
    points = {(x, y) for trace in fig.data for x, y in zip(trace.x, trace.y)}
    assert len(points) == 120, "no paper hides another"


def test_progress_passes_everything_on(monkeypatch, shown):
    assert os.environ["PYTEST_CURRENT_TEST"]
    assert list(Lab("start-here").progress(range(3), "x")) == [0, 1, 2]
