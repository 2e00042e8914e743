"""The README's coverage table, rendered from data/results: nothing in it is typed by hand."""

import json
from pathlib import Path

from lablib.files import atomic_write
from lablib.lab.verify import fingerprint
from lablib.papers import Paper, papers
from lablib.paths import project_dir

BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
MARKS = {
    "reproduced": "✔ reproduced",
    "not reproduced at this scale": "✘ not reproduced at this scale",
}


def result_of(paper: Paper) -> dict | None:
    """The paper's stored result, or None when it was never verified."""
    path = paper.paths["result"]
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def is_stale(paper: Paper, result: dict) -> bool:
    """Whether the lab, its claims or a module it used changed after the result was written."""
    return fingerprint(paper, result["modules"]) != result["hash"]


def status(paper: Paper) -> str:
    """planned, present (no result yet), stale, or how many of its claims were reproduced."""
    if not paper.present:
        return "planned"
    result = result_of(paper)
    if result is None:
        return "present, not measured"
    if is_stale(paper, result):
        return "stale"
    good = sum(claim["verdict"] == "reproduced" for claim in result["claims"])
    return f"{good} of {len(result['claims'])} reproduced"


def table() -> str:
    """The table as Markdown: a row a claim of every paper whose lab is there."""
    present = [paper for paper in papers() if paper.present]
    lines = [
        f"{len(present)} of {len(papers())} papers have their lab.",
        "",
        "| lab | paper | claim | paper's figure | measured here | verdict | lab's minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for paper in present:
        lines += _rows(paper)
    return "\n".join(lines)


def _rows(paper: Paper) -> list[str]:
    result = result_of(paper)
    found = {claim["claim"]: claim for claim in result["claims"]} if result else {}
    minutes = f"{result['seconds'] / 60:.1f} ({result['tier']})" if result else ""
    stale = " (stale)" if result and is_stale(paper, result) else ""
    root = project_dir()
    lab = paper.paths["lab"].relative_to(root).as_posix() if root else ""
    rows = []
    for place, claim in enumerate(paper.claims):
        verdict = found.get(claim.id)
        note = f" {verdict['note']}" if verdict and verdict["note"] else ""
        cells = [
            f"[{paper.lab}]({lab})" if place == 0 else "",
            f"{paper.title} ({paper.date[:4]})" if place == 0 else "",
            f"{claim.text} *({claim.kind})*",
            claim.paper,
            verdict["summary"] + "." + note if verdict else "",
            MARKS.get(verdict["verdict"], verdict["verdict"]) + stale
            if verdict
            else "not measured",
            minutes if place == 0 else "",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def update_readme(path: Path) -> bool:
    """Put the table between the README's markers; whether that changed it."""
    old = path.read_text("utf-8")
    new = rendered(old)
    if new != old:
        with atomic_write(path) as temporary:
            temporary.write_text(new, "utf-8")
    return new != old


def rendered(readme: str) -> str:
    """The README's text with the table as it should be. Raises ValueError without its markers."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"the README lacks {BEGIN} and {END}")
    head, rest = readme.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def problems(readme: Path) -> list[str]:
    """What `coverage --check` finds wrong: a stale README, a stale or missing result."""
    found = []
    if rendered(readme.read_text("utf-8")) != readme.read_text("utf-8"):
        found.append("README.md's table is stale: run `python -m lablib coverage`")
    for paper in papers():
        if paper.present:
            result = result_of(paper)
            state = "missing" if result is None else "stale" if is_stale(paper, result) else ""
            if state:
                again = f"run `python -m lablib verify {paper.slug}`"
                found.append(f"the result of {paper.slug} is {state}: {again}")
    return found
