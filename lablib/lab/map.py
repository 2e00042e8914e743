"""The map of the 120 papers: a row a theme, from left to right in time, colored by verdict."""

import datetime
import html

import plotly.graph_objects as go

from lablib.lab import figures
from lablib.lab.coverage import is_stale, result_of
from lablib.papers import Paper, papers

STATES = {
    "every claim reproduced": figures.PALETTE[2],
    "some claims not reproduced at this scale": figures.PALETTE[1],
    "lab present, not measured": figures.PALETTE[0],
    "lab to come": "#b0b0b0",
}


def state(paper: Paper) -> str:
    """One of STATES, from the paper's stored result."""
    result = result_of(paper) if paper.present else None
    if result is None or is_stale(paper, result):
        return "lab present, not measured" if paper.present else "lab to come"
    good = all(claim["verdict"] == "reproduced" for claim in result["claims"])
    return list(STATES)[0 if good else 1]


def paper_map() -> go.Figure:
    """Every paper as a point: date across, theme down; hover for title, claim and lab number."""
    fig = figures.figure(height=560, margin={"t": 30}, legend={"orientation": "h", "y": -0.1})
    parts = {found.part: found.part_title for found in papers()}
    spread = _spread()
    for name, color in STATES.items():
        rows = [found for found in papers() if state(found) == name]
        fig.add_scatter(
            x=[found.date for found in rows],
            y=[found.part + spread[found.slug] for found in rows],
            text=[_hover(found) for found in rows],
            hovertemplate="%{text}<extra></extra>",
            mode="markers",
            name=name,
            marker={"size": 12, "color": color, "line": {"width": 1, "color": "white"}},
        )
    ticks = {"tickvals": list(parts), "ticktext": [f"{n}. {title}" for n, title in parts.items()]}
    fig.update_yaxes(autorange="reversed", zeroline=False, **ticks)
    fig.update_xaxes(title="published")
    return fig


def _spread() -> dict[str, float]:
    """Small vertical offsets, so that papers of one theme and season don't hide each other."""
    placed: list[tuple[int, datetime.date, float]] = []
    offsets = {}
    for found in papers():
        date = datetime.date.fromisoformat(found.date)
        near = [d for part, day, d in placed if part == found.part and abs((day - date).days) < 75]
        free = [offset for offset in (0, -0.28, 0.28, -0.14, 0.14) if offset not in near]
        offsets[found.slug] = free[0] if free else 0.0
        placed.append((found.part, date, offsets[found.slug]))
    return offsets


def _hover(paper: Paper) -> str:
    claims = "".join(f"<br>· {html.escape(claim.text)}" for claim in paper.claims)
    title = f"<b>{html.escape(paper.title)}</b><br>lab {paper.lab}, {paper.date}"
    return title + (claims or "<br>its lab is to come")
