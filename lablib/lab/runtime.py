"""`Lab`: a notebook's one object."""

import html
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from IPython.display import HTML, display

from lablib.lab import tiers
from lablib.lab.claims import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict, judge, record
from lablib.papers import Paper, paper

Item = TypeVar("Item")
COLORS = {REPRODUCED: "#009e73", NOT_REPRODUCED: "#d55e00", NOT_JUDGED: "#767676"}
START = "start-here"


class Lab:
    """A lab: its paper, its tier, its seeds and its verdicts.

    slug: of the paper; "start-here" for lab 00. Shows the header card.
    """

    def __init__(self, slug: str):
        self.tier = tiers.current()
        self.paper: Paper | None = None if slug == START else paper(slug)
        self.verdicts: list[Verdict] = []
        display(HTML(_header(self)))

    @property
    def seeds(self) -> range:
        """One seed at the smoke tier, three at cpu, five at gpu."""
        return range(tiers.SEEDS[self.tier])

    def pick(self, *, smoke: Any, cpu: Any, gpu: Any = None) -> Any:
        """The value for this tier; gpu's is cpu's when none is given."""
        return {"smoke": smoke, "cpu": cpu, "gpu": cpu if gpu is None else gpu}[self.tier]

    def progress(self, items: Iterable[Item], what: str = "", total: int | None = None):
        """`items`, with a bar that shows the time left; quiet while outputs are stored."""
        from tqdm.auto import tqdm

        quiet = tiers.static() or "PYTEST_CURRENT_TEST" in os.environ
        bar: Iterator[Item] = tqdm(items, desc=what, total=total, disable=quiet, leave=False)
        return bar

    def claim(self, id: str, values: Any, note: str = "") -> None:
        """Judge a claim of papers.toml from `values` (see `claims.judge`), show and record it.

        note: a sentence of context, such as the size of the effect beside the paper's.
        """
        if self.paper is None:
            raise ValueError("the start page has no paper, so it has no claim")
        claim = self.paper.claim(id)
        verdict = judge(claim, values, self.tier, note)
        self.verdicts.append(verdict)
        record(verdict)
        card = _verdict_card(claim.text, claim.paper, verdict)
        text = f"{claim.id}: {verdict.verdict}. Paper: {claim.paper}. Here: {verdict.summary}."
        display({"text/html": card, "text/plain": f"{text} {note}".strip()}, raw=True)


def _verdict_card(text: str, published: str, verdict: Verdict) -> str:
    why = " (directions are judged at the cpu tier, over three seeds)"
    label = verdict.verdict + (why if verdict.verdict == NOT_JUDGED else "")
    color = COLORS[verdict.verdict]
    rows = [("Paper", published), ("Here", verdict.summary), ("", verdict.note)]
    body = "".join(
        f"<tr><td style='text-align:left;opacity:.7;vertical-align:top'>{key}</td>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for key, value in rows
        if value
    )
    return (
        f"<div style='border-left:6px solid {color};padding:.4em 1em;margin:.5em 0'>"
        f"<div>{html.escape(text)}</div><table style='margin:.3em 0'>{body}</table>"
        f"<b style='color:{color}'>{html.escape(label)}</b></div>"
    )


def _header(lab: Lab) -> str:
    tier = f"tier <b>{lab.tier}</b>, {len(lab.seeds)} seed{'s' if len(lab.seeds) > 1 else ''}"
    if lab.paper is None:
        return _card(f"<div>{tier}; set LABLIB_TIER to smoke, cpu or gpu to change it.</div>")
    claims = "".join(f"<li>{html.escape(claim.text)}</li>" for claim in lab.paper.claims)
    head = f"<b>{html.escape(lab.paper.title)}</b> ({lab.paper.date[:4]}), lab {lab.paper.lab}"
    return _card(
        f"<div>{head}</div><details><summary>{len(lab.paper.claims)} claims are measured here"
        f"</summary><ul style='margin:.2em 0'>{claims}</ul></details>"
        f"<div>{tier}; {_expected(lab)}</div>"
    )


def _card(body: str) -> str:
    style = "border:1px solid #8886;border-radius:6px;padding:.7em 1em;line-height:1.5"
    return f"<div style='{style}'>{body}</div>"


def _expected(lab: Lab) -> str:
    """Minutes and memory as `verify` measured them, else the tier's budget."""
    seconds, memory = tiers.BUDGETS[lab.tier]
    path = lab.paper.paths["result"]
    result = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if result.get("tier") == lab.tier:
        seconds, memory = result["seconds"], result["peak_gb"]
        words = f"measured: {seconds / 60:.1f} minutes and {memory:.1f} GB on {result['device']}"
    else:
        words = f"budget: {seconds / 60:.2g} minutes and {memory:g} GB"
    return html.escape(words) + ("" if lab.tier == "gpu" else _gpu_minutes())


def _gpu_minutes() -> str:
    return f"; budget on a T4 GPU: {tiers.BUDGETS['gpu'][0] / 60:g} minutes"
