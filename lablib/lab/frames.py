"""Frames: what an explorer shows at the stops of its controls, for pages that have no kernel."""

import itertools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets

KIND = "application/vnd.lablib.frames+json"
MOST = 64  # frames of one explorer
FEW = 4  # stops that a slider keeps, as long as others have more


@dataclass(frozen=True)
class Control:
    """One control as a page can replay it.

    kind: "range", "select", "checkbox", or "" when it has no stops. values: what the function gets
    at each stop. stops: the same as the reader reads them. start: the place it starts at.
    """

    label: str
    kind: str
    values: tuple[Any, ...]
    stops: tuple[str, ...]
    start: int = 0

    @property
    def frozen(self) -> "Control":
        """The same, held where it starts."""
        here = self.start
        return replace(self, values=self.values[here:][:1], stops=self.stops[here:][:1], start=0)

    def thinned(self, count: int) -> "Control":
        """The same with about `count` stops: both ends, where it starts, and what lies between."""
        last = len(self.values) - 1
        kept = sorted({round(i * last / (count - 1)) for i in range(count)} | {self.start})
        values, stops = (tuple(row[i] for i in kept) for row in (self.values, self.stops))
        return replace(self, values=values, stops=stops, start=kept.index(self.start))


def recorded(
    widgets: Mapping[str, ipywidgets.Widget], made: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """What an explorer's output has beside its picture: its frames while LABLIB_FRAMES=1."""
    return {KIND: record(widgets, made)} if os.environ.get("LABLIB_FRAMES") == "1" else {}


def record(
    widgets: Mapping[str, ipywidgets.Widget],
    made: Callable[..., dict[str, Any]],
    most: int = MOST,
) -> dict[str, Any]:
    """What an explorer shows at every combination of its controls' stops, at most `most`.

    made: the MIME bundle for the controls' values, in their order.
    Returns `controls`, each with label, kind, stops and start, and `frames`: a bundle a
    combination, the last control's stops next to each other. A control with one stop stays.
    Raises RuntimeError where `made` does.
    """
    controls = thinned([of(widget) for widget in widgets.values()], most)
    frames = []
    for values in itertools.product(*(control.values for control in controls)):
        try:
            frames.append(made(*values))
        except Exception as error:
            raise RuntimeError(f"no frame for {values}: {type(error).__name__}: {error}") from error
    shown = [
        {"label": c.label, "kind": c.kind, "stops": list(c.stops), "start": c.start}
        for c in controls
    ]
    return {"controls": shown, "frames": frames}


def thinned(controls: list[Control], most: int) -> list[Control]:
    """The controls with at most `most` combinations: sliders lose stops, then the longest menu."""
    controls = list(controls)

    def length(place: int) -> int:
        control = controls[place]
        return len(control.values) * (control.kind == "range")

    while math.prod(len(control.values) for control in controls) > most:
        place = max(range(len(controls)), key=length)
        if length(place) > FEW + 1:  # the start may be one more than asked for
            controls[place] = controls[place].thinned(max(FEW, length(place) // 2))
        else:
            place = max(range(len(controls)), key=lambda i: len(controls[i].values))
            controls[place] = controls[place].frozen
    return controls


def of(widget: ipywidgets.Widget) -> Control:
    """A widget's stops: every entry of a menu, every step of a slider; one stop for a text."""
    label, value = widget.description, widget.value
    if hasattr(widget, "_options_values"):
        kind = "range" if isinstance(widget, ipywidgets.SelectionSlider) else "select"
        words = tuple(str(word) for word in widget._options_labels)
        return Control(label, kind, tuple(widget._options_values), words, widget.index or 0)
    if isinstance(value, bool):
        return Control(label, "checkbox", (False, True), ("no", "yes"), int(value))
    if isinstance(value, (int, float)) and hasattr(widget, "step"):
        return _slider(widget)
    return Control(label, "", (value,), (str(value),))


def _slider(widget: ipywidgets.Widget) -> Control:
    """Every step of a slider, the value that it starts with among them."""
    count = round((widget.max - widget.min) / widget.step)
    steps = [min(widget.min + i * widget.step, widget.max) for i in range(count + 1)]
    base = getattr(widget, "base", None)  # of a logarithmic slider, whose steps are exponents
    values = [step if base is None else base**step for step in steps]
    start = min(range(len(values)), key=lambda i: abs(values[i] - widget.value))
    values[start] = widget.value
    words = tuple(_words(value, getattr(widget, "readout_format", "")) for value in values)
    return Control(widget.description, "range", tuple(values), words, start)


def _words(value: float, style: str) -> str:
    """A number as the slider shows it; d3's formats are nearly Python's."""
    try:
        return format(value, style)
    except ValueError:
        return f"{value:g}"
