"""A stored picture is hidden, and its button shows all of it."""

import copy
import json

import plotly.graph_objects as go
import pytest

from lablib.lab import explore, explorer, figures, predict, veil
from lablib.lab.alternatives import NAME
from lablib.lab.veil import HIDDEN, is_veiled, veiled
from lablib.paths import notebooks

LABS = notebooks()


@pytest.fixture
def data():
    fig = figures.figure("Eight experts win", x="minus dense", y="who")
    fig.add_scatter(x=[1, 2], y=["b", "a"], name="one").add_bar(x=[1], y=[2], visible="legendonly")
    fig.add_annotation(text="by 0.13").add_vline(x=0)
    fig.update_layout(yaxis2={"overlaying": "y", "visible": False})
    return figures.bundle(fig)


def pressed(plot):
    """The figure after a click on its button, as Plotly's `update` makes it."""
    visible, layout = plot["layout"]["updatemenus"][0]["buttons"][0]["args"]
    made = copy.deepcopy(plot)
    for trace, seen in zip(made["data"], visible["visible"]):
        trace["visible"] = seen
    for path, value in layout.items():
        *above, last = path.split(".")
        part = made["layout"]
        for key in above:
            part = part.setdefault(key, {})
        part[last] = value
    return made


def test_nothing_tells_the_answer_before_the_click(data):
    hidden = veiled(data)
    plot = hidden[figures.PLOTLY]
    assert is_veiled(plot) and all(trace["visible"] is False for trace in plot["data"])
    seen = {k: v for k, v in plot["layout"].items() if k not in ("updatemenus", "template")}
    assert "Eight" not in json.dumps(seen) and "0.13" not in json.dumps(seen)
    assert not any(plot["layout"][axis]["visible"] for axis in ("xaxis", "yaxis", "yaxis2"))
    (carried,) = plot["layout"]["annotations"]
    assert carried["name"] == NAME and carried["text"] == hidden["text/plain"] == HIDDEN
    go.Figure(plot)
    assert veiled(hidden) is hidden and veiled({"text/html": "a page"}) == {"text/html": "a page"}


def test_the_click_brings_back_the_whole_figure(data):
    before, after = data[figures.PLOTLY], pressed(veiled(data)[figures.PLOTLY])
    assert after["layout"].pop("updatemenus") == []
    for trace, same in zip(before["data"], after["data"]):
        assert {"visible": True, **trace} == same
    axes = ("xaxis", "yaxis", "yaxis2")
    for axis in axes:
        own = before["layout"][axis]
        assert {"visible": True, **own} == after["layout"][axis]
    rest = [{k: v for k, v in one["layout"].items() if k not in axes} for one in (before, after)]
    assert rest[0] == rest[1]


def test_what_is_stored_below_an_answer_is_hidden_too(monkeypatch, data):
    stored = []
    monkeypatch.setenv("LABLIB_STATIC", "1")
    monkeypatch.setattr(explorer, "display", lambda shown, **_: stored.append(shown))
    cells = iter([1, 1, 2, 2])
    monkeypatch.setattr(veil, "_cell", lambda: next(cells))
    guess = predict("How many?", ["one", "two"])
    guess.reveal("two")  # cell 1
    for _ in range(2):  # cells 1 and 2
        explore(lambda n: figures.figure(f"{n}"), n=(1, 3))._ipython_display_()
    first, _, second, _ = stored
    assert is_veiled(first[figures.PLOTLY]) and not is_veiled(second[figures.PLOTLY])


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_no_stored_lab_shows_the_picture_of_an_answer(path):
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        folded = False  # the cell has told an answer, whose words are folded
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if figures.PLOTLY in data:
                assert is_veiled(data[figures.PLOTLY]) == folded, "".join(cell["source"])
            page = "".join(data.get("text/html", ""))
            folded |= page.startswith("<details>") and "Show me.</b></summary>" in page
