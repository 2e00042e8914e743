"""`Lab`: a notebook's one object."""

import html
import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from IPython.display import HTML, display

from lablib.evidence import tiers
from lablib.evidence.claims import (
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
    SIGNS,
    Verdict,
    judge,
    record,
)
from lablib.evidence.studies import Run, Study, comparable, matching, study
from lablib.evidence.sweeps import call
from lablib.papers import Claim, Paper, paper

Item = TypeVar("Item")
COLORS = {REPRODUCED: "#009e73", NOT_REPRODUCED: "#d55e00", NOT_JUDGED: "#767676"}
START = "start-here"
# What transformers imports where it is installed, and says there of compiled parts that don't fit.
NOISY = ("torchao", "torch.utils._pytree")


class Lab:
    """A lab: its paper, its tier, its study's runs and its verdicts.

    slug: of the paper; "start-here" for lab 00. Shows the header card.
    """

    def __init__(self, slug: str):
        self.tier = tiers.current()
        self.paper: Paper | None = None if slug == START else paper(slug)
        self.verdicts: dict[str, Verdict] = {}
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        display(HTML(_header(self)))

    def pick(self, *, smoke: Any, cpu: Any, gpu: Any = None) -> Any:
        """The value for this tier; gpu's is cpu's when none is given."""
        return {"smoke": smoke, "cpu": cpu, "gpu": cpu if gpu is None else gpu}[self.tier]

    def progress(self, items: Iterable[Item], what: str = "", total: int | None = None):
        """`items`, with a bar that shows the time left; quiet while outputs are stored."""
        from tqdm.auto import tqdm

        quiet = tiers.static() or "PYTEST_CURRENT_TEST" in os.environ
        disable = True if quiet else None  # None: where nobody watches, such as in a log file
        bar: Iterator[Item] = tqdm(items, desc=what, total=total, disable=disable, leave=False)
        return bar

    @property
    def study(self) -> Study:
        """The paper's study. Raises ValueError on the start page, which has none."""
        if self.paper is None:
            raise ValueError("the start page has no paper, so it has no study and no claim")
        return Study(self.paper)

    def runs(self, points: str = "POINTS") -> list[Run]:
        """The study's stored runs, each its point and its result in one dictionary.

        points: "POINTS" are those that verdicts come from; "TUNING" those that the design was
        fixed on.
        """
        return self.study.runs(points)

    def run(self, of: str | None = None, **point: Any) -> Run:
        """Make a run of your own, as the study made its: point and result in one dictionary.

        What you leave out is as in the study's first point. One thread, as there; it trains on a
        GPU where there is one, at the gpu tier. At the smoke tier the study's tiny canary is run
        instead, with your values where it has them.
        of: the shared study that the run is like, "scaling-grid" say, where the lab reads one.
        """
        module = (study(of) if of else self.study).module
        given = {**module.POINTS[0], **point}
        made = {**module.CANARY} if self.tier == "smoke" else given
        return given | call(module.run, made, gpu=self.tier == "gpu")["result"]

    def replay(self, minutes: float = 0.5, seed: int | None = None, **where: Any) -> None:
        """Repeat stored runs, drawn at random, as many as the time allows, and compare.

        where: what their points must have, kind="dense" say; all runs are drawn from without it.

        At least one is repeated, the cheapest when none is short enough; at the smoke tier the
        canary. seed: of the drawing.
        """
        parts = self.study.parts()
        if self.tier == "smoke":
            source = parts[0][0]
            again = call(source.module.run, source.module.CANARY)["result"]
            stored = source.read()[0]["canary"]
            self.say(_compared([(again, stored)], [], "The study's canary repeated here"))
            return
        rows = [row | {"of": source} for source, found in parts for row in found]
        rows = [r for r in rows if any(map(comparable, *zip(*r["result"].items())))]
        rows = [row for row in rows if matching([row["point"]], **where)]
        drawn = _drawn(rows, 60 * minutes, random.Random(seed))
        pairs = [
            (call(row["of"].module.run, row["point"])["result"], row["result"])
            for row in self.progress(drawn, "repeating stored runs")
        ]
        self.say(_compared(pairs, rows, f"{len(drawn)} of {len(rows)} runs repeated here"))

    def say(self, text: str) -> None:
        """Show a sentence that states a result, computed from the values that it is about."""
        shown = f"<p style='max-width:46em'>{html.escape(text)}</p>"
        display({"text/html": shown, "text/plain": text}, raw=True)

    def check(self, attempt: Callable[..., Any]) -> None:
        """Test the reader's function against the exercise of its name; see `lablib.lab.grading`."""
        from lablib.lab.grading import check

        check(self.paper.name if self.paper else "start_here", attempt)

    def claim(self, id: str, values: Any = None, note: str = "") -> None:
        """Judge a claim of the paper, show the verdict and record it.

        values: what the notebook computed (see `lablib.evidence.claims.judge`); without them the
        claim is judged from the study's stored runs, at every tier.
        note: a sentence of context, such as why an effect differs from the paper's.
        """
        own = self.study
        claim = own.paper.claim(id)
        source = "lab" if values is not None else "study"
        if values is None:
            values = own.module.values(own.runs())[id]
        verdict = replace(judge(claim, values, note), source=source)
        if id not in self.verdicts:  # a cell that is run again records nothing twice
            record(verdict)
        self.verdicts[id] = verdict
        text = f"{id}: {verdict.verdict}. Paper: {claim.paper}. Here: {verdict.summary}."
        card = {"text/html": _verdict_card(claim, verdict), "text/plain": f"{text} {note}".strip()}
        display(card, raw=True)


def _drawn(rows: list[dict], seconds: float, draw: random.Random) -> list[dict]:
    """Rows in random order until the time is spent; the cheapest one when none fits."""
    chosen: list[dict] = []
    for row in draw.sample(rows, len(rows)):
        if row["seconds"] <= seconds:
            chosen.append(row)
            seconds -= row["seconds"]
    return chosen or [min(rows, key=lambda row: row["seconds"])]


def _compared(pairs: list[tuple[dict, dict]], rows: list[dict], head: str) -> str:
    """How far repeated runs are from the stored ones, beside how far seeds are from each other."""
    worst, where = 0.0, ""
    for again, stored in pairs:
        for key, value in stored.items():
            if comparable(key, value) and abs(again[key] - value) >= worst:
                worst, where = abs(again[key] - value), key
    spread = _spread(rows, where)
    beside = f"; seeds differ by {spread:.2g} (standard deviation)" if spread else ""
    allowed = spread / 10 if spread else 1e-4
    word = "no difference" if worst <= allowed else "they differ: look at versions and text"
    return f"{head}, largest difference {worst:.2g} (in {where}){beside}: {word}."


def _spread(rows: list[dict], key: str) -> float:
    """Standard deviation over seeds of one result, the median over points."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        kind = json.dumps({k: v for k, v in row["point"].items() if k != "seed"}, sort_keys=True)
        if key in row["result"]:
            groups.setdefault(kind, []).append(row["result"][key])
    found = [float(np.std(group, ddof=1)) for group in groups.values() if len(group) > 1]
    return float(np.median(found)) if found else 0.0


def _verdict_card(claim: Claim, verdict: Verdict) -> str:
    color = COLORS[verdict.verdict]
    why = " (directions are judged from five seeds on)" if verdict.verdict == NOT_JUDGED else ""
    rows = [("Paper", claim.paper), ("Here", verdict.summary), ("", verdict.note)]
    body = "".join(
        f"<tr><td style='text-align:left;opacity:.8;vertical-align:top'>{key}</td>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for key, value in rows
        if value
    )
    return (
        f"<div style='border-left:6px solid {color};padding:.4em 1em;margin:.5em 0;max-width:46em'>"
        f"<div>{html.escape(claim.text)}</div><table style='margin:.3em 0'>{body}</table>"
        f"<b>{SIGNS[verdict.verdict]} {verdict.verdict}{why}</b></div>"
    )


def _header(lab: Lab) -> str:
    tier = f"tier <b>{lab.tier}</b>"
    if lab.paper is None:
        return _card(f"<div>{tier}; set LABLIB_TIER to smoke, cpu or gpu to change it.</div>")
    head = f"<b>{html.escape(lab.paper.title)}</b> ({lab.paper.date[:4]}), lab {lab.paper.lab}"
    lead, *others = [html.escape(claim.text) for claim in lab.paper.claims if not claim.aside] or [
        "none yet"
    ]
    more = "".join(f"<li>{text}</li>" for text in others)
    rest = f"<details><summary>and {len(others)} more</summary><ul>{more}</ul></details>"
    return _card(
        f"<div>{head}</div><div>Measured again here: {lead}.</div>{rest if others else ''}"
        f"<div>{tier}; {_expected(lab)}</div>"
    )


def _card(body: str) -> str:
    style = "border:1px solid #8886;border-radius:6px;padding:.7em 1em;line-height:1.5"
    return f"<div style='{style};max-width:46em'>{body}</div>"


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
