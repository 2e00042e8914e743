"""Controls: which widget stands for a value, how it is shown, and what a reader may do to it."""

import html
from pathlib import Path
from typing import Any

import ipywidgets

from lablib.evidence import tiers

WIDE = ipywidgets.Layout(width="min(560px, 95%)")
VIEW = "application/vnd.jupyter.widget-view+json"
AGAIN = "Run this cell to use its controls."
# A saved control without its kernel has no elements, only JupyterLab's "model not found".
_DEAD = ".jp-OutputArea-output.jupyter-widgets:not(:has(*))"
# ipywidgets shows the focus by a border's color alone.
_FOCUS = (
    ":is(.lablib-explore,.lablib-predict,.lablib-show-me).widget-box.widget-vbox :focus-visible"
)
STYLE = (
    f"<style>{_DEAD}{{font-size:0}}"
    f"{_DEAD}::before{{content:'{AGAIN}';font:italic var(--jp-content-font-size1, 14px) "
    "var(--jp-content-font-family, sans-serif)}"
    f"{_FOCUS}{{outline:3px solid var(--jp-brand-color1, #1976d2)!important;outline-offset:2px}}"
    ".lablib-predict .widget-radio-box label{height:auto;line-height:1.5}"  # long answers wrap
    f"</style><script>{Path(__file__).with_name('access.js').read_text('utf-8')}</script>"
)
TEXTS = ("", "To be, or not. " * 333 + "To be", "🙂 👩‍🚀", "<img src=x onerror=alert(1)>")


def control(name: str, value: Any, label: str | None = None) -> ipywidgets.Widget:
    """The widget for one parameter: (low, high[, step[, start]]) a slider, a list a menu, a bool a
    checkbox, a str a text box; a widget is taken as it is. label: in words, instead of the name.
    Raises TypeError for anything else.
    """
    words = name.replace("_", " ") if label is None else label
    look = {"description": words, "style": {"description_width": "initial"}}
    if isinstance(value, ipywidgets.Widget):
        return value
    if isinstance(value, bool):
        return ipywidgets.Checkbox(value=value, indent=False, **look)
    if isinstance(value, str):
        return ipywidgets.Text(value=value, layout=WIDE, continuous_update=False, **look)
    if isinstance(value, tuple) and 2 <= len(value) <= 4:
        return slider(look, *value)
    if isinstance(value, (list, dict, range)) and len(value):
        options = list(value) if isinstance(value, range) else value
        return ipywidgets.Dropdown(options=options, layout=WIDE, **look)
    raise TypeError(f"{name}: {value!r} is no (low, high), list, bool, str or widget")


def slider(look: dict, low, high, step=None, start=None) -> ipywidgets.Widget:
    """A slider from low to high: of whole numbers when all that is given are."""
    whole = all(isinstance(bound, int) for bound in (low, high, step or 1, start or 0))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = step or (1 if whole else (high - low) / 50)
    start = low if start is None else start
    return kind(value=start, min=low, max=high, step=step, layout=WIDE, **look)


def moves(widget: ipywidgets.Widget) -> list[tuple[str, Any]]:
    """(trait, value) for what a reader may do to a control: both ends, every entry, odd texts."""
    value = getattr(widget, "value", None)
    if hasattr(widget, "index") and hasattr(widget, "options"):
        return [("index", place) for place in range(len(widget.options))]
    if isinstance(value, bool):
        return [("value", False), ("value", True)]
    if isinstance(value, str):
        return [("value", text) for text in TEXTS]
    if isinstance(value, tuple) and value and all(isinstance(one, bool) for one in value):
        return [("value", (on,) * len(value)) for on in (False, True)]  # a pad of switches
    if isinstance(value, (int, float)) and hasattr(widget, "min"):
        base = getattr(widget, "base", None)  # of a logarithmic slider, whose ends are exponents
        ends = (widget.min, widget.max)
        return [("value", end if base is None else base**end) for end in ends]
    return []


class Panel(ipywidgets.VBox):
    """Controls, one below the other. When a page is loaded again, it asks for their state, but its
    outputs no longer hear of changes; then a line below them says what to do.
    """

    def __init__(self, children: list[ipywidgets.Widget], name: str):
        super().__init__()
        self.add_class(name)
        # Younger than the panel, so that a page that asks for all states gets it last.
        self._advice = ipywidgets.HTML()
        self.children = (*children, self._advice)

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        if key is None and hasattr(self, "_advice"):
            self._advice.value = "<i>If nothing moves below, run this cell again.</i>"
        return super().get_state(key, drop_defaults=drop_defaults)


def view(widget: ipywidgets.Widget) -> dict[str, Any]:
    """A widget's MIME bundle, with a line in its place where a saved notebook has no kernel."""
    model = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {VIEW: model, "text/plain": AGAIN, "text/html": f"<i>{html.escape(AGAIN)}</i>"}


def rehearsed() -> bool:
    """Whether a test runs the notebook: the smoke tier, with outputs stored, and no reader."""
    return tiers.static() and tiers.current() == "smoke"
