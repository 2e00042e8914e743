"""Figures in one template: colors that color-blind readers tell apart, in light and dark themes."""

import html
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import Markdown, display

from lablib.lab.intervals import interval

__all__ = ["PALETTE", "bars", "bundle", "figure", "interval", "key", "line", "painted", "show"]

# Okabe and Ito (2008), without black and yellow, which vanish in a dark or a light theme.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#767676")
_INK = "#808080"  # contrast of 4:1 with white and with JupyterLab's dark background
_AXIS = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.5)"}

pio.templates["lablib"] = go.layout.Template(
    layout={
        "colorway": PALETTE,
        "font": {"color": _INK, "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 70, "r": 20, "t": 60, "b": 55},
        "title": {"x": 0.02, "xanchor": "left", "font": {"size": 15}},
        "legend": {"bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"font": {"color": "black"}, "bgcolor": "white"},
        "xaxis": {**_AXIS, "automargin": True, "title": {"standoff": 8}},
        "yaxis": {**_AXIS, "automargin": True, "title": {"standoff": 8}},
        "colorscale": {"sequential": "Viridis", "diverging": "RdBu"},
        "height": 400,
    }
)


def figure(title: str = "", x: str = "", y: str = "", **layout: Any) -> go.Figure:
    """An empty figure in lablib's template. x, y: the axes' names, with units."""
    made = go.Figure()
    made.update_layout(template="lablib", title_text=title, xaxis_title=x, yaxis_title=y, **layout)
    return made


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
    style = {"mode": "lines+markers", "line": {"color": color, "width": 2}} | style
    fig.add_scatter(x=list(x), y=means, name=name, legendgroup=name, showlegend=True, **style)
    return fig


def bars(fig: go.Figure, names: Sequence[str], runs: Any, **style: Any) -> go.Figure:
    """Add one bar a name: mean and 95 % interval of its row of `runs` (len(names), seeds)."""
    rows = [interval(row) for row in np.atleast_2d(np.asarray(runs, dtype=float))]
    half = [high - mean if np.isfinite(high) else 0 for mean, _, high in rows]
    colors = [PALETTE[place % len(PALETTE)] for place in range(len(names))]
    style = {"marker_color": colors, "showlegend": False, "texttemplate": "%{y:.3g}"} | style
    error = {"array": half, "color": _INK, "thickness": 1.5}
    fig.add_bar(x=list(names), y=[mean for mean, _, _ in rows], error_y=error, **style)
    return fig


def _faded(color: str, alpha: float = 0.2) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def bundle(fig: go.Figure, alt: str = "") -> dict[str, Any]:
    """A figure as Jupyter's MIME bundle: Plotly's JSON, and its text alternative."""
    alt = alt or (fig.layout.title.text or "figure")
    return {"application/vnd.plotly.v1+json": json.loads(fig.to_json()), "text/plain": alt}


def show(fig: go.Figure, alt: str = "") -> None:
    """Show a figure and, below it, its text alternative: what a reader should see in it."""
    if "google.colab" in sys.modules:
        fig.show(renderer="colab")
    else:
        display(bundle(fig, alt), raw=True)
    if alt:
        display(Markdown(f"*{alt}*"))


def painted(pieces: Sequence[str], colors: Sequence[str], titles: Sequence[str] = ()) -> str:
    """HTML of a text whose pieces have their own background; titles show under the pointer.

    colors: as CSS writes them, one a piece; an opaque one takes black letters, one with an alpha
    below 1 the theme's.
    """
    spans = []
    for piece, color, title in zip(pieces, colors, titles or [""] * len(pieces), strict=True):
        style = f"background:{color}" + ("" if color.startswith("rgba") else ";color:black")
        told = f' title="{html.escape(title)}"' if title else ""
        spans.append(f'<span style="{html.escape(style)}"{told}>{html.escape(piece)}</span>')
    look = "font:16px monospace;line-height:1.7;white-space:pre-wrap;margin-top:.5em"
    return f'<div style="{look}">{"".join(spans)}</div>'


def key(labels: Sequence[str], colors: Sequence[str]) -> str:
    """HTML of what the colors of `painted` mean, on one line."""
    return painted([f" {label} " for label in labels], colors)
