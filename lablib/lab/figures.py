"""Figures in one template: colors that color-blind readers tell apart, on white in any theme."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import HTML, display

from lablib.evidence.intervals import interval
from lablib.lab import colab
from lablib.lab.alternatives import alternative, carrying
from lablib.lab.channels import distinct
from lablib.lab.paint import INK, PALETTE, PAPER, key, painted
from lablib.lab.ranges import fixed

__all__ = [
    "PALETTE",
    "bars",
    "bundle",
    "differences",
    "figure",
    "fixed",
    "interval",
    "key",
    "line",
    "painted",
    "paired",
    "show",
]

PLOTLY = "application/vnd.plotly.v1+json"
_AXIS = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.5)"}

pio.templates["lablib"] = go.layout.Template(
    layout={
        "colorway": PALETTE,
        "font": {"color": INK, "size": 13},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 70, "r": 20, "t": 60, "b": 55},
        "title": {"x": 0.02, "xanchor": "left", "font": {"size": 15}},
        "legend": {"bgcolor": "rgba(0,0,0,0)", "itemwidth": 40},  # two dashes of a dashed line
        "hoverlabel": {"font": {"color": "black"}, "bgcolor": "white"},
        "xaxis": {**_AXIS, "automargin": True, "title": {"standoff": 8}},
        "yaxis": {**_AXIS, "automargin": True, "title": {"standoff": 8}},
        "colorscale": {"sequential": "Viridis", "diverging": "RdBu"},
    }
)


def figure(title: str = "", x: str = "", y: str = "", **layout: Any) -> go.Figure:
    """An empty figure in lablib's template. x, y: the axes' names, with units."""
    layout = {"title_text": title, "xaxis_title": x, "yaxis_title": y, "height": 400} | layout
    return go.Figure().update_layout(template="lablib", **layout)


def line(fig: go.Figure, x: Sequence, runs: Any, name: str, **style: Any) -> go.Figure:
    """Add the mean of `runs` over `x`, with a 95 % band when there are several seeds.

    runs: (seeds, len(x)) or (len(x),). Colors follow the order in which lines are added.
    """
    runs = np.atleast_2d(np.asarray(runs, dtype=float))
    count = sum(
        trace.legendgroup is not None for trace in fig.data if trace.showlegend is not False
    )
    color = style.pop("color", PALETTE[count % len(PALETTE)])
    means, lows, highs = np.array([interval(column) for column in runs.T]).T
    if len(runs) > 1:
        band = {"x": [*x, *reversed(list(x))], "y": [*highs, *lows[::-1]], "fill": "toself"}
        shade = {"fillcolor": _faded(color), "line": {"width": 0}, "hoverinfo": "skip"}
        fig.add_scatter(**band, **shade, mode="lines", legendgroup=name, showlegend=False)
    look = {"line": {"color": color, "width": 2}, "marker": {"size": 8}}
    style = {"mode": "lines+markers"} | look | style
    fig.add_scatter(x=list(x), y=means, name=name, legendgroup=name, showlegend=True, **style)
    return fig


def bars(fig: go.Figure, names: Sequence[str], runs: Any, **style: Any) -> go.Figure:
    """Add one bar a name: mean and 95 % interval of its row of `runs` (len(names), seeds).

    The mean stands under the bar's name, where no whisker strikes it through.
    """
    rows = [interval(row) for row in np.atleast_2d(np.asarray(runs, dtype=float))]
    half = [high - mean if np.isfinite(high) else 0 for mean, _, high in rows]
    colors = [PALETTE[place % len(PALETTE)] for place in range(len(names))]
    style = {"marker_color": colors, "showlegend": False} | style
    error = {"array": half, "color": INK, "thickness": 1.5}
    under = [f"{name}<br>{mean:.3g}" for name, (mean, _, _) in zip(names, rows, strict=True)]
    fig.add_bar(x=under, y=[mean for mean, _, _ in rows], error_y=error, **style)
    return fig


def paired(
    method: Sequence[float],
    baseline: Sequence[float],
    names: tuple[str, str] = ("method", "baseline"),
    unit: str = "",
    better: str = "lower",
) -> go.Figure:
    """Method against baseline, seed by seed: a point a seed, the mean and its 95 % interval.

    method, baseline: (seeds,), the same seeds in the same order. unit: of both. better: whether a
    "lower" or a "higher" difference speaks for the method. Raises ValueError when lengths differ.
    """
    ours, theirs = (np.asarray(runs, dtype=float) for runs in (method, baseline))
    if ours.shape != theirs.shape:
        raise ValueError(f"pairs need as many runs: {ours.shape} and {theirs.shape}")
    fig = differences({names[0]: ours - theirs}, baseline=names[1], unit=unit, better=better)
    return fig.update_layout(title_text=f"{names[0]} minus {names[1]}, seed by seed")


def differences(
    rows: Mapping[str, Sequence[float]],
    *,
    baseline: str = "baseline",
    unit: str = "",
    better: str = "lower",
) -> go.Figure:
    """Several methods against one baseline, a row each, as in `paired`.

    rows: method -> its differences, method minus baseline, one a seed.
    """
    sides = {"lower": "← better", "higher": "better →"}
    if better not in sides:
        raise ValueError(f"better is {better!r}; it can be lower or higher")
    name = f"minus {baseline}" + (f", {unit}" if unit else "")
    fig = figure("Differences, seed by seed", x=f"{name} ({sides[better]})")
    fig.update_layout(height=150 + 75 * len(rows), showlegend=False)
    for place, values in enumerate(rows.values()):
        _row(fig, place, np.asarray(values, dtype=float))
    labels = [f"{name}<br>{_interval_text(values)}" for name, values in rows.items()]
    fig.add_vline(x=0, line_color=INK, line_width=1.5)
    fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, zeroline=False)
    return fig.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False)


def _row(fig: go.Figure, place: int, values: np.ndarray) -> None:
    """Add one row of `differences`: seeds above and below each other, the mean between them."""
    color = PALETTE[place % len(PALETTE)]
    mean, _, high = interval(values)
    heights = place + np.linspace(-0.3, 0.3, len(values)) if len(values) > 1 else [place]
    seeds = {"size": 8, "color": color, "opacity": 0.5}
    told = [f"run {run + 1}: {value:+.4g}<extra></extra>" for run, value in enumerate(values)]
    fig.add_scatter(x=values, y=heights, mode="markers", marker=seeds, hovertemplate=told)
    reach = {"array": [high - mean], "thickness": 2.5, "color": INK, "width": 7}
    shape = {"size": 13, "symbol": "diamond", "color": color, "line": {"color": INK, "width": 1.5}}
    whisker = reach if np.isfinite(high) else None
    told = f"mean {_interval_text(values)}<extra></extra>"
    fig.add_scatter(
        x=[mean], y=[place], mode="markers", marker=shape, error_x=whisker, hovertemplate=told
    )


def _interval_text(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:+.3g}" + (f" [{low:+.3g}, {high:+.3g}]" if np.isfinite(high) else "")


def _faded(color: str, alpha: float = 0.2) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def bundle(fig: go.Figure, alt: str = "") -> dict[str, Any]:
    """A figure as Jupyter's MIME bundle: Plotly's JSON (on Colab its HTML), and a text alternative.

    alt: the author's text, else that in the figure's `layout.meta["alt"]`, else the title; what is
    drawn follows it. See `lablib.lab.alternatives`.
    """
    plot = distinct(json.loads(fig.to_json()))
    text = alternative(plot, alt or (fig.layout.meta or {}).get("alt") or "")
    plot = carrying(plot, text)
    if colab.here():
        return {"text/html": colab.page(go.Figure(plot)), "text/plain": text}
    return {PLOTLY: plot, "text/plain": text}


def show(fig: go.Figure, alt: str = "") -> None:
    """Show a figure and, below it, its text alternative: what a reader should see in it."""
    display(bundle(fig, alt), raw=True)
    if alt:
        display(HTML(f"<i>{html.escape(alt)}</i>"))
