"""The map of the 120 papers: a row a theme, over time, with a color and a symbol a verdict."""

import datetime
import html

import plotly.graph_objects as go

from lablib.evidence.claims import SIGNS
from lablib.evidence.coverage import State, states
from lablib.lab import colab, figures
from lablib.papers import papers, themes
from lablib.papers.scaffold import colab_address

# What came of a paper -> its color and its symbol.
KINDS = {
    "every claim reproduced": (figures.PALETTE[2], "circle"),
    "some claims not reproduced at this scale": (figures.PALETTE[1], "diamond"),
    "lab present, not measured": (figures.PALETTE[0], "square"),
    "lab to come": ("#767676", "circle-open"),
}


def kind(state: State) -> str:
    """One of KINDS, from the paper's stored result."""
    if not state.present:
        return "lab to come"
    if state.result is None:
        return "lab present, not measured"
    return list(KINDS)[0 if state.reproduced == len(state.verdicts) else 1]


def paper_map() -> go.Figure:
    """Every paper as a point: date across, theme down; hover for its claims and their verdicts."""
    fig = figures.figure(height=560, margin={"t": 30}, legend={"orientation": "h", "y": -0.18})
    spread, rows = _spread(), states()
    for name, (color, symbol) in KINDS.items():
        mine = [row for row in rows if kind(row) == name]
        fig.add_scatter(
            x=[row.paper.date for row in mine],
            y=[row.paper.part + spread[row.paper.slug] for row in mine],
            text=[_hover(row) for row in mine],
            hovertemplate="%{text}<extra></extra>",
            mode="markers",
            name=name,
            marker={"size": 12, "color": color, "symbol": symbol, "line": {"width": 1}},
        )
    parts = {about["number"]: about["title"] for about in themes().values()}
    ticks = {"tickvals": list(parts), "ticktext": [f"{n}. {title}" for n, title in parts.items()]}
    fig.update_yaxes(autorange="reversed", zeroline=False, **ticks)
    fig.update_xaxes(title="published")
    return fig


def lab_links() -> str:
    """HTML: a link to each lab that is there, with its verdicts."""
    rows = [row for row in states() if row.present]
    items = [
        f"<li><a href='{html.escape(_address(row))}'>{row.paper.lab} "
        f"{html.escape(row.paper.title)}</a>: {html.escape(row.line)}</li>"
        for row in rows
    ]
    return f"<ul>{''.join(items)}</ul>"


def _address(state: State) -> str:
    """Relative to labs/; on Colab, which has no files beside a notebook, that of the badge."""
    lab = state.paper.paths["lab"]
    place = f"{lab.parent.name}/{lab.name}"
    return colab_address(f"labs/{place}") if colab.here() else place


def _spread() -> dict[str, float]:
    """Small vertical offsets, so that papers of one theme and season don't hide each other."""
    placed: list[tuple[int, datetime.date, float]] = []
    offsets = {}
    for paper in papers():
        date = datetime.date.fromisoformat(paper.date)
        near = [d for part, day, d in placed if part == paper.part and abs((day - date).days) < 75]
        free = [offset for offset in (0, -0.28, 0.28, -0.14, 0.14) if offset not in near]
        offsets[paper.slug] = free[0] if free else 0.0
        placed.append((paper.part, date, offsets[paper.slug]))
    return offsets


def _hover(state: State) -> str:
    paper = state.paper
    marks = {id: SIGNS[row["verdict"]] for id, row in state.verdicts.items()}
    claims = "".join(
        f"<br>{marks.get(claim.id, '·')} {html.escape(claim.text)}"
        for claim in paper.claims
        if not claim.aside
    )
    title = f"<b>{html.escape(paper.title)}</b><br>lab {paper.lab}, {paper.date}"
    return title + (claims or "<br>its lab is to come")
