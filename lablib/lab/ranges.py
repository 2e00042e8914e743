"""Ranges of axes and color scales: held still, and told where they are not."""

from typing import Any

import numpy as np
import plotly.graph_objects as go


def fixed(
    fig: go.Figure,
    *,
    x: tuple[float, float] | None = None,
    y: tuple[float, float] | None = None,
    color: tuple[float, float] | None = None,
) -> go.Figure:
    """Hold the ranges of axes and color scales, so that under a slider only the data move.

    x, y, color: lowest and highest value, in the data's unit on a logarithmic axis, too.
    """
    for axes, limits in ((fig.select_xaxes, x), (fig.select_yaxes, y)):
        for axis in axes() if limits else ():
            ends = np.log10(limits).tolist() if axis.type == "log" else list(limits)
            turned = axis.autorange == "reversed"
            axis.update(range=ends[::-1] if turned else ends, autorange=None)
    for low, high, part in _color_scales(fig) if color else ():
        part.update({low: color[0], high: color[1]})
    return fig


def loose(fig: go.Figure) -> dict[str, tuple[float, float]]:
    """The data's extent on each numeric axis and color scale whose range is left to Plotly.

    Keys: "x", "y", "x2", ..., "color". An axis with `autorange=True` asked for it and is left out.
    """
    spans: dict[str, tuple[float, float]] = {}
    for trace in fig.data:
        for letter in "xy":
            name = trace[f"{letter}axis"] or letter if f"{letter}axis" in trace else None
            if name and _is_loose(fig, f"{letter}axis{name[1:]}"):
                _widen(spans, name, _along(trace, letter))
    for low, _, part in _color_scales(fig):
        if part[low] is None:
            _widen(spans, "color", part.z if low == "zmin" else part.color)
    return spans


def _is_loose(fig: go.Figure, name: str) -> bool:
    axis = fig.layout[name] if name in fig.layout else go.layout.XAxis()
    return axis.range is None and axis.autorange is not True and axis.type != "category"


def _color_scales(fig: go.Figure) -> list[tuple[str, str, Any]]:
    """(name of the lower limit, of the upper, what has both) for each trace with its own scale."""
    scales = []
    for trace in fig.data:
        marker = trace["marker"] if "marker" in trace else None  # noqa: SIM401, has no get
        if "zmin" in trace and trace.z is not None:
            scales.append(("zmin", "zmax", trace))
        elif marker is not None and {"cmin", "color"} <= {*marker} and np.ndim(marker.color) == 1:
            scales.append(("cmin", "cmax", marker))
    return scales


def _along(trace: Any, letter: str) -> Any:
    """A trace's values on one axis; bars stand on zero."""
    values = trace[letter]
    if trace.type != "bar" or values is None:
        return values
    high = "x" if trace.orientation == "h" else "y"
    return [0, *values] if letter == high else values


def _widen(spans: dict[str, tuple[float, float]], name: str, values: Any) -> None:
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return  # categories, colors by name, dates
    numbers = numbers[np.isfinite(numbers)]
    if numbers.size:
        low, high = spans.get(name, (np.inf, -np.inf))
        spans[name] = (min(low, float(numbers.min())), max(high, float(numbers.max())))
