"""A picture that is stored with a notebook, and hidden until its reader asks for it."""

from typing import Any

from IPython import get_ipython

from lablib.lab.alternatives import carrying
from lablib.lab.figures import PLOTLY

HIDDEN = "The picture is hidden. Its button shows it."
SHOW = "Show the picture"
_answered: int | None = None  # the number of the last cell that told an answer


def veiled(data: dict[str, Any]) -> dict[str, Any]:
    """A figure's MIME bundle with nothing to be seen in it but a button that shows all of it.

    Plotly draws the button itself, so it works without a kernel: in a stored notebook, and on the
    site. Data that holds no Plotly figure comes back as it is.
    """
    if PLOTLY not in data or is_veiled(data[PLOTLY]):
        return data
    plot = data[PLOTLY]
    layout = plot["layout"]
    hidden = _hidden(layout)
    shown = {**{key: layout.get(key) for key in hidden}, **_axes(layout)}
    visible = [trace.get("visible", True) for trace in plot["data"]]
    button = {
        "label": SHOW,
        "method": "update",
        "args": [{"visible": visible}, {**shown, "updatemenus": []}],
    }
    menu = {
        "type": "buttons",
        "buttons": [button],
        "showactive": False,
        **{"x": 0.5, "xanchor": "center", "y": 0.5, "yanchor": "middle"},
    }
    still = {key: value for key, value in layout.items() if key not in hidden}
    for axis in _axis_names(layout):
        still[axis] = {**layout.get(axis, {}), "visible": False}
    traces = [{**trace, "visible": False} for trace in plot["data"]]
    covered = {**plot, "data": traces, "layout": {**still, "updatemenus": [menu]}}
    return {**data, PLOTLY: carrying(covered, HIDDEN), "text/plain": HIDDEN}


def answer() -> None:
    """Say that the cell that runs tells an answer; its pictures further down may tell it, too."""
    global _answered
    _answered = _cell()


def answers() -> bool:
    """Whether the cell that runs has told an answer."""
    return _answered is not None and _answered == _cell()


def _cell() -> int | None:
    shell = get_ipython()
    return None if shell is None else shell.execution_count


def is_veiled(plot: dict[str, Any]) -> bool:
    """Whether a figure is hidden behind its button."""
    menus = plot["layout"].get("updatemenus", [])
    return any(button["label"] == SHOW for menu in menus for button in menu.get("buttons", []))


def _hidden(layout: dict[str, Any]) -> set[str]:
    """What of a layout may tell the answer, beside traces and axes."""
    return {key for key in ("title", "shapes", "annotations") if layout.get(key)}


def _axes(layout: dict[str, Any]) -> dict[str, bool]:
    names = _axis_names(layout)
    return {f"{axis}.visible": layout.get(axis, {}).get("visible", True) for axis in names}


def _axis_names(layout: dict[str, Any]) -> list[str]:
    named = {key for key in layout if key.startswith(("xaxis", "yaxis"))}
    return sorted(named | {"xaxis", "yaxis"})
