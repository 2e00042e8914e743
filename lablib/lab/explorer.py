"""Explorers: controls bound to a pure function, above what it makes of their values."""

import html
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets
from IPython.display import HTML, display

from lablib.evidence import tiers
from lablib.lab import figures
from lablib.lab.frames import recorded
from lablib.lab.place import place
from lablib.lab.ranges import loose
from lablib.lab.veil import answers, veiled
from lablib.lab.widgets import STYLE, TEXTS, Panel, control, moves, rehearsed, view

# What follows a reader's own widget: one for each function, so that a cell run again replaces it.
_followers: dict[tuple[str, str], Callable[[Any], None]] = {}


class Explorer:
    """Controls above what the function makes of them. `figure` is what is shown now, `data` its
    MIME bundle, `seconds` how long it took, `failure` the last exception; `controls` the widgets
    by parameter.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        controls: Mapping[str, Any],
        labels: Mapping[str, str] | None = None,
    ):
        labels = labels or {}
        if unknown := set(labels) - set(controls):
            raise ValueError(f"labels for {', '.join(sorted(unknown))}, which no control is called")
        self.function = function
        self.controls = {name: control(name, v, labels.get(name)) for name, v in controls.items()}
        self.figure: Any = None
        self.data: dict[str, Any] = {}
        self.failure: Exception | None = None
        self.seconds = 0.0
        self._place = place()
        for widget in self.controls.values():
            _follow(widget, function, self._moved)
        self.draw()

    @property
    def error(self) -> str:
        """The last failure's one line; empty when the function returned."""
        name, text = type(self.failure).__name__, str(self.failure)
        return f"{name}: {text}".splitlines()[0] if self.failure else ""

    def draw(self) -> None:
        """Call the function with the controls' values and show what it returns, in place."""
        start = time.perf_counter()
        try:
            values = {name: widget.value for name, widget in self.controls.items()}
            self.figure, self.failure = self.function(**values), None
            self.data = _bundle(self.figure)
        except Exception as error:
            self.failure = error
            line = html.escape(self.error)
            self.data = {"text/html": f"<pre>{line}</pre>", "text/plain": self.error}
        self.seconds = time.perf_counter() - start
        self._place.change(self.data)

    def _moved(self, change: Any) -> None:
        self.draw()

    def _made(self, *values: Any) -> dict[str, Any]:
        return _bundle(self.function(**dict(zip(self.controls, values))))

    def _ipython_display_(self) -> None:
        if tiers.static():
            shown = veiled(self.data) if answers() else self.data
            display(shown | recorded(self.controls, self._made), raw=True)
            names = ", ".join(widget.description for widget in self.controls.values())
            display(HTML(f"<i>Run this cell to move: {html.escape(names)}.</i>"))
            return
        panel = Panel(list(self.controls.values()), "lablib-explore")
        display(view(panel), raw=True)
        self._place.put(self.data)
        display(HTML(STYLE))


def _follow(widget: ipywidgets.Widget, function: Callable, moved: Callable[[Any], None]) -> None:
    key = (widget.model_id, getattr(function, "__qualname__", repr(function)))
    if key in _followers:
        widget.unobserve(_followers[key], names="value")
    _followers[key] = moved
    widget.observe(moved, names="value")


def _bundle(made: Any) -> dict[str, Any]:
    if hasattr(made, "to_plotly_json"):
        return figures.bundle(made)
    if isinstance(made, str) or hasattr(made, "data"):
        text = made if isinstance(made, str) else made.data
        return {"text/html": text, "text/plain": text}
    return {"text/html": f"<pre>{html.escape(str(made))}</pre>", "text/plain": str(made)}


def explore(
    function: Callable[..., Any], labels: Mapping[str, str] | None = None, **controls: Any
) -> Explorer:
    """Bind controls to a pure function of their values that returns a Plotly figure (or HTML).

    controls, one a parameter: (low, high[, step[, start]]) makes a slider, a list or dict a menu, a
    bool a checkbox, a str a text box; an ipywidget is taken as it is. labels: parameter -> what the
    reader reads beside its control. Make it a cell's last line.

    An exception in the function shows up in place, as one line. Text from the reader that the
    function puts into HTML or a figure must be escaped by it. Under a slider the ranges of axes and
    color scales stay: see `figures.fixed`. Under test (smoke tier, LABLIB_STATIC=1) each control is
    moved, and what breaks one of these rules raises AssertionError.
    """
    made = Explorer(function, controls, labels)
    if rehearsed():
        rehearse(made)
    return made


def rehearse(explorer: Explorer) -> None:
    """Move each control, one at a time, as far as a reader can; then put all back.

    Raises AssertionError when the function does, when a tag of the reader's is shown unescaped, or
    when a slider or checkbox moves the range of an axis or color scale.
    """
    _inspect(explorer, "as it starts")
    kept = explorer.figure, explorer.data, explorer.seconds
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, widget in explorer.controls.items():
        held = _spans(kept[0]) if _measures(widget) else {}
        for figure in _moved_to(explorer, name, widget):
            for key, span in (_spans(figure) if held else {}).items():
                spans.setdefault(key, [held[key]] if key in held else []).append(span)
    explorer.figure, explorer.data, explorer.seconds = kept
    _hold_still(explorer, spans)


def _moved_to(explorer: Explorer, name: str, widget: ipywidgets.Widget) -> list[Any]:
    """What the function made of each move of one control; the control is where it was, after."""
    made = []
    todo = moves(widget)
    start = {trait: getattr(widget, trait) for trait, _ in todo}
    for trait, value in todo:
        if value != start[trait]:
            setattr(widget, trait, value)
            _inspect(explorer, f"{name} = {str(widget.value)[:60]!r}")
            made.append(explorer.figure)
    widget.unobserve(explorer._moved, names="value")
    for trait, value in start.items():
        setattr(widget, trait, value)
    widget.observe(explorer._moved, names="value")
    return made


def _inspect(explorer: Explorer, where: str) -> None:
    name = getattr(explorer.function, "__name__", "function")
    if explorer.failure:
        raise AssertionError(f"{name}, {where}: {explorer.error}") from explorer.failure
    shown = [value for kind, value in explorer.data.items() if kind != "text/plain"]
    if TEXTS[-1] in json.dumps(shown, ensure_ascii=False):
        raise AssertionError(f"{name}, {where}: escape the reader's text, with html.escape")


def _measures(widget: ipywidgets.Widget) -> bool:
    """Whether a control goes along a scale: another menu entry may have axes of its own."""
    return not hasattr(widget, "options") and isinstance(widget.value, (int, float))


def _spans(made: Any) -> dict[str, tuple[float, float]]:
    return loose(made) if hasattr(made, "to_plotly_json") else {}


def _hold_still(explorer: Explorer, spans: Mapping[str, list[tuple[float, float]]]) -> None:
    wanted = []
    for key, seen in spans.items():
        low, high = min(span[0] for span in seen), max(span[1] for span in seen)
        slack = 0.02 * (high - low)
        if any(span[0] > low + slack or span[1] < high - slack for span in seen):
            wanted.append(f"{key}: {low:.4g} to {high:.4g}")
    if wanted:
        name = getattr(explorer.function, "__name__", "function")
        raise AssertionError(
            f"{name}: ranges that move with a slider ({'; '.join(wanted)}): hold them with "
            "figures.fixed, or set autorange=True on an axis that should move"
        )
