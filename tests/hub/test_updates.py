"""Updates of the labs reach students through nbgitpuller, and never take their work."""

import json

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell

from lablib.hub.client import Student
from lablib.hub.publish import git, publish
from lablib.hub.running import hub

pytestmark = pytest.mark.hub
THEME = "labs/03-experts"
EDITED, OPENED, DELETED = (
    f"{THEME}/{name}.ipynb" for name in ("302-switch-transformers", "303-glam", "304-olmoe")
)


@pytest.fixture
def ada(overlay, tmp_path):
    """A student with a copy, and the folder that the course is then published from."""
    with hub(tmp_path / "hub", config=overlay()) as running:
        student = Student(running.url, "ada", running.password)
        student.start()
        student.pull(running.labs)
        yield student, running, tmp_path / "hub" / "users" / "ada"


def change(path):
    """The course adds a cell at the top of a lab."""
    book = nbformat.read(path, as_version=4)
    book.cells.insert(0, new_markdown_cell("From the course.", id="news"))
    nbformat.write(book, path)


def test_every_rule(ada, tmp_path):
    student, running, home = ada
    work = student.read(EDITED)
    work.cells[0].source = "My notes."
    student.save(EDITED, work)
    before = (home / EDITED).read_bytes()

    opened = student.read(OPENED)  # JupyterLab notes the kernel's version, and saves by itself
    opened.metadata["language_info"] = {"name": "python", "version": "9.9"}
    student.save(OPENED, opened)
    student.save(f"{THEME}/own.ipynb", work)
    student.save(f"{THEME}/999-new.ipynb", work)
    (home / DELETED).unlink()

    labs = tmp_path / "course"
    publishing = {"GIT_DIR": str(running.state / "labs.git"), "GIT_WORK_TREE": str(labs)}
    labs.mkdir()
    git("checkout", "--quiet", "main", "--", ".", **publishing)
    for path in (EDITED, OPENED, DELETED):
        change(labs / path.removeprefix("labs/"))
    (labs / "03-experts" / "999-new.ipynb").write_text(json.dumps(work))
    (labs / "03-experts" / "998-new.ipynb").write_text(json.dumps(work))
    publish(labs, running.state / "labs.git")
    student.pull(running.labs)

    assert (home / EDITED).read_bytes() == before, "edited: as it was, to the byte"
    for path, why in ((OPENED, "only opened: updated"), (DELETED, "deleted: back, and new")):
        assert student.read(path).cells[0].source == "From the course.", why
    assert (home / THEME / "998-new.ipynb").is_file(), "new files arrive"
    assert student.read(f"{THEME}/own.ipynb") == work, "a file of one's own stays"
    (moved,) = (home / THEME).glob("999-new__*.ipynb")
    assert nbformat.read(moved, 4).cells[0].source == "My notes.", "in the way: renamed"

    copied = student.jupyter("POST", "lablib/clean-copy", json={"path": EDITED}).json()["path"]
    assert copied == EDITED.replace(".ipynb", "-clean.ipynb")
    assert student.read(copied).cells[0].source == "From the course."
    student.pull(running.labs)
    assert (home / EDITED).read_bytes() == before and (home / copied).is_file()
