"""What was measured, as tables, and what is wrong with it. Nothing in a table is typed by hand."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lablib.evidence.claims import NOT_REPRODUCED, REPRODUCED, SIGNS, judge
from lablib.evidence.fingerprints import notebook_hash
from lablib.evidence.studies import Study, StudyError, other_content, pinned
from lablib.files import atomic_write
from lablib.papers import Paper, papers, theme_folder, themes
from lablib.paths import data_dir, project_dir

MARKS = {
    REPRODUCED: f"{SIGNS[REPRODUCED]} reproduced",
    NOT_REPRODUCED: f"{SIGNS[NOT_REPRODUCED]} not reproduced",
}
GRADING = data_dir() / "measured" / "grading.json"  # by notebook: what grading a submission takes
JUDGED = ("summary", "verdict", "kind", "measured", "interval")  # what a verdict's values give


@dataclass(frozen=True)
class State:
    """What is stored of one paper, each file read once."""

    paper: Paper

    @cached_property
    def present(self) -> bool:
        """Whether the lab is there."""
        return self.paper.present

    @cached_property
    def result(self) -> dict | None:
        """The stored result; None when there is none. Raises ValueError for a broken file."""
        path = self.paper.paths["result"]
        try:
            return json.loads(path.read_text("utf-8")) if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"{path.name} can't be read: {error}") from None

    @cached_property
    def stale(self) -> bool:
        """Whether what the lab computes its claims from has changed since it was verified."""
        lab = self.paper.paths["lab"]
        return bool(self.result) and self.result.get("code") != notebook_hash(lab)

    @cached_property
    def verdicts(self) -> dict[str, dict]:
        """Claim id -> stored verdict."""
        return {row["claim"]: row for row in self.result["claims"]} if self.result else {}

    @property
    def reproduced(self) -> int:
        """How many claims were reproduced."""
        return sum(row["verdict"] == REPRODUCED for row in self.verdicts.values())

    @property
    def line(self) -> str:
        """planned, present, stale, or how many of the claims were reproduced."""
        if not self.present:
            return "planned"
        if self.result is None:
            return "present, not measured"
        return "stale" if self.stale else f"{self.reproduced} of {len(self.verdicts)} reproduced"


def states() -> list[State]:
    """One a paper, in the order of the labs."""
    return [State(paper) for paper in papers()]


def tables() -> dict[Path, str]:
    """Every file that is generated, wholly or between its markers, and what it should hold."""
    root = project_dir()
    if root is None:
        raise FileNotFoundError("tables are rendered in a checkout: the README is not in the wheel")
    rows = states()
    made = {root / "labs" / "README.md": _labs(rows)}
    for theme, about in themes().items():
        mine = [row for row in rows if row.paper.theme == theme and row.present]
        if mine:
            folder = root / "labs" / theme_folder(about["number"], theme)
            made[folder / "README.md"] = _theme(about["title"], mine)
    for readme, table in ((root / "README.md", _overview), (root / "binder/README.md", _course)):
        made[readme] = between_markers(readme.read_text("utf-8"), table(rows))
    made[readme] = between_markers(made[readme], _hub(rows), "hub")
    return made


def _hub(rows: list[State]) -> str:
    """The instructor's other table: what a JupyterHub takes, and the largest lab on it."""
    from lablib.hub.table import stored, table

    return table(stored(), [row.result["peak_gb"] for row in rows if row.result])


def _overview(rows: list[State]) -> str:
    """The README's part: one line a theme."""
    lines = ["| theme | labs | claims reproduced |", "| --- | --- | --- |"]
    for theme, about in themes().items():
        mine = [row for row in rows if row.paper.theme == theme]
        there = [row for row in mine if row.present]
        title = f"{about['number']}. {about['title']}"
        if there:
            title = f"[{title}](labs/{theme_folder(about['number'], theme)}/README.md)"
        judged = sum(len(row.verdicts) for row in there)
        score = f"{sum(row.reproduced for row in there)} of {judged}" if there else ""
        lines.append(f"| {title} | {len(there)} of {len(mine)} | {score} |")
    return "\n".join(lines)


def _labs(rows: list[State]) -> str:
    """labs/README.md: a row a paper whose lab is there."""
    there = [row for row in rows if row.present]
    lines = [
        "# The labs",
        "",
        f"{len(there)} of {len(rows)} papers have their lab. Start with "
        "[00](00-start-here.ipynb). `python -m lablib papers` lists all papers.",
        "",
        "| lab | paper | reproduced | not reproduced at this scale | minutes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in there:
        paper = row.paper
        lab = f"[{paper.lab}]({theme_folder(paper.part, paper.theme)}/{paper.lab_name})"
        missed = len(row.verdicts) - row.reproduced
        counts = (str(row.reproduced), str(missed)) if row.result else ("not measured", "")
        lines.append(_row(lab, _title(paper), counts[0] + _stale(row), counts[1], _minutes(row)))
    return "\n".join(lines) + "\n"


def _course(rows: list[State]) -> str:
    """The instructor's page: what a lab asks of a student and of a machine, and its points."""
    lines = [
        "| lab | minutes | memory, GB | graded in, seconds | memory then, GB | points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    known = json.loads(GRADING.read_text("utf-8")) if GRADING.is_file() else {}
    start = project_dir() / "labs" / "00-start-here.ipynb"
    about = f"[00](../labs/{start.name}) Start here"
    lines.append(_row(about, "", "", *_graded(known, start), str(points(start))))
    for row in rows:
        if row.present:
            place = f"../labs/{theme_folder(row.paper.part, row.paper.theme)}/{row.paper.lab_name}"
            seen = row.result or {}
            peak = f"{seen['peak_gb']:.1f}" if seen.get("peak_gb") else ""
            lab = f"[{row.paper.lab}]({place}) {row.paper.title}"
            path = row.paper.paths["lab"]
            worth = str(points(path))
            lines.append(_row(lab, _minutes(row) + _stale(row), peak, *_graded(known, path), worth))
    return "\n".join(lines)


def _graded(known: Mapping[str, Any], notebook: Path) -> tuple[str, str]:
    """Seconds and memory of a run at the smoke tier. known: what `bench labs` has stored."""
    seen = known.get(notebook.stem)
    if not seen:
        return "", ""
    return f"{seen['seconds']:.0f}", f"{seen['peak_gb']:.1f}" if seen["peak_gb"] else ""


def points(notebook: Path) -> int:
    """How many points a lab's checks are worth, as its nbgrader metadata say."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return sum(cell["metadata"].get("nbgrader", {}).get("points", 0) for cell in cells)


def _theme(title: str, rows: list[State]) -> str:
    """labs/NN-theme/README.md: a row a claim."""
    lines = [f"# {title}", ""]
    for row in rows:
        paper = row.paper
        lines += [
            f"## [{paper.lab}]({paper.lab_name}): {_title(paper)}",
            "",
            f"{_minutes(row)} minutes." if row.result else "Not measured yet.",
            "",
            "| claim | the paper | here | verdict |",
            "| --- | --- | --- | --- |",
            *_claims(row),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _claims(row: State) -> Iterator[str]:
    for claim in row.paper.claims:
        stored = row.verdicts.get(claim.id)
        if stored is None:
            yield _row(f"{claim.text} *({claim.kind})*", claim.paper, "", "not measured")
            continue
        mark = MARKS.get(stored["verdict"], stored["verdict"]) + _stale(row)
        here = f"{stored['summary']}. {stored['note']}".strip()
        yield _row(f"{claim.text} *({claim.kind})*", claim.paper, here, mark)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _title(paper: Paper) -> str:
    return f"{paper.title} ({paper.date[:4]})"


def _stale(row: State) -> str:
    return " (stale)" if row.stale else ""


def _minutes(row: State) -> str:
    if not row.result:
        return ""
    return f"{row.result['seconds'] / 60:.1f} ({row.result['tier']})"


def markers(name: str = "coverage") -> tuple[str, str]:
    """What stands before and after a generated table in a README."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def between_markers(text: str, table: str, name: str = "coverage") -> str:
    """The text with `table` between the markers of that name. Raises ValueError without them."""
    begin, end = markers(name)
    if begin not in text or end not in text:
        raise ValueError(f"the README lacks {begin} and {end}")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def update() -> list[Path]:
    """Write every table that is not as it should be; which these were."""
    changed = []
    for path, text in tables().items():
        if not path.is_file() or path.read_text("utf-8") != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text, "utf-8")
            changed.append(path)
    return changed


def problems() -> list[str]:
    """What `coverage --check` finds wrong: old tables, missing, stale and doubtful results."""
    again = "run `python -m lablib coverage`"
    found = [
        f"{path.name} in {path.parent.name} is not as generated: {again}"
        for path, text in tables().items()
        if not path.is_file() or path.read_text("utf-8") != text
    ]
    for row in states():
        if row.present:
            found += problems_of(row)
    return found


def problems_of(row: State) -> list[str]:
    """What is wrong with one present paper's evidence."""
    slug = row.paper.slug
    again = f"run `python -m lablib verify {slug} --save`"
    if row.result is None:
        return [f"{slug} was never measured: {again}"]
    found = [f"the result of {slug} is stale: {again}"] if row.stale else []
    ids = [claim["claim"] for claim in row.result["claims"]]
    known = [claim.id for claim in row.paper.claims]
    found += [f"{slug} has {ids.count(i)} entries for {i}" for i in set(ids) if ids.count(i) > 1]
    found += [f"{slug} has an entry for {i}, no claim of its" for i in sorted({*ids} - {*known})]
    found += [f"{slug} has no entry for {i}: {again}" for i in known if i not in ids]
    found += [
        f"{slug} was measured on another {name} than there is here"
        for name in other_content(row.result["content"])
        if pinned(name)
    ]
    if row.result["tier"] == "smoke":
        found.append(f"{slug} was measured at the smoke tier, which tells nothing: {again}")
    if not row.result["content"]:
        found.append(f"the result of {slug} names no corpus and no model that it opened: {again}")
    found += _judged_again(row, set(ids) & set(known))
    study = Study(row.paper)
    return found + (study.problems(canary=False) if study.exists else [])


def _judged_again(row: State, ids: set[str]) -> list[str]:
    """Where a stored verdict is not what its stored values, or the study's runs, give."""
    study = Study(row.paper)
    try:
        runs = study.exists and study.path.is_file()
        values = study.module.values(study.runs()) if runs else {}
    except StudyError as error:
        return [str(error)]
    stored = [claim for claim in row.result["claims"] if claim["claim"] in ids]
    wrong = ((claim["claim"], _wrong(row.paper, claim, values)) for claim in stored)
    return [f"{row.paper.slug}, {id}: {text}" for id, text in wrong if text]


def _wrong(paper: Paper, stored: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """What is wrong with one stored verdict; nothing when it follows from its values.

    values: what the study gives, a claim each.
    """
    claim = paper.claim(stored["claim"])
    source = stored.get("source")
    if source not in ("lab", "study"):
        return f"its source is {source!r}, neither lab nor study"
    if claim.kind == "direction" and source == "lab":
        return "a direction is judged on a study's runs"
    if source == "study" and claim.id not in values:
        return "the study gives no values for it"
    if source == "lab" and claim.id in values:
        return "the study gives values for it, and the lab's were taken"
    try:
        again = judge(claim, values[claim.id] if source == "study" else stored["values"])
    except (ValueError, KeyError, TypeError) as error:
        return str(error)
    made = json.loads(json.dumps(asdict(again)))
    for key in JUDGED:
        if not _same(made, stored, key):
            return f"stored as its {key} is {stored.get(key)!r}, its values give {made[key]!r}"
    return ""


def _same(made: Mapping[str, Any], stored: Mapping[str, Any], key: str) -> bool:
    """Whether two records have the same under a key, to the digits that machines agree on."""
    ours, theirs = made[key], stored.get(key)
    if key in ("measured", "interval") and ours is not None and theirs is not None:
        return bool(np.allclose(ours, theirs, rtol=1e-6, atol=1e-12))
    return ours == theirs
