"""What is to be seen in a figure, as text for a reader who sees no picture."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lablib.lab import saying as say

MOST = 400  # characters
NAME = "alternative"  # of the annotation that carries the text; access.js looks for it
KINDS = {
    "bar": "Bar chart",
    "heatmap": "Heat map",
    "contour": "Contour map",
    "treemap": "Tree map",
    "icicle": "Tree in layers",
    "scatterternary": "Triangle of three shares",
}

Trace = Mapping[str, Any]


def alternative(plot: Mapping[str, Any], told: str = "") -> str:
    """What is to be seen in a Plotly figure, in at most MOST characters.

    plot: the figure as a dictionary of `data` and `layout`, as stored or from `to_plotly_json`.
    told: the author's own text, which leads in the place of the title, whole however long.
    """
    layout = plot.get("layout", {})
    traces = [trace for trace in plot.get("data", []) if not _is_band(trace)]
    told = say.ended(told or say.short(say.words(layout.get("title")), 120))
    parts = [f"{_kind(traces)}."]
    parts += [f"{letter} axis: {about}." for letter in "xy" if (about := _axis(letter, plot))]
    start = " ".join([told, *parts]).strip()
    drawn = say.listed(_all_series(traces) or _inscriptions(layout), MOST - len(start))
    return say.short(f"{start} {drawn}".strip(), max(MOST, len(told)))


def carrying(plot: dict[str, Any], text: str) -> dict[str, Any]:
    """The figure with `text` in it, seen by no eye and read by every screen reader.

    Plotly and its renderer in JupyterLab take no alternative, and a notebook that is not trusted
    runs no script that could add one; a transparent annotation is text of the page in all of them.
    """
    hidden = {
        "name": NAME,
        "text": html.escape(text, quote=False),
        "opacity": 0,
        "showarrow": False,
        "font": {"size": 1},
        **{"x": 0, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"},
    }
    layout = plot["layout"]
    shown = [one for one in layout.get("annotations", []) if one.get("name") != NAME]
    return {**plot, "layout": {**layout, "annotations": [*shown, hidden]}}


def _kind(traces: Sequence[Trace]) -> str:
    kinds = [KINDS.get(trace.get("type", "scatter")) or _scattered(trace) for trace in traces]
    first, *others = dict.fromkeys(kinds) or ["Drawing"]
    return " and ".join([first, *(kind.lower() for kind in others)])


def _scattered(trace: Trace) -> str:
    mode = trace.get("mode") or "lines"
    return "Line chart" if "lines" in mode else "Scatter plot" if "markers" in mode else "Labels"


def _is_band(trace: Trace) -> bool:
    """Whether a trace is the shade around a line, which says nothing of its own."""
    return trace.get("fill") == "toself" and not (trace.get("line") or {}).get("width", 2)


def _axis(letter: str, plot: Mapping[str, Any]) -> str:
    """The axes of one letter, each once: name with unit, and the extent of what is drawn."""
    axes: dict[str, list[Any]] = {}
    for trace in plot.get("data", []):
        values = say.numbers(trace.get(letter))
        if values is not None or "z" in trace:  # cells without values are counted
            axes.setdefault(trace.get(f"{letter}axis") or letter, []).extend(
                [] if values is None else values
            )
    told = []
    for name, values in axes.items():
        look = plot["layout"].get(f"{letter}axis{name[1:]}") or {}
        ticks = look.get("ticktext")
        extent = say.names(ticks) if ticks is not None and len(ticks) else say.extent(values)
        title = say.words(look.get("title"))
        log = " (logarithmic)" if look.get("type") == "log" and "logar" not in title else ""
        told.append(", ".join(filter(None, [title + log, extent])))
    return "; ".join(dict.fromkeys(filter(None, told)))


def _all_series(traces: Sequence[Trace]) -> list[str]:
    told = [_series(trace) for trace in traces]
    points = say.numbers(traces[0].get("x")) if len(traces) == 1 else None
    return told if any(told) or points is None else [f"{len(points)} points"]


def _inscriptions(layout: Mapping[str, Any]) -> list[str]:
    """What stands in a figure that is drawn of shapes and annotations."""
    return [say.words(one.get("text")) for one in layout.get("annotations", [])]


def _series(trace: Trace) -> str:
    """One trace: its name, and where it goes."""
    name = say.words(trace.get("name"))
    if (cells := trace.get("z")) is not None:
        return say.joined(name, f"{_shape(cells)} cells, {say.extent(_flat(cells))}", _scale(trace))
    if (labels := trace.get("labels")) is not None:
        return say.joined(name, f"{len(labels)} parts: {say.names(labels)}")
    if (shares := say.numbers(trace.get("a"))) is not None:
        return say.joined(name, f"{len(shares)} points")
    x, y = say.numbers(trace.get("x")), say.numbers(trace.get("y"))
    if trace.get("type") == "bar":
        return say.joined(name, _bars(*((y, x) if trace.get("orientation") == "h" else (x, y))))
    return say.joined(name, _drawn(trace, x, y)) if x is not None and y is not None else name


def _drawn(trace: Trace, x: Any, y: Any) -> str:
    """Where a trace of lines, points or words goes."""
    mode, words = trace.get("mode") or "lines", say.numbers(trace.get("text"))
    ends = [value for value in y if value is not None and value == value]  # NaN, where it is broken
    if "lines" in mode and len(ends) > 1:
        return f"from {say.value(ends[0])} to {say.value(ends[-1])}"
    if "text" in mode and words is not None:
        return say.names(words)
    if not trace.get("name") or not ends:
        return ""
    return f"at {say.value(x[0])}, {say.value(y[0])}" if len(y) == 1 else f"{len(y)} points"


def _bars(names: Any, heights: Any) -> str:
    if heights is None or not len(heights):
        return ""
    if len(heights) > 6 or names is None:
        return f"{len(heights)} bars, {say.extent(heights)}"
    pairs = [
        (say.short(say.words(name), 40), say.value(height)) for name, height in zip(names, heights)
    ]
    # `figures.bars` has written the height under the name.
    return ", ".join(n if n.endswith(f" {height}") else f"{n}: {height}" for n, height in pairs)


def _scale(trace: Trace) -> str:
    bar = trace.get("colorbar") or {}
    return say.words(bar.get("title"))


def _shape(cells: Any) -> str:
    rows = say.numbers(cells)
    return f"{len(rows)} by {len(rows[0]) if len(rows) else 0}"


def _flat(cells: Any) -> list[Any]:
    return [value for row in say.numbers(cells) for value in row]
