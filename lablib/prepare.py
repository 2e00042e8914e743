"""Set-up: fetch corpora and tasks, prepare pretrained models. Does nothing when all is there."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lablib.data.corpora import CORPORA, prepare
from lablib.data.tasks import TASKS, prepare_task
from lablib.models.weights import is_ready, local_names, prepare_model
from lablib.papers import Paper, papers, themes
from lablib.papers import paper as find
from lablib.paths import labs_dir

START = "00-start-here"


@dataclass(frozen=True)
class Step:
    """One corpus, task or model. name: as results list it, such as "corpus bible"."""

    name: str
    about: str
    is_ready: Callable[[], bool]
    work: Callable[[], Path]


def prepare_all(labs: Sequence[str] = ()) -> None:
    """Prepare each corpus, task and model in turn, saying what is done and how long it took.

    labs: numbers or slugs; only what these need is prepared ("00" is the start page). Without them,
    `LABLIB_THEMES=experts,scaling` limits it to what the labs of these themes need.
    Each is written whole or not at all, so after an interruption the next run goes on with the
    first that is missing. Raises DataError when something can't be had, ValueError for an unknown
    theme, UnknownPaper for an unknown lab.
    """
    steps = needed_steps(labs)
    missing = [step for step in steps if not step.is_ready()]
    for number, step in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {step.name}{step.about} ...", end=" ", flush=True)
        start = time.perf_counter()
        step.work()
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(steps)} corpora, tasks and models are ready")
    if not labs:
        remember_labs()


def remember_labs() -> None:
    """Compute what the start page and the catalogue say of each lab: a second or more, once."""
    from lablib.evidence.coverage import states

    for row in states():
        _ = row.present and row.stale


def needed_steps(labs: Sequence[str] = ()) -> list[Step]:
    """What set-up prepares: what some labs need, else those of the themes in `LABLIB_THEMES`, else
    all."""
    steps = all_steps()
    chosen = _chosen(os.environ.get("LABLIB_THEMES", ""))
    if not labs and not chosen:
        return steps
    if labs:
        wanted = [find(name) for name in labs if name not in ("00", START)]
    else:
        wanted = [row for row in papers() if row.theme in chosen]
    names = needed_by(wanted)
    return [step for step in steps if step.name in names]


def all_steps() -> list[Step]:
    """Every corpus, task and model that set-up can prepare."""
    rows = [corpus for corpus in CORPORA.values() if not corpus.online]
    corpora = [
        Step(
            f"corpus {corpus.name}",
            f" ({corpus.source})",
            lambda c=corpus: c.is_ready,
            lambda c=corpus: prepare(c.name),
        )
        for corpus in rows
    ]
    tasks = [
        Step(
            f"task {task.name}",
            f" ({task.source})",
            lambda t=task: t.is_ready,
            lambda t=task: prepare_task(t.name),
        )
        for task in TASKS.values()
    ]
    models = [
        Step(f"model {name}", "", lambda n=name: is_ready(n), lambda n=name: prepare_model(n))
        for name in local_names()
    ]
    return corpora + tasks + models


def _chosen(text: str) -> set[str]:
    chosen = {name.strip().replace("-", "_") for name in text.split(",") if name.strip()}
    if unknown := sorted(chosen - themes().keys()):
        raise ValueError(
            f"LABLIB_THEMES has {unknown[0]!r}, which is no theme; there are {', '.join(themes())}"
        )
    return chosen


def needed_by(chosen: Iterable[Paper]) -> set[str]:
    """Names of what the labs of some papers, and the start page, open.

    A lab needs what its result and its study have opened, as their files tell, and what its
    notebook names for the reader to choose. One without a result may need all there is.
    """
    names = _named_in(labs_dir() / f"{START}.ipynb")
    for paper in chosen:
        opened = _content(paper.paths["result"])
        if paper.present and opened is None:
            return {step.name for step in all_steps()}
        names |= (opened or set()) | (_content(paper.paths["runs"]) or set())
        names |= _named_in(paper.paths["lab"])
    return names


def _content(path: Path) -> set[str] | None:
    """What a result, or a study by the first line of its runs, has opened; None when none tells."""
    if not path.is_file():
        return None
    text = path.read_text("utf-8")
    try:
        row = json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except ValueError as error:
        raise ValueError(f"{path.name} can't be read: {error}") from None
    return set(row["content"]) if "content" in row else None


def _named_in(notebook: Path) -> set[str]:
    """The corpora, tasks and models that stand in quotes in a notebook's code."""
    if not notebook.is_file():
        return set()
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return {step.name for step in all_steps() if f'"{step.name.partition(" ")[2]}"' in code}
