"""An output of a cell that changes in place and stays in the saved notebook."""

from typing import Any
from uuid import uuid4

import ipywidgets
from IPython.display import clear_output, display, update_display

from lablib.lab import colab
from lablib.lab.figures import PLOTLY
from lablib.lab.paint import PAPER
from lablib.lab.widgets import VIEW, view


class Place:
    """One ordinary stored output, shown once with `put` and then changed with `change`."""

    def __init__(self):
        self._id = uuid4().hex
        self._data: dict[str, Any] = {}

    def put(self, data: dict[str, Any]) -> None:
        """Show a MIME bundle here, below what the cell has shown so far."""
        self._data = data
        display(data, raw=True, display_id=self._id)

    def change(self, data: dict[str, Any]) -> None:
        """Replace what is shown; nothing where nothing is."""
        if not self._data:
            return
        if PLOTLY in data and PLOTLY in self._data:
            # JupyterLab's Plotly renderer draws once; it is replaced when the kind changes.
            update_display(_blank(self._data[PLOTLY]), raw=True, display_id=self._id)
        self._data = data
        update_display(data, raw=True, display_id=self._id)


class OutputPlace(Place):
    """The same, shown in an Output widget, as Colab's own `interact` changes what it shows."""

    def __init__(self):
        super().__init__()
        self.output = ipywidgets.Output()

    def put(self, data: dict[str, Any]) -> None:
        self._data = data
        # A saved notebook without its widgets shows what is put here first.
        display({**data, VIEW: view(self.output)[VIEW]}, raw=True)
        self._fill()

    def change(self, data: dict[str, Any]) -> None:
        if self._data:
            self._data = data
            self._fill()

    def _fill(self) -> None:
        with self.output:
            clear_output(wait=True)
            display(self._data, raw=True)


def place() -> Place:
    """An empty place, of the kind that this page can change."""
    return OutputPlace() if colab.here() else Place()


def _blank(plot: dict[str, Any]) -> dict[str, str]:
    """As high as the plot, so that the page stays where it is."""
    height = plot["layout"].get("height") or 360  # JupyterLab's, where a figure has none
    style = f"height:{height}px;background:{PAPER}"
    return {"text/html": f'<div style="{style}"></div>', "text/plain": ""}
