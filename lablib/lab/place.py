"""An output of a cell that changes in place and stays in the saved notebook."""

from typing import Any
from uuid import uuid4

from IPython.display import display, update_display

from lablib.lab.figures import PLOTLY
from lablib.lab.paint import PAPER


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


def _blank(plot: dict[str, Any]) -> dict[str, str]:
    """As high as the plot, so that the page stays where it is."""
    height = plot["layout"].get("height") or 360  # JupyterLab's, where a figure has none
    style = f"height:{height}px;background:{PAPER}"
    return {"text/html": f'<div style="{style}"></div>', "text/plain": ""}
