"""Every figure is told in words, and told apart by more than its colors."""

import html
import json
from collections import defaultdict

import numpy as np
import plotly.graph_objects as go
import pytest

from lablib.lab import channels, figures, saying
from lablib.lab.alternatives import MOST, NAME, alternative, carrying
from lablib.lab.veil import is_veiled
from lablib.paths import notebooks

LABS = notebooks()


def told(fig, alt=""):
    return alternative(json.loads(fig.to_json()), alt)


def stored(path):
    """The figures in a stored notebook, each with the text beside it."""
    outputs = [
        o for cell in json.loads(path.read_text("utf-8"))["cells"] for o in cell.get("outputs", [])
    ]
    data = [output["data"] for output in outputs if figures.PLOTLY in output.get("data", {})]
    return [(row[figures.PLOTLY], "".join(row["text/plain"])) for row in data]


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_each_figure_of_a_lab_is_told_by_more_than_its_title(path):
    for plot, _ in stored(path):
        if is_veiled(plot):
            continue  # told in the words that are folded beside it
        title = saying.words(plot["layout"].get("title"))
        text = alternative(plot)
        assert len(text) <= MOST and text.isprintable()
        more = text.removeprefix(saying.ended(saying.short(title, 120)))
        assert len(more) > 25 and any(letter.isdigit() for letter in more), text
        axes = [plot["layout"].get(f"{letter}axis", {}).get("title") for letter in "xy"]
        for axis in filter(None, map(saying.words, axes)):
            assert axis in text or text.endswith("…"), f"{axis}: {text}"


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_each_stored_figure_carries_its_text(path):
    for plot, text in stored(path):
        carried = [one for one in plot["layout"].get("annotations", []) if one.get("name") == NAME]
        assert [html.unescape(one["text"]) for one in carried] == [text], text


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_no_two_traces_of_a_lab_differ_by_color_alone(path):
    for plot, _ in stored(path):
        alike = defaultdict(set)
        for place, trace in enumerate(plot["data"]):
            kind = channels.drawn_as(trace)
            if kind and trace.get("name") and trace.get("fill") != "toself":
                sign = channels.at(trace, channels.SIGNS[kind][1])
                alike[kind, str(sign)].add(channels.color_of(trace, place))
        for (kind, sign), colors in alike.items():
            scale = len(colors) > len(channels.SIGNS[kind][0])
            assert len(colors) == 1 or scale, (path.stem, kind, sign, colors)


def test_lines():
    fig = figures.figure("Held-out loss<br><sup>5 seeds</sup>", x="steps", y="loss, nats")
    figures.line(fig, [1, 10, 100], [[4.1, 4.0, 3.9], [4.3, 4.0, 3.7]], "dense")
    fig.add_scatter(x=[1, 10, 100], y=[5000, None, 3.25], name="8 <experts>", mode="lines")
    fig.update_xaxes(type="log")
    low = saying.value(min(fig.data[0].y))
    assert told(fig) == (
        "Held-out loss 5 seeds. Line chart. x axis: steps (logarithmic), 1 to 100. y axis: loss, "
        f"nats, {low} to 5,000. dense: from 4.2 to 3.8; 8 <experts>: from 5,000 to 3.25"
    )
    assert told(fig, "It falls.").startswith("It falls. Line chart.")


def test_bars_and_rows_say_each_number_once():
    fig = figures.bars(figures.figure(x="model", y="bits"), ["a", "b"], [[1.0, 2.0], [4.0, 4.0]])
    assert told(fig) == "Bar chart. x axis: model, a 1.5; b 4. y axis: bits, 1.5 to 4. a 1.5, b 4"
    rows = figures.differences({"4": [-0.1, -0.2]}, baseline="dense", unit="nats")
    assert "x axis: minus dense, nats (← better), -0.2 to -0.1. y axis: 4 -0.15 [" in told(rows)


def test_maps_words_and_drawings():
    cells = go.Figure(go.Heatmap(z=np.arange(6.0).reshape(2, 3), colorbar_title="nats"))
    assert told(cells) == "Heat map. 2 by 3 cells, 0 to 5, nats"
    words = go.Figure(go.Scatter(x=[0, 1], y=[0, 1], text=["one", "two"], mode="text"))
    assert told(words) == "Labels. x axis: 0 to 1. y axis: 0 to 1. one; two"
    assert told(go.Figure().add_annotation(text="a <b>step</b>")) == "Drawing. a step"
    assert told(go.Figure()) == "Drawing."
    dates = go.Figure(go.Scatter(x=["2020-01-02", "2019-01-02"], y=[1, 2], mode="markers"))
    assert "x axis: 2019-01-02 to 2020-01-02" in told(dates)


def test_a_long_one_says_what_it_leaves_out():
    fig = figures.figure("t", x="steps", y="nats")
    for number in range(40):
        figures.line(fig, [1, 2], [1.0, 2.0], f"line number {number}")
    text = told(fig)
    assert MOST - 60 < len(text) <= MOST and text.endswith("; and 29 more")
    author = "word " * 120
    assert told(fig, author.strip()).startswith(author.strip()), "an author's is never cut"


def test_the_text_lies_in_the_figure_where_no_eye_sees_it():
    fig = figures.figure(html.escape("<b>5</b> & 6")).add_annotation(text="mine")
    data = figures.bundle(fig, alt="a <img src=x> falls")
    mine, hidden = data[figures.PLOTLY]["layout"]["annotations"]
    assert mine["text"] == "mine" and hidden["name"] == NAME and hidden["opacity"] == 0
    assert hidden["text"] == "a &lt;img src=x&gt; falls. Drawing. mine"
    assert data["text/plain"] == html.unescape(hidden["text"])
    again = carrying(data[figures.PLOTLY], "another")
    assert len(again["layout"]["annotations"]) == 2, "it replaces the old one"
    assert len(fig.layout.annotations) == 1, "the author's figure stays as it was"
    go.Figure(data[figures.PLOTLY])  # Plotly knows all of it


def test_signs_follow_colors_and_the_authors_stay():
    fig = figures.figure()
    for name, style in {
        "a": {"mode": "lines"},
        "b": {"mode": "lines"},
        "c": {"mode": "lines", "line": {"color": "#111111", "dash": "dot"}},
        "a again": {"mode": "lines", "color": figures.PALETTE[0]},
        "points": {},
        "more points": {},
    }.items():
        figures.line(fig, [1, 2], [1.0, 2.0], name, **style)
    fig.add_bar(x=["x"], y=[1], name="one").add_bar(x=["x"], y=[1], name="two")
    plot = json.loads(fig.to_json())
    before = json.dumps(plot)
    made = channels.distinct(plot)["data"]
    assert json.dumps(plot) == before
    assert [channels.at(t, ("line", "dash")) for t in made[:4]] == ["solid", "dash", "dot", "solid"]
    assert [channels.at(t, ("marker", "symbol")) for t in made[4:6]] == ["circle", "square"]
    assert [channels.at(t, ("marker", "pattern", "shape")) for t in made[6:]] == ["", "/"]
    go.Figure(made)


def test_one_color_or_too_many_need_no_sign():
    fig = figures.figure()
    for number in range(30):
        figures.line(fig, [1, 2], [1.0, 2.0], f"{number}", color=f"#0000{number + 16:02x}")
    plain = [json.loads(part.to_json()) for part in (fig, go.Figure(fig.data[:1]))]
    for plot in plain:
        assert channels.distinct(plot)["data"] == plot["data"]
