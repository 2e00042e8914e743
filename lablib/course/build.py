"""An nbgrader course from labs: its configuration, sources, release versions and gradebook."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

from lablib.files import atomic_write
from lablib.papers import paper, papers
from lablib.paths import project_dir

START = "00-start-here"
CONFIG = '''\
"""What nbgrader does with this course; `python -m lablib course` wrote it."""

from pathlib import Path

c = get_config()  # noqa: F821
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.CourseDirectory.course_id = "{name}"
# Checks count by the verdict of a process that no submission reaches.
c.Autograde.autograde_preprocessors = [
    "lablib.course.execute.JudgedExecute",
    "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.Execute.startup_timeout = 300  # of a kernel, on a busy machine
c.Execute.raise_on_iopub_timeout = False  # outputs that come too late cost no points
c.OverwriteCells.add_missing_cells = True  # a deleted check is asked all the same
'''


def chosen(labs: Sequence[str] = (), themes: Sequence[str] = ()) -> list[Path]:
    """The notebooks of labs, by number or slug, and of all labs of themes; each once, in order.

    Raises FileNotFoundError for a paper whose lab is not there, ValueError when nothing is chosen.
    """
    root = project_dir()
    if root is None:
        raise FileNotFoundError("a course is built in a checkout: the wheel has no labs")
    found = [_lab(root, name) for name in labs]
    rows = [row for row in papers() if row.theme in themes and row.present]
    for theme in themes:
        if not any(row.theme == theme for row in rows):
            raise ValueError(f"the theme {theme!r} has no lab")
    found += [row.paths["lab"] for row in rows]
    if not found:
        raise ValueError("say which labs: --labs 302 701, or --themes experts")
    return sorted(set(found), key=lambda path: path.name)


def _lab(root: Path, name: str) -> Path:
    if name in ("00", "start-here"):
        return root / "labs" / f"{START}.ipynb"
    path = paper(name).paths["lab"]
    if not path.is_file():
        raise FileNotFoundError(f"{name} has no lab yet: {path}")
    return path


def build(notebooks: Sequence[Path], folder: Path) -> list[str]:
    """Write the course into `folder` and have nbgrader release it; the assignments' names.

    A lab is an assignment of its own; other ones in the folder stay as they are.
    Raises RuntimeError when nbgrader is missing or refuses.
    """
    if importlib.util.find_spec("nbgrader") is None:
        raise RuntimeError(
            "nbgrader is missing: use `make course`, or "
            "pip install -c constraints.txt -e '.[grading]'"
        )
    write_sources(notebooks, folder)
    for notebook in notebooks:
        _release(notebook.stem, folder)
    return [notebook.stem for notebook in notebooks]


def write_sources(notebooks: Sequence[Path], folder: Path) -> None:
    """nbgrader_config.py and source/LAB/LAB.ipynb: the labs without their stored outputs."""
    _write(folder / "nbgrader_config.py", CONFIG.format(name=folder.resolve().name))
    for path in notebooks:
        book = nbformat.read(path, as_version=4)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        _write(folder / "source" / path.stem / path.name, nbformat.writes(book) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def _release(name: str, folder: Path) -> None:
    """Make the version that students get, and the assignment's entry in the gradebook."""
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", name, "--force"]
    scripts = str(Path(sys.executable).parent)  # nbgrader looks for `alembic` on the path
    env = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"nbgrader did not release {name}:\n{ran.stderr.strip()}")
