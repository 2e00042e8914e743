import json

import numpy as np
import pytest

from lablib.lab import figures, paint, ranges

PLOTLY = "application/vnd.plotly.v1+json"


def test_painted_text_is_escaped_and_keeps_its_pieces():
    made = figures.painted(["<b>", " a"], ["#ffffff", "rgba(0,0,0,.5)"], ['"x"', ""])
    assert "<b>" not in made and "&lt;b&gt;" in made and "&quot;x&quot;" in made
    assert made.count("color:black") == 1  # the transparent one keeps the theme's letters
    with pytest.raises(ValueError, match="shorter"):
        figures.painted(["a", "b"], ["#ffffff"])


def test_contrast_is_wcags():
    assert paint.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert paint.contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    assert paint.contrast("#ffffff", "#ff0000") == pytest.approx(4.00, abs=0.01)


def test_text_has_a_contrast_of_four_and_a_half_in_any_theme():
    look = figures.figure().layout.template.layout
    # An opaque ground: the same under a light and a dark theme.
    assert (look.paper_bgcolor, look.plot_bgcolor) == (paint.PAPER, paint.PAPER)
    assert paint.contrast(look.font.color, look.paper_bgcolor) >= 4.5
    for color in paint.PALETTE:
        letters = "#ffffff" if "color:white" in figures.painted(["a"], [color]) else "#000000"
        assert paint.contrast(letters, color) >= 4.5, color
    # Why there is a ground: no gray does on both of JupyterLab's.
    grays = [f"#{level:02x}{level:02x}{level:02x}" for level in range(256)]
    both = [min(paint.contrast(gray, "#ffffff"), paint.contrast(gray, "#111111")) for gray in grays]
    assert max(both) < 4.5


def test_figures_have_a_template_bands_and_a_text_alternative(shown):
    fig = figures.figure("t", x="steps", y="nats")
    figures.line(fig, [1, 2], [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], "a")
    figures.line(fig, [1, 2], [1.0, 2.0], "b")
    assert [trace.name for trace in fig.data] == [None, "a", "b"]
    assert list(fig.data[1].y) == [2.0, 4.0]
    assert fig.data[1].line.color != fig.data[2].line.color
    figures.show(fig, alt="a <falls>")
    assert "'text/plain': 'a <falls>. Line chart. x axis: steps" in shown[0]
    assert shown[1] == "<i>a &lt;falls&gt;</i>"
    assert fig.layout.width is None and fig.layout.template.layout.width is None


def test_numbers_stand_under_bars_where_no_whisker_is():
    fig = figures.bars(figures.figure(), ["a", "b"], [[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    (bar,) = fig.data
    assert list(bar.y) == [2.0, 4.0] and bar.error_y.array[1] == 0
    assert list(bar.x) == ["a<br>2", "b<br>4"] and bar.text is None and bar.texttemplate is None


def test_pairs_are_drawn_as_differences():
    dense = np.array([4.0, 4.2, 4.4, 4.1])
    fig = figures.paired(dense - [0.1, 0.2, 0.3, 0.2], dense, ("8 experts", "dense"), "nats")
    seeds, mean = fig.data
    assert np.allclose(seeds.x, [-0.1, -0.2, -0.3, -0.2]) and mean.x[0] == pytest.approx(-0.2)
    low = mean.x[0] - mean.error_x.array[0]
    assert low == pytest.approx(figures.interval([-0.1, -0.2, -0.3, -0.2])[1])
    (label,) = fig.layout.yaxis.ticktext
    assert label == "8 experts<br>-0.2 [-0.33, -0.0701]"
    assert fig.layout.xaxis.title.text == "minus dense, nats (← better)"
    assert [(line.x0, line.x1) for line in fig.layout.shapes] == [(0, 0)]
    with pytest.raises(ValueError, match="as many runs"):
        figures.paired([1.0], [1.0, 2.0])


def test_rows_of_differences():
    rows = {"4": [-0.1, -0.2], "8 <experts>": [0.3, 0.4], "16": [1.0]}
    fig = figures.differences(rows, baseline="dense", better="higher")
    assert len(fig.data) == 6 and "better →" in fig.layout.xaxis.title.text
    assert fig.layout.yaxis.ticktext[2] == "16<br>+1" and fig.data[5].error_x.array is None
    top, bottom = fig.layout.yaxis.range[::-1]
    for trace in fig.data:
        assert all(top < height < bottom for height in trace.y)
    assert len(set(fig.data[0].y)) == 2, "no seed hides another"
    with pytest.raises(ValueError, match="'up'; it can be lower or higher"):
        figures.differences(rows, better="up")


def test_fixed_holds_axes_and_colors():
    fig = figures.figure().add_heatmap(z=[[1, 2]]).add_scatter(x=[1], y=[2])
    fig.add_scatter(x=[1], y=[2], marker_color=[3.0]).update_yaxes(autorange="reversed")
    fig.update_xaxes(type="log")
    figures.fixed(fig, x=(1, 100), y=(0, 5), color=(0, 9))
    assert fig.layout.xaxis.range == (0, 2) and fig.layout.yaxis.range == (5, 0)
    assert (fig.data[0].zmin, fig.data[0].zmax) == (0, 9)
    assert (fig.data[2].marker.cmin, fig.data[2].marker.cmax) == (0, 9)
    assert ranges.loose(fig) == {}


def test_what_plotly_would_choose_is_loose():
    fig = figures.figure().add_bar(x=["a", "b"], y=[2.0, 3.0]).add_scatter(x=["a"], y=[-1.0])
    assert ranges.loose(fig) == {"y": (-1, 3)}
    assert ranges.loose(figures.figure().add_bar(y=["a"], x=[2.0], orientation="h")) == {
        "x": (0, 2)
    }
    fig = figures.figure().add_heatmap(z=[[1, 2], [3, 4]], x=[5, 6], y=[7, 8])
    assert ranges.loose(fig) == {"x": (5, 6), "y": (7, 8), "color": (1, 4)}
    assert "x" not in ranges.loose(fig.update_xaxes(range=[0, 9]))
    assert "y" not in ranges.loose(fig.update_yaxes(autorange=True))
    second = figures.figure().add_scatter(x=[1], y=[2], yaxis="y2")
    assert ranges.loose(second) == {"x": (1, 1), "y2": (2, 2)}
    assert "x" not in ranges.loose(second.update_xaxes(type="category"))
    assert ranges.loose(figures.figure().add_pie(values=[1, 2])) == {}


def test_a_bundle_is_json():
    fig = figures.line(figures.figure("t"), [1, 2], np.ones((3, 2)), "a")
    told = "t. Line chart. x axis: 1 to 2. y axis: 1. a: from 1 to 1"
    assert json.loads(json.dumps(figures.bundle(fig)))["text/plain"] == told
