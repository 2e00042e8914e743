"""The rows of `measure` as one picture: a method a row, a cost a column, the dearer the darker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, float | None]

# Key of a row -> the column's head, and how a value is written beside the first row's.
COLUMNS: dict[str, tuple[str, Callable[[float, float], str]]] = {
    "n_trainable": ("numbers<br>that<br>train", lambda value, first: f"{value:,.0f}"),
    "file_bytes": ("to<br>keep,<br>MB", lambda value, first: f"{value / 1e6:,.2f}"),
    "total": ("step<br>holds,<br>MB", lambda value, first: f"{value / 1e6:,.0f}"),
    "beside": ("beside<br>weights,<br>MB", lambda value, first: f"{value / 1e6:,.1f}"),
    "rise_bytes": ("measured<br>rise,<br>MB", lambda value, first: f"{value / 1e6:,.1f}"),
    "step": ("step<br>takes", lambda value, first: f"{value / first:.2f}"),
    "inference": ("inference<br>takes", lambda value, first: f"{value / first:.2f}"),
    "held_out": ("held<br>out,<br>nats", lambda value, first: f"{value:.2f}"),
    "merge_error": ("off<br>when<br>merged", lambda value, first: f"{value:.0e}"),
}
BLANK = "–"  # not asked for, or not to be told of this method


def cells(rows: Mapping[str, Row]) -> dict[str, list[str]]:
    """Head -> a text a method, of the columns that some row can fill.

    rows: name -> a row of `measure_method`. "beside" is the account without the weights and
    buffers; times are ratios to the first row's.
    """
    full = {name: row | {"beside": row["total"] - row["parameters"]} for name, row in rows.items()}
    first, told = next(iter(full.values())), {}
    for key, (head, written) in COLUMNS.items():
        values = [row.get(key) for row in full.values()]
        if any(value is not None for value in values):
            told[head] = [BLANK if v is None else written(v, first.get(key) or v) for v in values]
    return told


def drawn(fig: Any, rows: Mapping[str, Row]) -> Any:
    """`cells` as a heat map in a Plotly figure; a column's largest number is the darkest."""
    told = cells(rows)
    shade = [[_shade(text, column) for text in column] for column in told.values()]
    fig.add_heatmap(
        x=list(told),
        y=list(rows),
        z=list(map(list, zip(*shade))),
        text=list(map(list, zip(*told.values()))),
        texttemplate="%{text}",
        hoverinfo="skip",
        colorscale=[[0, "#eef4f2"], [1, "#f3d9c4"]],
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=2,
        ygap=2,
    )
    fig.update_layout(height=180 + 34 * len(rows), margin_t=130)
    fig.update_yaxes(autorange="reversed", type="category")
    return fig.update_xaxes(side="top", type="category", tickangle=0)


def _shade(text: str, column: list[str]) -> float:
    """0 to 1 for the column's largest; 0 for a blank."""
    numbers = [0.0 if cell == BLANK else float(cell.replace(",", "")) for cell in column]
    return numbers[column.index(text)] / (max(numbers) or 1.0)
