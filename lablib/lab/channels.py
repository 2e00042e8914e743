"""A second sign beside color: dashes, symbols and hatching, for who can't tell the colors apart."""

from collections.abc import Sequence
from typing import Any

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down", "hexagon",
    "hourglass",
)  # fmt: skip
HATCHES = ("", "/", ".", "\\", "x", "-", "+", "|")
# What a trace is drawn as -> its signs, and where in the trace the sign stands.
SIGNS: dict[str, tuple[Sequence[str], tuple[str, ...]]] = {
    "line": (DASHES, ("line", "dash")),
    "points": (SYMBOLS, ("marker", "symbol")),
    "bar": (HATCHES, ("marker", "pattern", "shape")),
}

Trace = dict[str, Any]


def distinct(plot: dict[str, Any]) -> dict[str, Any]:
    """The figure, stored as a dictionary, with named traces told apart by more than their color.

    Lines get dashes, points and lines with points symbols, bars hatching: one for each color, in
    the order in which the colors come. What the author has chosen stays. More colors than signs
    are a scale, and stay as they are.
    """
    traces = [_copied(trace) for trace in plot["data"]]
    named = [(trace, color_of(trace, place)) for place, trace in enumerate(traces) if _named(trace)]
    for kind, (signs, path) in SIGNS.items():
        _mark([pair for pair in named if drawn_as(pair[0]) == kind], signs, path)
    return {**plot, "data": traces}


def drawn_as(trace: Trace) -> str:
    """One of SIGNS' keys, or "" for what has none."""
    mode = trace.get("mode") or "lines"
    if trace.get("type", "scatter") != "scatter":
        return trace["type"] if trace["type"] in SIGNS else ""
    return "points" if "markers" in mode else "line" if "lines" in mode else ""


def _mark(pairs: Sequence[tuple[Trace, str]], signs: Sequence[str], path: tuple[str, ...]) -> None:
    """Give each color its own sign, where traces have none."""
    plain = [(trace, color) for trace, color in pairs if at(trace, path) is None]
    taken = {at(trace, path) for trace, _ in pairs}
    free = [one for one in signs if one not in taken]
    colors = list(dict.fromkeys(color for _, color in plain))
    if len({color for _, color in pairs}) < 2 or len(colors) > len(free):
        return
    for trace, color in plain:
        part = trace
        for step in path[:-1]:
            part = part.setdefault(step, {})
        part[path[-1]] = free[colors.index(color)]
        if "pattern" in path:  # over the color, so that numbers in a bar stay readable
            part |= {"fillmode": "overlay", "size": 8, "solidity": 0.15} | part


def at(trace: Trace, path: Sequence[str]) -> Any:
    """What stands at a path in a trace, or None."""
    part: Any = trace
    for step in path:
        part = (part or {}).get(step)
    return part


def _copied(trace: Trace) -> Trace:
    """The trace, to be written into without touching the author's."""
    marker = {**(trace.get("marker") or {})}
    if "pattern" in marker:
        marker["pattern"] = {**marker["pattern"]}
    parts = {"line": {**(trace.get("line") or {})}, "marker": marker}
    return {**trace, **{name: part for name, part in parts.items() if name in trace}}


def _named(trace: Trace) -> bool:
    return bool(trace.get("name")) and trace.get("fill") != "toself"


def color_of(trace: Trace, place: int) -> str:
    """A trace's color; of one that has none, its place in the template's row of colors."""
    return str(at(trace, ("line", "color")) or at(trace, ("marker", "color")) or place)
