"""Widgets: controls bound to a pure function, and guesses made before the answer is shown."""

import html
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from IPython.display import HTML, clear_output, display

from lablib.lab import figures, tiers

WIDE = ipywidgets.Layout(width="min(460px, 95%)")


def control(name: str, value: Any) -> ipywidgets.Widget:
    """The widget for one parameter: (low, high[, step[, start]]) a slider, a list a menu, a bool a
    checkbox, a str a text box; a widget is taken as it is. Raises TypeError for anything else.
    """
    label = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(value, ipywidgets.Widget):
        return value
    if isinstance(value, bool):
        return ipywidgets.Checkbox(value=value, indent=False, **label)
    if isinstance(value, str):
        return ipywidgets.Text(value=value, layout=WIDE, continuous_update=False, **label)
    if isinstance(value, tuple) and 2 <= len(value) <= 4:
        return _slider(label, *value)
    if isinstance(value, (list, dict, range)) and len(value):
        options = list(value) if isinstance(value, range) else value
        return ipywidgets.Dropdown(options=options, layout=WIDE, **label)
    raise TypeError(f"{name}: {value!r} is no (low, high), list, bool, str or widget")


def _slider(label: dict, low, high, step=None, start=None) -> ipywidgets.Widget:
    whole = all(isinstance(bound, int) for bound in (low, high, step or 1, start or 0))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = step or (1 if whole else (high - low) / 50)
    start = low if start is None else start
    return kind(value=start, min=low, max=high, step=step, layout=WIDE, **label)


class Explorer:
    """Controls above what the function makes of them. `figure` is what is shown now, `seconds` how
    long it took, `error` the last failure's one line; `controls` the widgets by parameter.
    """

    def __init__(self, function: Callable[..., Any], controls: dict[str, Any]):
        self.function = function
        self.controls = {name: control(name, value) for name, value in controls.items()}
        self.figure: Any = None
        self.error = ""
        self.seconds = 0.0
        self.area = ipywidgets.Output()
        self.widget = ipywidgets.VBox([*self.controls.values(), self.area])
        self.widget.add_class("lablib-explore")
        for widget in self.controls.values():
            widget.observe(lambda change: self.draw(), names="value")
        self.draw()

    def draw(self) -> None:
        """Call the function with the controls' values and show what it returns, in place."""
        start = time.perf_counter()
        try:
            values = {name: widget.value for name, widget in self.controls.items()}
            self.figure, self.error = self.function(**values), ""
            data = _bundle(self.figure)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}".splitlines()[0]
            data = {"text/html": f"<pre>{html.escape(self.error)}</pre>", "text/plain": self.error}
        self.seconds = time.perf_counter() - start
        if "google.colab" in sys.modules:
            self._draw_on_colab()
        else:
            shown = {"output_type": "display_data", "data": data, "metadata": {}}
            self.area.outputs = (shown,)

    def _draw_on_colab(self) -> None:
        # Colab renders Plotly through its own renderer only, inside the area's context.
        with self.area:
            clear_output(wait=True)
            if self.error or not hasattr(self.figure, "to_json"):
                display(
                    HTML(f"<pre>{html.escape(self.error)}</pre>" if self.error else self.figure)
                )
            else:
                self.figure.show(renderer="colab")

    def _ipython_display_(self) -> None:
        if not tiers.static():
            display(self.widget)
            return
        names = ", ".join(name.replace("_", " ") for name in self.controls)
        display(_bundle(self.figure) if not self.error else {"text/plain": self.error}, raw=True)
        display(HTML(f"<i>Run this cell to move: {html.escape(names)}.</i>"))


def _bundle(made: Any) -> dict[str, Any]:
    if hasattr(made, "to_plotly_json"):
        return figures.bundle(made, (made.layout.meta or {}).get("alt", ""))
    text = made if isinstance(made, str) else getattr(made, "data", str(made))
    return {"text/html": text, "text/plain": text}


def explore(function: Callable[..., Any], **controls: Any) -> Explorer:
    """Bind controls to a pure function of their values that returns a Plotly figure (or HTML).

    controls, one a parameter: (low, high[, step[, start]]) makes a slider, a list or dict a menu, a
    bool a checkbox, a str a text box; an ipywidget is taken as it is. Make it a cell's last line.
    An exception in the function shows up in place, as one line. Text from the reader that the
    function puts into HTML must be escaped by it.
    """
    return Explorer(function, controls)


class Guess:
    """A guess that the reader makes before the result is shown. `value` is None until then."""

    def __init__(
        self, question: str, picker: ipywidgets.Widget, unit: str, options: Sequence[str] = ()
    ):
        self.question, self.unit, self.options = question, unit, tuple(options)
        self.value: Any = None
        self.actual: Any = None
        self._picker = picker
        self._reply = ipywidgets.HTML()
        picker.observe(self._take, names="value")

    def _take(self, change: dict) -> None:
        self.value = change["new"]
        known = self.actual is not None
        self._reply.value = html.escape(self._verdict() if known else "Noted. Now run on.")

    def _verdict(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        actual = f"{self.actual:.4g}" if isinstance(self.actual, float) else str(self.actual)
        if self.value is None:
            return f"Measured: {actual}{unit}. (You made no guess.)"
        guess = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        same = " Right." if self.value == self.actual else ""
        return f"You guessed {guess}{unit}; measured: {actual}{unit}.{same}"

    def reveal(self, actual: Any) -> None:
        """Show the guess beside what was measured."""
        self.actual = actual
        text = self._verdict()
        display({"text/html": f"<b>{html.escape(text)}</b>", "text/plain": text}, raw=True)


def predict(
    question: str,
    options: Sequence[str] | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
) -> Guess:
    """Ask the reader to commit to a guess: one of `options`, or a number from low to high.

    Shows the question and returns the guess; call its `reveal(actual)` where the result is shown.
    Raises ValueError when neither options nor both bounds are given.
    """
    if options:
        picker = ipywidgets.RadioButtons(options=list(options), value=None, layout=WIDE)
    elif low is not None and high is not None:
        picker = _slider({"description": unit or "guess"}, low, high)
        picker.continuous_update = False
    else:
        raise ValueError("predict needs options, or low and high")
    guess = Guess(question, picker, unit, options or ())
    if tiers.static():
        choices = "; ".join(options) if options else f"{low:g} to {high:g} {unit}".strip()
        text = f"Your guess? {question} ({choices})"
        display({"text/html": f"<b>{html.escape(text)}</b>", "text/plain": text}, raw=True)
    else:
        head = ipywidgets.HTML(f"<b>Your guess?</b> {html.escape(question)}")
        box = ipywidgets.VBox([head, picker, guess._reply])
        box.add_class("lablib-predict")
        display(box)
    return guess
