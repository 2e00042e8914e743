import os

import ipywidgets
import pytest

from lablib.exercises import Exercise
from lablib.lab import Lab, check, explore, figures, predict, source, tiers
from lablib.lab.grading import GRADING
from lablib.lab.map import paper_map
from lablib.lab.widgets import control
from lablib.papers import papers


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, as text."""
    texts = []

    def display(*objects, raw=False, **options):
        for thing in objects:
            texts.append(str(thing) if raw else str(getattr(thing, "data", thing)))

    for module in ("runtime", "widgets", "code", "grading", "figures"):
        monkeypatch.setattr(f"lablib.lab.{module}.display", display)
    return texts


@pytest.mark.parametrize(("tier", "seeds", "size"), [("smoke", 1, 1), ("cpu", 3, 2), ("gpu", 5, 2)])
def test_a_tier_sets_sizes_and_seeds(tier, seeds, size, monkeypatch, shown):
    monkeypatch.setenv("LABLIB_TIER", tier)
    lab = Lab("markov-chains")
    assert lab.tier == tier and len(lab.seeds) == seeds
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
    assert lab.verdicts[0].verdict == "reproduced"
    assert "&lt;b&gt;note" in shown[-1] and "reproduced" in shown[-1]
    with pytest.raises(KeyError, match="has no claim 'nonsense'"):
        lab.claim("nonsense", 1.0)
    with pytest.raises(ValueError, match="has no paper"):
        Lab("start-here").claim("x", 1.0)


@pytest.mark.parametrize(
    ("value", "kind", "start"),
    [
        ((1, 5), ipywidgets.IntSlider, 1),
        ((1, 5, 2, 3), ipywidgets.IntSlider, 3),
        ((0.0, 1.0), ipywidgets.FloatSlider, 0.0),
        ((0.1, 1.0, 0.1, 0.5), ipywidgets.FloatSlider, 0.5),
        (["a", "b"], ipywidgets.Dropdown, "a"),
        (True, ipywidgets.Checkbox, True),
        ("the king", ipywidgets.Text, "the king"),
    ],
)
def test_controls(value, kind, start):
    made = control("some_name", value)
    assert type(made) is kind and made.value == start and made.description == "some name"


def test_an_unknown_control_is_refused():
    with pytest.raises(TypeError, match="3j is no"):
        control("x", 3j)


def growing(order, corpus):
    if order == 3:
        raise ValueError("order 3 <b>breaks</b>\nsecond line")
    fig = figures.figure(f"{corpus}", x="x", y="y")
    return figures.line(fig, range(order), [range(order)], corpus)


def test_explore_redraws_and_shows_errors_in_place():
    made = explore(growing, order=(1, 5), corpus=["a", "b"])
    assert len(made.figure.data[0].x) == 1
    made.controls["order"].value = 2
    made.controls["corpus"].value = "b"
    assert len(made.figure.data[0].x) == 2 and made.figure.layout.title.text == "b"
    assert "application/vnd.plotly.v1+json" in made.area.outputs[0]["data"]
    made.controls["order"].value = 3
    assert made.error == "ValueError: order 3 <b>breaks</b>"
    assert "&lt;b&gt;" in made.area.outputs[0]["data"]["text/html"]
    made.controls["order"].value = 4
    assert made.error == "" and len(made.area.outputs) == 1
    assert made.seconds < 0.15


def test_explore_stores_a_figure_when_static(monkeypatch, shown):
    monkeypatch.setenv("LABLIB_STATIC", "1")
    explore(growing, order=(1, 5), corpus=["a", "b"])._ipython_display_()
    assert "application/vnd.plotly.v1+json" in shown[0] and "order, corpus" in shown[1]


def test_a_guess_is_kept_until_the_measurement(shown):
    guess = predict("How many?", low=0, high=10, unit="nats")
    guess.reveal(3.14159)
    assert "You made no guess" in shown[-1]
    guess._picker.value = 4
    assert guess.value == 4 and "measured: 3.142 nats" in guess._reply.value
    choice = predict("Which?", options=["one", "two"])
    choice._picker.value = "two"
    choice.reveal("two")
    assert "Right" in shown[-1]
    with pytest.raises(ValueError, match="needs options, or low and high"):
        predict("?")


def test_source_is_lablibs_own(shown):
    source(figures.interval)
    assert "lablib/lab/intervals.py" in shown[0] and "t.ppf" in shown[0] and '"""' in shown[0]
    source(figures.interval, docstring=False)
    assert "t.ppf" in shown[1] and '"""' not in shown[1]


def doubled(candidate):
    found = candidate(4)
    assert found == 8, f"expected 8, yours gives {found}"


def untried(x):
    raise NotImplementedError


def test_check_teaches_and_raises_only_under_grading(monkeypatch, shown):
    for name in GRADING:
        monkeypatch.delenv(name, raising=False)
    exercise = Exercise(reference=lambda x: 2 * x, test=doubled)
    check(exercise, exercise.reference)
    check(exercise, untried)
    check(exercise, lambda x: x)
    check(exercise, lambda x: x / 0)
    said = "\n".join(shown)
    for text in ("Correct", "Not tried yet", "expected 8, yours gives 4", "ZeroDivisionError"):
        assert text in said
    for name in GRADING:
        monkeypatch.setenv(name, "autograde")
        check(exercise, exercise.reference)
        for wrong in (untried, lambda x: x):
            with pytest.raises(AssertionError):
                check(exercise, wrong)
        monkeypatch.delenv(name)


def test_figures_have_a_template_bands_and_a_text_alternative(shown):
    fig = figures.figure("t", x="steps", y="nats")
    figures.line(fig, [1, 2], [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], "a")
    figures.line(fig, [1, 2], [1.0, 2.0], "b")
    assert [trace.name for trace in fig.data] == [None, "a", "b"]
    assert list(fig.data[1].y) == [2.0, 4.0]
    assert fig.data[1].line.color != fig.data[2].line.color
    figures.show(fig, alt="a falls")
    assert "'text/plain': 'a falls'" in shown[0] and "*a falls*" in shown[1]
    bars = figures.bars(figures.figure(), ["a", "b"], [[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    assert list(bars.data[0].y) == [2.0, 4.0] and bars.data[0].error_y.array[1] == 0


def test_the_map_shows_each_paper_once():
    fig = paper_map()
    assert sum(len(trace.x) for trace in fig.data) == 120
    points = {(x, y) for trace in fig.data for x, y in zip(trace.x, trace.y)}
    assert len(points) == 120, "no paper hides another"


def test_progress_passes_everything_on(monkeypatch, shown):
    assert os.environ["PYTEST_CURRENT_TEST"]
    assert list(Lab("start-here").progress(range(3), "x")) == [0, 1, 2]
