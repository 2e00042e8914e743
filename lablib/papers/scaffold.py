"""What follows from a paper's slug alone: its empty places, and the cells that every lab has."""

import importlib
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from lablib.files import atomic_write
from lablib.papers import Paper
from lablib.paths import project_dir

INSTALL = """\
try:
    import lablib
except ImportError:  # on Colab, the first time; everywhere else this cell only imports
    %pip install -q git+{repository}
    !python -m lablib setup --labs {lab}
    import lablib"""


def repository() -> str:
    """The project's address, as pyproject.toml gives it, or the installed package."""
    from lablib.papers import tomllib

    if root := project_dir():
        text = (root / "pyproject.toml").read_text("utf-8")
        return tomllib.loads(text)["project"]["urls"]["Repository"]
    links = metadata("lablib").get_all("Project-URL") or []
    return dict(link.split(", ", 1) for link in links)["Repository"]


def colab_address(notebook: str) -> str:
    """Where a notebook, named by its path in the project, opens in Colab."""
    owner = repository().removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{owner}/blob/main/{notebook}"


def badges(notebook: str) -> str:
    """The Colab and Binder badges of a notebook, named by its path in the project."""
    owner = repository().removeprefix("https://github.com/")
    colab = colab_address(notebook)
    binder = f"https://mybinder.org/v2/gh/{owner}/main?urlpath=lab/tree/{notebook}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def install_cell(lab: str) -> str:
    """The first code cell of a lab, named by its number; "00" is the start page."""
    return INSTALL.format(repository=repository(), lab=lab)


def grading(name: str, checks: bool) -> dict[str, Any]:
    """nbgrader's metadata of an exercise's stub, or of the check below it; a point each.

    name: of the exercise, such as "load_balancing_loss".
    """
    id = name.replace("_", "-")
    return {
        "cell_type": "code",
        "grade": checks,
        "grade_id": f"check-{id}" if checks else id,
        "locked": checks,
        "points": int(checks),
        "schema_version": 3,
        "solution": not checks,
        "task": False,
    }


def stub(name: str) -> str:
    """An exercise's cell; its arguments and docstring are the author's."""
    lines = ["### BEGIN SOLUTION", "raise NotImplementedError", "### END SOLUTION"]
    return "\n    ".join([f"def {name}():", *lines])


def exercise_names(paper: Paper) -> list[str]:
    """The exercises that the paper's module defines, in order."""
    from lablib.exercises import Exercise

    module = importlib.import_module(f"lablib.exercises.{paper.name}")
    return [name for name, value in vars(module).items() if isinstance(value, Exercise)]


def notebook(paper: Paper):
    """A lab with nothing in it but what follows from the slug."""
    import nbformat.v4 as v4

    place = paper.paths["lab"].relative_to(project_dir()).as_posix()
    head = f"# {paper.lab} · {paper.title}\n\n{badges(place)}"
    hidden = {"jupyter": {"source_hidden": True}}
    setup = (
        f"from {paper.module.rpartition('.')[0]} import {paper.name}\n"
        f"from lablib.lab import Lab, explore, figures, predict, source\n\n"
        f'lab = Lab("{paper.slug}")'
    )
    cells = [
        v4.new_markdown_cell(head),
        v4.new_code_cell(install_cell(str(paper.lab)), metadata=hidden),
        v4.new_code_cell(setup, metadata=hidden),
    ]
    for name in exercise_names(paper) if paper.paths["exercises"].is_file() else []:
        tags = {"tags": ["nbval-check-output"]}
        cells.append(v4.new_code_cell(stub(name), metadata={"nbgrader": grading(name, False)}))
        checked = {"nbgrader": grading(name, True), **tags}
        cells.append(v4.new_code_cell(f"lab.check({name})", metadata=checked))
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place:02d}"
    book = v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    return book


def write_missing(paper: Paper) -> list[Path]:
    """Write the paper's places that are missing; which these were.

    What measurements write, the study's runs and the lab's result, is not written here.
    """
    import nbformat

    about = f'"""{{what}} of {paper.title} ({paper.date[:4]}).\n\nLab {paper.lab}.\n"""\n'
    texts = {
        "technique": about.format(what="The technique"),
        "study": about.format(what="The study"),
        "exercises": about.format(what="Exercises") + "\nfrom lablib.exercises import Exercise\n",
        "tests": f"from {paper.module.rpartition('.')[0]} import {paper.name}\n",
    }
    written = []
    for what in (*texts, "lab"):
        path = paper.paths[what]
        if path.exists():
            continue
        with atomic_write(path) as temporary:
            if what == "lab":
                nbformat.write(notebook(paper), temporary)
            else:
                temporary.write_text(texts[what], "utf-8")
        written.append(path)
    return written
